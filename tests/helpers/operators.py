"""Arguments for every ATen operator that has a rule, and the page of what tracing does with which operator.

``PYTHONPATH=tests python -m helpers.operators`` writes docs/operators.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastmatch.spec.operations import is_composite
from fastmatch.spec.rules import RULES, rule_of
from fastmatch.spec.rules.elementwise import FACTORIES
from helpers.equivariance import Outcome, compare

PAGE = Path(__file__).parents[2] / "docs" / "operators.md"
TOLERANCE = 1e-9

UNTESTED = frozenset(
    [
        "_batch_norm_with_update", "_scaled_dot_product_attention_math_for_mps", "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_fused_attention_overrideable", "_thnn_fused_gru_cell", "_thnn_fused_lstm_cell",
        "cudnn_batch_norm", "empty", "empty_like", "empty_strided", "equal", "eye", "full", "miopen_batch_norm",
        "mkldnn_max_pool2d", "new_empty", "new_empty_strided", "ones", "quantized_max_pool2d", "zeros",
    ]
)  # fmt: skip
"""Operators of other devices, of tensors without operands or values, and of results that are no tensors."""

Sample = tuple[list[Any], dict[str, Any]]


class Sampler:
    """Random arguments; the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, low: float = 0.2, high: float = 0.9) -> torch.Tensor:
        values = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return low + (high - low) * values

    def integers(self, below: int, *shape: int) -> torch.Tensor:
        return torch.randint(below, shape, generator=self.generator)

    def mask(self, *shape: int) -> torch.Tensor:
        return self(*shape) > 0.5

    def definite(self, *batch: int) -> torch.Tensor:
        x = self(*batch, 4, 4)
        return x @ x.mT + 4 * torch.eye(4, dtype=torch.float64)


