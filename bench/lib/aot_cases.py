"""Every configuration of the Triton kernels that the launchers may pick, as the types and constants of a launch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

from fastmatch_kernels._triton import packing
from fastmatch_kernels._triton.product import GROUP
from fastmatch_kernels._triton.tiles import PRECISIONS, Kind, Target, Tiles, dot_precision, matmul_tiles
from fastmatch_kernels.channel_affine import triton as channel_affine
from fastmatch_kernels.gain import triton as gain
from fastmatch_kernels.inner_product import triton as inner_product
from fastmatch_kernels.moments import triton as moments
from fastmatch_kernels.permute_merge import triton as permute_merge
from fastmatch_kernels.row_softmin import triton as row_softmin
from fastmatch_kernels.row_topk import entries_triton, stored_triton
from fastmatch_kernels.row_topk import triton as cost_rows

__all__ = ["DIVISIBLE", "Case", "cases"]

DIVISIBLE = ":16"
"""Suffix of a type that is declared a multiple of 16, as Triton finds at launch for pointers and most strides."""


@dataclass(frozen=True)
class Case:
    """One kernel with the types of its arguments and its constants.

    Attributes:
        op, variant: names for the table.
        precision: of the products, or "-".
        arguments: name -> type ("*fp32:16", "i32", ...), a constant, or a tuple of these.
        tiles: what the launcher passes on.
        matrix: whether the matrix units are expected to be used.
        wide: whether 16-byte loads are expected.
    """

    op: str
    variant: str
    precision: str
    kernel: Any
    arguments: dict[str, Any]
    tiles: Tiles
    matrix: bool
    wide: bool = True

    def uses(self, *pointers: str) -> bool:
        """Whether an argument is a pointer to one of these types ("*bf16", ...)."""
        return any(isinstance(v, str) and v.startswith(pointers) for v in _flat(self.arguments.values()))


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple):
            yield from _flat(value)
        else:
            yield value


# Factors: gain, cost_rows and row_softmin


def _factor_arguments(precision: str) -> dict[str, Any]:
    """``factors`` of the products, as ``product.factor_arguments`` returns them."""
    if precision == "ieee":
        return {"factors": ("*fp32:16", None, "*fp32:16", None, *((1, "i32:16"),) * 2, "i32:16", None, None)}
    dtype, low = ("*bf16:16", None) if precision == "half" else ("*fp16:16", "*fp16:16")
    scale = None if precision == "half" else "*fp32:16"
    low = low if precision == "fp16x3" else None
    return {"factors": (dtype, low, dtype, low, *(("i32:16", 1),) * 2, "i32:16", scale, scale)}


def _matmul_cases(target: Target) -> Iterator[Case]:
    for precision in (*PRECISIONS, "half"):
        matrix = precision != "ieee" or target.backend == "hip"
        shapes = itertools.product((64, 4096), get_args(Kind))
        for tiles, kind in dict.fromkeys(
            (matmul_tiles(n, n, precision, target, kind), kind) for n, kind in shapes
        ):
            arguments = {
                **_factor_arguments(precision),
                "n": "i32:16",
                "m": "i32:16",
                "channels_a": "i32:16",
                "channels_b": "i32:16",
                "PRECISION": dot_precision(precision, target),
                "GROUP": GROUP,
                "BLOCK_M": tiles.rows,
                "BLOCK_N": tiles.columns,
                "BLOCK_K": tiles.depth,
            }
            for op, variant, kernel, own in _matmul_kernels(precision, kind):
                kept = {k: v for k, v in arguments.items() if k in kernel.arg_names}
                yield Case(
                    op, variant, precision, kernel, {**kept, **own}, tiles, matrix, precision != "ieee"
                )


def _matmul_kernels(precision: str, kind: Kind) -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """(operation, variant, kernel, the arguments that only it has) of everything that reads a product of factors."""
    if kind == "written":
        for accumulate in (False, True):
            own = {"out_ptr": "*fp32:16", "out_stride": "i32:16", "ACCUMULATE": accumulate}
            yield "gain", "added" if accumulate else "plain", gain._gain_kernel, own
    elif kind == "reduced":
        own = dict.fromkeys(("v_ptr", "value_ptr", "cutoff_ptr"), "*fp32:16")
        own |= {"column_ptr": "*i32:16", "few": "i32", "EXACT": precision != "fp16"}
        yield "cost_rows", "plain", cost_rows._candidates_kernel, own
        own = {"v_ptr": "*fp32:16", "part_ptr": "*fp32:16", "temperature": "fp32"}
        yield "row_softmin", "plain", row_softmin._softmin_kernel, own
    elif precision != "half":
        own = {"cross_ptr": "*fp64:16", "chunk": moments.CHUNK}
        yield "moments, packed", "plain", moments._packed_cross_kernel, own


def _pack_cases() -> Iterator[Case]:
    for dtype, along, gathered in itertools.product(("fp32", "bf16"), ("columns", "rows"), (False, True)):
        scaled = dtype == "fp32"
        tiles = packing.pack_tiles(1 if along == "columns" else 16)
        index = "*i64:16" if gathered else None
        out = "*fp16:16" if scaled else f"*{dtype}:16"
        yield Case(
            "packing",
            f"{dtype}, contiguous {along}{', gathered' if gathered else ''}",
            "-",
            packing._pack_kernel,
            {
                "x_ptr": f"*{dtype}:16",
                "row_ptr": index,
                "column_ptr": index,
                "largest_ptr": "*fp32:16" if scaled else None,
                "high_ptr": out,
                "low_ptr": out if scaled else None,
                "scale_ptr": "*fp32:16" if scaled else None,
                "rows": "i32:16",
                "columns": "i32:16",
                "width": "i32:16",
                "row_stride": "i32:16" if along == "columns" else 1,
                "column_stride": 1 if along == "columns" else "i32:16",
                "out_stride": "i32:16",
                "BLOCK_R": tiles.rows,
                "BLOCK_C": tiles.columns,
            },
            tiles,
            False,
            not gathered and (scaled or along == "columns"),
        )


# Activations: moments and channel_affine

LAYOUTS: dict[str, dict[str, Any]] = {
    "contiguous map": {
        "sizes": (1, "i32:16", "i32:16"),
        "strides": (0, "i32:16", 1),
        "stride_c": "i32:16",
        "dims": 2,
    },
    "channels last": {"sizes": (1, 1, "i32:16"), "strides": (0, 0, "i32:16"), "stride_c": 1, "dims": 1},
}
UNALIGNED_LAYOUTS = {
    **LAYOUTS,
    # A part of a map, read at intervals: as many sample dimensions as the kernels follow, no stride known.
    "any strides": {
        "sizes": ("i32", "i32", "i32"),
        "strides": ("i32", "i32", "i32"),
        "stride_c": "i32",
        "dims": 3,
    },
}


def _cross_cases(target: Target, aligned: bool, layouts: dict[str, dict[str, Any]]) -> Iterator[Case]:
    for precision, sizes in moments.NARROW[target.name].items():
        for tiles, (layout_name, layout), dtype, statistics in itertools.product(
            (sizes[0 if aligned else 1],), layouts.items(), ("fp32", "bf16"), (True, False)
        ):
            yield Case(
                "moments" if statistics else "moments, one model",
                f"{layout_name}, {dtype}",
                precision,
                moments._cross_kernel,
                {
                    "a_ptr": f"*{dtype}:16",
                    "b_ptr": f"*{dtype}:16",
                    "a_sizes": layout["sizes"],
                    "a_strides": layout["strides"],
                    "a_stride_c": layout["stride_c"],
                    "b_sizes": layout["sizes"],
                    "b_strides": layout["strides"],
                    "b_stride_c": layout["stride_c"],
                    "shift_a_ptr": "*fp32:16",
                    "shift_b_ptr": "*fp32:16",
                    "stats_a_ptr": "*fp64:16",
                    "stats_b_ptr": "*fp64:16",
                    "cross_ptr": "*fp64:16",
                    "channels_a": "i32:16",
                    "channels_b": "i32:16",
                    "samples": "i32:16",
                    "first": "i32:16",
                    "split_stride": "i32",
                    "STATS": statistics,
                    "DIMS_A": layout["dims"],
                    "DIMS_B": layout["dims"],
                    "PRECISION": dot_precision(precision, target),
                    "CHUNK": moments.CHUNK,
                    "BLOCK_A": tiles.rows,
                    "BLOCK_B": tiles.columns,
                    "BLOCK_T": tiles.depth,
                },
                tiles,
                precision != "ieee" or target.backend == "hip",
                # A tile of half-precision numbers gives each thread of a shallow tile less than 16 bytes.
                dtype == "fp32" or tiles.depth >= 32,
            )


def _channels(dtype: str, layout: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """(what the passes over one model's activations share, a stride of the channels as their tiles are picked by)."""
    return {
        "x_ptr": f"*{dtype}:16",
        "sizes": layout["sizes"],
        "strides": layout["strides"],
        "stride_c": layout["stride_c"],
        "channels": "i32:16",
        "samples": "i32:16",
        "DIMS": layout["dims"],
    }, 1 if layout["stride_c"] == 1 else 16


def _stats_cases(target: Target, layouts: dict[str, dict[str, Any]], aligned: bool) -> Iterator[Case]:
    for dtype, (variant, layout) in itertools.product(("fp32", "bf16"), layouts.items()):
        shape, stride_c = _channels(dtype, layout)
        for largest in (None, "*fp32:16"):
            tiles = moments.stats_tiles(stride_c, target, aligned=aligned)
            yield Case(
                "moments, no product" if largest is None else "moments, before packing",
                f"{variant}, {dtype}",
                "-",
                moments._stats_kernel,
                {
                    **shape,
                    "shift_ptr": "*fp32:16",
                    "stats_ptr": "*fp64:16",
                    "largest_ptr": largest,
                    "CHUNK": moments.CHUNK,
                    "BLOCK_C": tiles.rows,
                    "BLOCK_T": tiles.depth,
                },
                tiles,
                False,
            )
        for scaled in (True, False):
            tiles = moments.pack_tiles(stride_c, scaled=scaled)
            out, scale = ("*fp16:16", "*fp32:16") if scaled else ("*fp32:16", None)
            yield Case(
                "moments, packing",
                f"{variant}, {dtype}, {'scaled' if scaled else 'as it is'}",
                "-",
                moments._pack_kernel,
                {
                    **shape,
                    "shift_ptr": "*fp32:16",
                    "largest_ptr": scale,
                    "high_ptr": out,
                    "low_ptr": out if scaled else None,
                    "scale_ptr": scale,
                    "out_strides": ("i32:16", 1) if scaled else (1, "i32:16"),
                    "first": "i32:16",
                    "width": "i32:16",
                    "BLOCK_C": tiles.rows,
                    "BLOCK_T": tiles.depth,
                },
                tiles,
                False,
                dtype == "fp32",
            )


def _affine_cases(layouts: dict[str, dict[str, Any]], aligned: bool) -> Iterator[Case]:
    for dtype, (variant, layout), samples in itertools.product(
        ("fp32", "bf16"), layouts.items(), (256, 8192, 1 << 20)
    ):
        shape, stride_c = _channels(dtype, layout)
        tiles, held = channel_affine.channel_tiles(samples, stride_c, aligned=aligned)
        if samples == 8192 and not held:
            continue  # as 2^20 samples
        affine = {
            **shape,
            "out_ptr": f"*{dtype}:16",
            "out_sizes": layout["sizes"],
            "out_strides": layout["strides"],
            "out_stride_c": layout["stride_c"],
            "goal_mean_ptr": "*fp32:16",
            "goal_std_ptr": "*fp32:16",
            "mean_ptr": "*fp64:16",
            "variance_ptr": "*fp64:16",
            "eps": "fp32",
            "OUT_DIMS": layout["dims"],
            "HELD": held,
            "BLOCK_C": tiles.rows,
            "BLOCK_T": tiles.depth,
        }
        for method in range(3):
            yield Case(
                "channel_affine",
                f"{variant}, {dtype}, {samples} samples, method {method}",
                "-",
                channel_affine._channel_affine_kernel,
                {**affine, "METHOD": method},
                tiles,
                False,
                samples != 256 or stride_c == 1,
            )
        if not held:
            shared = {k: v for k, v in affine.items() if k != "HELD"}
            yield Case(
                "channel_affine, map",
                f"{variant}, {dtype}",
                "-",
                channel_affine._channel_map_kernel,
                {**shared, "METHOD": 0, "shift_ptr": "*fp32:16", "stats_ptr": "*fp64:16"},
                tiles,
                False,
            )


# Weights and candidates: permute_merge and the selection of cost_rows


def _merge_cases(target: Target, aligned: bool) -> Iterator[Case]:
    two = (None, "*i64:16")
    variants = (
        ("average", 8192, (None, None), (None, None), 1),
        ("rows", 8192, two, (None, None), 1),
        ("rows and columns", 8192, two, two, 1),
        ("one weight, rows and columns", 8192, ("*i64:16",), ("*i64:16",), 1),
        # Axes apart and channels of several elements, as convolutions have them.
        ("rows and columns in blocks, runs of 64", 64, two, two, "i32"),
        ("rows and columns, long runs", 32768, two, two, 1),
    )
    for dtype, (variant, length, first, second, block) in itertools.product(("fp32", "bf16"), variants):
        count = len(first)
        gathered = second[-1] is not None
        tiles, steps, whole = permute_merge.run_tiles(length, gathered, target, aligned=aligned)
        yield Case(
            "permute_merge",
            f"{variant}, {dtype}",
            "-",
            permute_merge._permute_merge_kernel,
            {
                "weight_ptrs": (f"*{dtype}:16",) * count,
                "alphas": ("fp32",) * count,
                "first_ptrs": first,
                "second_ptrs": second,
                "out_ptr": f"*{dtype}:16",
                "layout": ("i32:16", "i32:16", block, "i32:16", block, block),
                "K": count,
                "BLOCK_R": tiles.rows,
                "BLOCK_L": tiles.columns,
                "STEPS": steps,
                "WHOLE": whole,
            },
            tiles,
            False,
        )


def _selection_cases() -> Iterator[Case]:
    for candidates in (64, 2048, cost_rows.MAX_CANDIDATES):
        tiles = cost_rows.select_tiles(candidates)
        yield Case(
            "cost_rows, selection",
            f"{candidates} candidates",
            "-",
            cost_rows._select_kernel,
            {
                "value_ptr": "*fp32:16",
                "column_ptr": "*i32:16",
                "cutoff_ptr": "*fp32:16",
                "v_ptr": "*fp32:16",
                "index_ptr": "*i64:16",
                "best_ptr": "*fp32:16",
                "cost_ptr": "*fp32:16",
                "bound_ptr": "*fp32:16",
                "n": "i32",
                "k": "i32",
                "candidates": "i32:16",
                "tiles_n": "i32:16",
                "BLOCK_R": tiles.rows,
                "BLOCK_C": tiles.columns,
                "BLOCK_T": max(tiles.columns // 4, 2),
            },
            tiles,
            False,
            candidates > 64,
        )


def _stored_cases() -> Iterator[Case]:
    tiles = stored_triton.TILES
    for dtype, stride in itertools.product(("fp32", "bf16"), (1, "i32:16")):
        yield Case(
            "cost_rows, stored",
            f"{dtype}, columns {'apart' if stride != 1 else 'contiguous'}",
            "-",
            stored_triton._stored_candidates_kernel,
            {
                "c_ptr": f"*{dtype}:16",
                "row_ptr": "*i64:16",
                "v_ptr": "*fp32:16",
                "value_ptr": "*fp32:16",
                "column_ptr": "*i32:16",
                "cutoff_ptr": "*fp32:16",
                "n": "i32",
                "m": "i32:16",
                "few": "i32",
                "row_stride": "i32:16" if stride == 1 else 1,
                "column_stride": stride,
                "sign": "fp32",
                "BLOCK_M": tiles.rows,
                "BLOCK_N": tiles.columns,
            },
            tiles,
            False,
            stride == 1,
        )


def _entry_cases() -> Iterator[Case]:
    for dtype, (position, metric) in itertools.product(
        ("fp32", "bf16", "fp64"), enumerate(entries_triton.METRICS)
    ):
        tiles = entries_triton.entry_tiles(4096)
        yield Case(
            "cost_rows, entries",
            f"{metric}, {dtype}",
            "-",
            entries_triton._entries_kernel,
            {
                "a_ptr": f"*{dtype}:16",
                "b_ptr": f"*{dtype}:16",
                "row_ptr": "*i64:16",
                "item_ptr": "*i64:16",
                "out_ptr": "*fp64:16",
                "count": "i32:16",
                "depth": "i32:16",
                "a_stride": "i32:16",
                "b_stride": "i32:16",
                "METRIC": position,
                "ADD": True,
                "BLOCK_E": tiles.rows,
                "BLOCK_D": tiles.depth,
            },
            tiles,
            False,
            False,
        )


def _inner_cases() -> Iterator[Case]:
    for dtype, length, change in itertools.product(("fp32", "bf16", "fp64"), (1, 4096), (True, False)):
        tiles = inner_product.inner_tiles(length)
        index = "*i64:16"
        yield Case(
            "inner_product",
            f"runs of {length}, {dtype}, {'change' if change else 'one'}",
            "-",
            inner_product._inner_kernel,
            {
                "a_ptr": f"*{dtype}:16",
                "b_ptr": f"*{dtype}:16",
                "row_ptr": index,
                "now_row_ptr": index,
                "then_row_ptr": index,
                "column_ptr": None,
                "now_column_ptr": index,
                "then_column_ptr": index,
                "out_ptr": "*fp64:16",
                "shape": ("i32",) * 7,
                "CHANGE": change,
                "BLOCK_R": tiles.rows,
                "BLOCK_L": tiles.columns,
            },
            tiles,
            False,
            False,
        )


# All of them


def _known(target: Target, aligned: bool) -> Iterator[Case]:
    """Every case with the tiles for data that is aligned or not, its arguments as for aligned data."""
    layouts = LAYOUTS if aligned else UNALIGNED_LAYOUTS
    if aligned:
        yield from _matmul_cases(target)
    yield from _pack_cases()
    yield from _cross_cases(target, aligned, layouts)
    yield from _stats_cases(target, layouts, aligned)
    yield from _affine_cases(layouts, aligned)
    yield from _merge_cases(target, aligned)
    yield from _selection_cases()
    yield from _stored_cases()
    yield from _entry_cases()
    yield from _inner_cases()


def cases(target: Target) -> list[Case]:
    """Every configuration that the launchers may pick on ``target``: aligned data, and strides and pointers of any kind."""
    aligned = list(_known(target, aligned=True))
    float16 = [_float16(case) for case in aligned if case.uses("*bf16")]
    return [*aligned, *float16, *(_unaligned(case) for case in _known(target, aligned=False))]


def _retyped(value: Any, old: str, new: str) -> Any:
    """``value`` with a part of its type names replaced, inside tuples too."""
    if isinstance(value, tuple):
        return tuple(_retyped(v, old, new) for v in value)
    return value.replace(old, new) if isinstance(value, str) else value


def _float16(case: Case) -> Case:
    arguments = {k: _retyped(v, "*bf16", "*fp16") for k, v in case.arguments.items()}
    named = case.variant.replace("bf16", "fp16")
    return replace(
        case, arguments=arguments, variant=named if named != case.variant else f"{case.variant}, fp16"
    )


def _unaligned(case: Case) -> Case:
    """The same for pointers, sizes and strides of which nothing is known: right, with narrow loads."""
    arguments = {k: _retyped(v, DIVISIBLE, "") for k, v in case.arguments.items()}
    return replace(case, arguments=arguments, variant=f"{case.variant}, unaligned", wide=False)