def samples(r: Sampler) -> dict[str, list[list[Any]]]:
    """Return operator -> positional arguments, for operators whose arguments have shapes of their own."""
    x, cube = r(4, 6), r(3, 4, 6)
    image, square = r(2, 6, 8, 8), r(3, 5, 5)
    wide = (r(12, 4, 3), r(12))
    query, key = r(2, 4, 5, 6), r(2, 4, 7, 6)
    index, few = r.integers(6, 4, 3), r.integers(4, 3)
    gates = r(3, 20), r(3, 20), r(3, 5), r(20), r(20)
    lstm = (r(5, 3, 6), r(20, 6), r(20, 5), r(20), r(20), r(1, 3, 5), r(1, 3, 5))
    statistics = [r(6), r(6), r(6), r(6)]
    every = {
        "_scaled_dot_product_flash_attention_for_cpu": [[query, key, r(2, 4, 7, 6)]],
        "convolution": [
            [r(2, 4, 9), *wide, [1], [0], [1], False, [0], 1],
            [r(2, 12, 9), *wide, [1], [0], [1], False, [0], 3],
            [r(2, 12, 9), wide[0], r(8), [1], [0], [1], True, [0], 2],
        ],
        "_prelu_kernel": [[image, r(1, 6, 1, 1)]],
        "_to_copy": [[x]], "complex": [[x, x + 1]], "polar": [[x, x + 1]], "copy": [[x, r(6)]], "copy_": [[x, r(6)]],
        "fill_": [[x, 1.0]], "detach_": [[x]],
        "full_like": [[x, 2.0]], "new_full": [[x, [4, 6], 2.0]], "new_zeros": [[x, [4, 6]]], "new_ones": [[x, [4, 6]]],
        "select": [[cube, 1, 2]], "unbind": [[cube, 1]], "index_select": [[cube, 2, few]], "take": [[x, index]],
        "index": [[cube, [None, few]], [cube, [few[:2], few[:2]]], [x, [x > 0.5]], [cube, [None, None, index]]],
        "_unsafe_index": [[cube, [None, few]]],
        "index_put": [[cube, [None, few], r(3, 3, 6)], [x, [x > 0.5], r()], [x, [x > 0.5], r(1), True]],
        "gather": [[x, 1, index]], "scatter": [[x, 1, index, r(4, 3)], [x, 1, index, 0.5]],
        "scatter_add": [[x, 1, index, r(4, 3)]],
        "scatter_reduce": [[x, 1, index, r(4, 3), reduce] for reduce in ("sum", "prod", "mean", "amax", "amin")],
        "index_add": [[cube, 1, few, r(3, 3, 6)]], "index_copy": [[cube, 1, torch.tensor([0, 2]), r(3, 2, 6)]],
        "index_fill": [[cube, 1, few, 0.5]], "index_reduce": [[cube, 1, few, r(3, 3, 6), "amax"]],
        "isin": [[r.integers(9, 4, 6), r.integers(9, 5)]],
        "bucketize": [[x, r(5).sort().values]], "searchsorted": [[r(4, 5).sort(-1).values, x]],
        "slice": [[cube, 1, 1, 3], [cube, 2, 0, 6, 2]], "split": [[cube, 2, 1]], "split_with_sizes": [[cube, [1, 3], 1]],
        "unsafe_split": [[cube, 2, 1]], "cat": [[[x, r(4, 3)], 1]], "stack": [[[x, r(4, 6)], 1]],
        "constant_pad_nd": [[cube, [1, 2]], [cube, [-1, 0, 1, 1]]], "glu": [[x, 1]],
        "slice_scatter": [[cube, r(3, 2, 6), 1, 1, 3]], "select_scatter": [[cube, r(3, 6), 1, 2]],
        "mm": [[x, r(6, 5)]], "bmm": [[cube, r(3, 6, 5)]], "addmm": [[r(5), x, r(6, 5)], [r(4, 5), x, r(6, 5)]],
        "baddbmm": [[r(3, 4, 5), cube, r(3, 6, 5)]], "addbmm": [[r(4, 5), cube, r(3, 6, 5)]], "mv": [[x, r(6)]],
        "addmv": [[r(4), x, r(6)]], "addr": [[x, r(4), r(6)]], "dot": [[r(6), r(6)]], "vdot": [[r(6), r(6)]],
        "embedding": [[r(9, 6), r.integers(9, 4, 3)]],
        "_embedding_bag": [[r(9, 6), r.integers(9, 12), torch.tensor([0, 4, 8]), False, mode] for mode in (0, 1, 2)],
        "_embedding_bag_forward_only": [[r(9, 6), r.integers(9, 12), torch.tensor([0, 4, 8])]],
        "_linalg_det": [[square]], "_linalg_eigh": [[r.definite(3)]], "_linalg_slogdet": [[square]],
        "_linalg_solve_ex": [[r.definite(3), r(3, 4, 2)], [r.definite(3), r(3, 4)]], "_linalg_svd": [[square]], "cholesky": [[r.definite(3)]],
        "cholesky_inverse": [[r.definite(3)]], "linalg_cholesky_ex": [[r.definite(3)]], "linalg_eig": [[square]],
        "linalg_solve_triangular": [[square, r(3, 5, 2)]],
        "linalg_householder_product": [[r(3, 5, 4), r(3, 4)]], "linalg_inv_ex": [[r.definite(3)]], "linalg_lu": [[square]],
        "linalg_lu_factor_ex": [[square]], "linalg_matrix_exp": [[square]], "linalg_qr": [[r(3, 5, 4)]],
        "fake_quantize_per_tensor_affine_cachemask": [[x, 0.1, 0, -8, 7]],
        "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams": [[
            x, torch.tensor([0.1]), torch.tensor([0], dtype=torch.int32), torch.tensor([1]), -8, 7]],
        "fake_quantize_per_channel_affine_cachemask": [[x.float(), r(6, low=0.1).float(), torch.zeros(6), 1, -8, 7]],
        "_pack_padded_sequence": [[cube, torch.tensor([3, 3, 2, 1]), False]],
        "tril": [[square]], "triu": [[square]], "_fft_c2c": [[torch.complex(cube, cube + 1), [1], 0, True]],
        "_fft_r2c": [[cube, [1], 0, True]], "_fft_c2r": [[torch.complex(cube, cube + 1), [1], 0, 6]],
        "_cdist_forward": [[cube, r(3, 5, 6), 2.0, None]], "_euclidean_dist": [[cube, r(3, 5, 6)]],
        "diagonal": [[square, 0, 1, 2], [square, 1, 1, 2]], "diag_embed": [[x], [x, 1]], "trace": [[square[0]]],
        "_trilinear": [[x, r(5, 6, 7), r(4, 7), [1, 3], [0], [1, 2], [2, 3]]],
        "native_batch_norm": [[image, *statistics, False, 0.1, 1e-5]],
        "_native_batch_norm_legit_no_training": [[image, *statistics, 0.1, 1e-5]],
        "_batch_norm_no_update": [[image, *statistics, 0.1, 1e-5]],
        "native_layer_norm": [[x, [6], r(6), r(6), 1e-5]],
        "native_group_norm": [[image, r(6), r(6), 2, 6, 64, 3, 1e-5]], "_weight_norm_interface": [[x, r(4, 1)]],
        "avg_pool2d": [[image, [2]]], "avg_pool3d": [[r(2, 4, 4, 4, 4), [2]]], "_adaptive_avg_pool2d": [[image, [3, 3]]],
        "_adaptive_avg_pool3d": [[r(2, 4, 4, 4, 4), [2, 2, 2]]], "adaptive_max_pool2d": [[image, [3, 3]]],
        "adaptive_max_pool3d": [[r(2, 4, 4, 4, 4), [2, 2, 2]]], "max_pool2d_with_indices": [[image, [2]]],
        "max_pool3d_with_indices": [[r(2, 4, 4, 4, 4), [2]]], "max_unpool2d": [[r(2, 6, 4, 4), r.integers(64, 2, 6, 4, 4), [8, 8]]],
        "max_unpool3d": [[r(2, 4, 2, 2, 2), r.integers(64, 2, 4, 2, 2, 2), [4, 4, 4], [2, 2, 2], [0, 0, 0]]],
        "reflection_pad1d": [[cube, [1, 1]]], "reflection_pad2d": [[image, [1] * 4]], "replication_pad1d": [[cube, [1, 1]]],
        "reflection_pad3d": [[r(2, 4, 4, 4, 4), [1] * 6]], "replication_pad2d": [[image, [1] * 4]],
        "replication_pad3d": [[r(2, 4, 4, 4, 4), [1] * 6]],
        **{f"{n}1d": [[cube, [9], *rest]] for n, rest in (("upsample_nearest", []), ("_upsample_nearest_exact", []), ("upsample_linear", [False]))},
        **{f"{n}2d": [[image, [5, 9], *rest]] for n, rest in (
            ("upsample_nearest", []), ("_upsample_nearest_exact", []), ("upsample_bilinear", [False]), ("upsample_bicubic", [False]))},
        **{f"{n}3d": [[r(2, 4, 4, 4, 4), [5, 3, 9], *rest]] for n, rest in (
            ("upsample_nearest", []), ("_upsample_nearest_exact", []), ("upsample_trilinear", [False]))},
        "_upsample_bilinear2d_aa": [[image, [5, 9], False]], "_upsample_bicubic2d_aa": [[image, [5, 9], False]],
        "grid_sampler_2d": [[image, r(2, 3, 5, 2, low=-1), 0, 0, False]],
        "grid_sampler_3d": [[r(2, 4, 4, 4, 4), r(2, 3, 5, 2, 3, low=-1), 0, 0, False]],
        "im2col": [[image, [3, 3], [1, 1], [0, 0], [1, 1]]], "col2im": [[r(2, 12, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]]],
        "pixel_shuffle": [[r(2, 12, 4, 5), 2]], "pixel_unshuffle": [[image, 2]], "channel_shuffle": [[image, 3]],
        "mkldnn_rnn_layer": [],
        "_thnn_fused_lstm_cell": [list(gates)], "_thnn_fused_gru_cell": [[r(3, 15), r(3, 15), r(3, 5), r(15), r(15)]],
        "norm": [[x, 2, [1]]], "logsumexp": [[x, [1]]], "linalg_vector_norm": [[x, 2, [1]]], "count_nonzero": [[x, [1]]],
        "var_mean": [[x, [1]]], "std_mean": [[x, [1]]], "renorm": [[x, 2, 0, 1.0]], "bincount": [[r.integers(5, 9), r(9)]],
        "histc": [[x, 5]], "flip": [[cube, [1]]], "roll": [[cube, [1], [1]]], "cumsum": [[cube, 1]], "cumprod": [[cube, 1]],
        "cummax": [[cube, 1]], "cummin": [[cube, 1]], "logcumsumexp": [[cube, 1]],
        "view": [[cube, [12, 6]], [cube, [3, 2, 2, 6]]], "_unsafe_view": [[cube, [12, 6]]], "_reshape_alias": [[cube, [12, 6], [6, 1]]],
        "unsqueeze": [[x, 1]], "squeeze": [[r(4, 1, 6), 1]], "as_strided": [[x, [4, 6], [6, 1]]], "t": [[x]],
        "permute": [[cube, [2, 0, 1]]], "transpose": [[cube, 0, 2]], "swapaxes_": [[cube, 0, 2]], "expand": [[r(1, 6), [4, 6]]],
        "repeat": [[x, [2, 3]]], "view_as_complex": [[r(4, 6, 2)]], "view_as_real": [[torch.complex(x, x)]],
        "_conj": [[torch.complex(x, x)]], "_neg_view": [[x]], "unfold": [[cube, 2, 3, 1]], "linalg_cross": [[r(4, 3, 6), r(4, 3, 6)], ],
        "topk": [[x, 3]], "sort": [[x]], "max": [[x, 1], [x]], "min": [[x, 1], [x]], "argmax": [[x, 1]], "argmin": [[x, 1]],
        "median": [[x, 1]], "nanmedian": [[x, 1]], "kthvalue": [[x, 2, 1]], "mode": [[x, 1]],
        "clamp": [[x, 0.4, 0.6], [x, r(6)]], "_native_batch_norm_legit": [[image, *statistics, False, 0.1, 1e-5]],
    }  # fmt: skip
    every["mkldnn_rnn_layer"] = [[*(t.float() for t in lstm), False, [], 2, 5, 1, True, False, False, False]]
    return every


KEYWORDS = {
    "linalg_solve_triangular": {"upper": True},
    "linalg_cross": {"dim": 1},
}


@cache
def packets() -> dict[str, list[Any]]:
    """Return name -> overloads that return new results or write in place, of every ATen operator."""
    found: dict[str, list[Any]] = {}
    for qualified in sorted(torch._C._dispatch_get_all_op_names()):
        namespace, _, rest = qualified.partition("::")
        name, _, overload = rest.partition(".")
        if namespace != "aten" or name.startswith("__") or "backward" in name or overload.endswith("out"):
            continue
        packet = getattr(torch.ops.aten, name, None)
        function = getattr(packet, overload or "default", None)
        if function is not None and not any(a.is_out for a in function._schema.arguments):
            found.setdefault(name, []).append(function)
    return found


def accepted() -> list[str]:
    """Return the names of the operators of this torch that have a rule; in-place forms belong to the plain ones."""
    names = [
        name
        for name, overloads in packets().items()
        if any(rule_of(f) is not None and not is_composite(f) for f in overloads)
    ]
    return [name for name in names if not (name.endswith("_") and name[:-1] in names)]


def core() -> list[str]:
    """Return the names of torch's core set of operators."""
    return [
        name
        for name, overloads in packets().items()
        if any(torch.Tag.core in f.tags and tensor_valued(f) and not is_composite(f) for f in overloads)
    ]


def tensor_valued(function: Any) -> bool:
    return any("Tensor" in str(r.type) for r in function._schema.returns)


def generic(function: Any, r: Sampler) -> Iterator[list[Any]]:
    """Yield arguments made from an operator's schema: tensors of one shape or broadcast, plain numbers."""
    arguments = [a for a in function._schema.arguments if not a.kwarg_only]
    for low, high in ((0.2, 0.9), (1.1, 3.0)):
        for kind in ("float", "integer", "mask"):
            shapes = iter([(3, 4, 6), (3, 4, 6), (4, 1), (6,)])
            values: list[Any] = []
            for a in arguments:
                if str(a.type) in ("Tensor", "List[Tensor]"):
                    shape = next(shapes)
                    x = r(*shape, low=low, high=high)
                    x = (
                        x
                        if kind == "float"
                        else r.integers(3, *shape) + 1
                        if kind == "integer"
                        else r.mask(*shape)
                    )
                    values.append([x] if str(a.type) == "List[Tensor]" else x)
                elif a.has_default_value():
                    break
                else:
                    values.append({"int": 1, "float": 0.7, "number": 0.7, "bool": False}.get(str(a.type)))
            yield values


def calls(name: str, seed: int) -> Iterator[tuple[Any, Sample]]:
    """Yield (overload, arguments) of an operator and its in-place form."""
    r = Sampler(seed)
    table = samples(r)
    prepared = table.get(name, table.get(name.removesuffix("_copy")))
    for function in [*packets()[name], *packets().get(f"{name}_", [])]:
        if (
            rule_of(function) is None
            or is_composite(function)
            or (name in FACTORIES and prepared is None and "like" not in name)
        ):
            continue
        for args in prepared if prepared is not None else generic(function, r):
            yield function, (args, KEYWORDS.get(name, {}))


def outcomes(name: str, seed: int) -> list[Outcome]:
    """Compare an operator with what its rule says, on all arguments that its overloads take."""
    found = []
    for function, (args, kwargs) in calls(name, seed):
        try:
            function(*[a.clone() if isinstance(a, torch.Tensor) else a for a in args], **kwargs)
        except (RuntimeError, IndexError, TypeError):
            continue  # another overload's arguments
        found.append(compare(function, args, kwargs, seed))
    return found


@cache
def tested(seed: int) -> tuple[str, ...]:
    """Return the accepted operators for which some axis moved in a comparison."""
    names = [name for name in accepted() if name not in UNTESTED]
    return tuple(name for name in names if any(o.free for o in outcomes(name, seed)))


def page() -> str:
    """Return the page of operators."""
    names, proved = accepted(), set(tested(0))
    kinds: dict[str, list[str]] = {}
    for name in names:
        rule = RULES.get(name) or next(filter(None, map(rule_of, packets()[name])))
        kinds.setdefault(rule.__module__.rpartition(".")[2], []).append(name)
    lines = [
        "# Operators",
        "",
        "What tracing does with the operators of ATen, torch's own library, to which every model comes down. An operator",
        "with a rule moves the units that reach it along every axis that its definition treats alike. Any other operator",
        "pins every axis that reaches it, so the network's function is safe and fewer units move. Torch divides composite",
        "operators, such as `linear` and `einsum`, into those below.",
        "",
        "`PYTHONPATH=tests python -m helpers.operators` writes this page from the table of rules. The tests call each",
        "operator with random arguments in float64, permute its operands along every axis that the rule leaves free, and",
        "compare the results.",
        "",
        "## With a rule, tested",
        "",
        "| kind | operators |",
        "| --- | --- |",
    ]
    for kind, members in sorted(kinds.items()):
        shown = ", ".join(f"`{name}`" for name in members if name in proved)
        if shown:
            lines.append(f"| {kind} | {shown} |")
    untested = [name for name in names if name not in proved]
    lines += [
        "",
        "## With a rule, not tested here",
        "",
        "Operators of other devices, and of tensors without operands or values.",
        "",
        ", ".join(f"`{name}`" for name in untested),
        "",
        "## Without a rule: pinned",
        "",
        "Of torch's core set. They rank, count or draw, or their result has another order than their operands.",
        "",
        ", ".join(f"`{name}`" for name in core() if name not in names and not name.endswith("_")),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
