"""Picks a backend for each operation: by the tensors' device, or as asked. Registered with torch.library.

``backend=None`` takes "triton" for CUDA and HIP tensors and "cpu" for CPU tensors; "reference" is the plain
torch form, on any device. What is asked for explicitly is used or fails, it is never replaced by another.
Arguments are checked here, once, and trusted below. Every operation is a ``torch.library`` custom op with a
fake implementation, so ``torch.compile`` traces through it.

Backends are imported on first use: importing this module loads neither triton nor numba.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from fastmatch.kernels.reference.channel_affine import METHODS as AFFINE_METHODS
from fastmatch.kernels.reference.moments import CROSS, Moments, samples_by_channels
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = [
    "BACKENDS",
    "backend_of",
    "channel_affine",
    "gain",
    "moments",
    "permute_merge",
    "row_min",
    "row_softmin",
    "row_topk",
    "sinkhorn_duals",
]

BACKENDS = ("triton", "cpu", "reference")
PRECISIONS = ("ieee", "tf32", "bf16x3")
ROW_PRECISIONS = (*PRECISIONS, "bf16")

HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)

PENDING = 4096
"""Samples that small batches wait for before a cross product is added to: its memory would cost more."""

RELAXED = 0.3
"""Part of Sinkhorn's first temperature below which its steps may be over-relaxed."""

Factors = Sequence[tuple[Tensor, Tensor]]


def backend_of(*tensors: Tensor, backend: str | None = None) -> str:
    """The backend that ``tensors`` go to.

    Raises:
        ValueError: an unknown backend, tensors on several devices, or a device without a backend.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise ValueError(f"tensors: expected one device, got {sorted(map(str, devices))}")
    device = next(iter(devices))
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend: 'cpu' needs CPU tensors, got {device}")
    if backend is not None:
        return backend
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device}; backend='reference' runs anywhere")
    return "cpu" if device.type == "cpu" else "triton"


def _module(backend: str, op: str) -> ModuleType:
    return importlib.import_module(f"fastmatch.kernels.{backend}.{op}")


def _run(op: Any, function: Any, a: Sequence[Tensor], b: Sequence[Tensor], *args: Any) -> Any:
    """An operation that writes to no argument, by its custom op where something traces or differentiates it.

    The first call of a custom op imports all of torch's compiler, most of a second: plain tensors go to the
    function itself.
    """
    plain = not torch.compiler.is_compiling() and not is_in_torch_dispatch_mode()
    if plain and all(type(x) is Tensor and not x.requires_grad for x in (*a, *b)):
        return function(a, b, *args)
    return op(a, b, *args)


def _check_precision(precision: str, allowed: tuple[str, ...] = PRECISIONS) -> None:
    if precision not in allowed:
        raise ValueError(f"precision: expected one of {allowed}, got {precision!r}")


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating point tensor, got {tensor.dtype}")


# ---------------------------------------------------------------------------------------------- moments


@torch.library.custom_op("fastmatch::moments_update", mutates_args=("stats_a", "stats_b", "ab", "aa", "bb"))
def _moments_update(
    a: Tensor,
    b: Tensor | None,
    dim: int,
    shift_a: Tensor,
    shift_b: Tensor | None,
    stats_a: Tensor,
    stats_b: Tensor | None,
    ab: Tensor | None,
    aa: Tensor | None,
    bb: Tensor | None,
    precision: str,
    backend: str,
) -> None:
    _module(backend, "moments").update(a, b, dim, shift_a, shift_b, stats_a, stats_b, ab, aa, bb, precision)


@_moments_update.register_fake
def _(a, b, dim, shift_a, shift_b, stats_a, stats_b, ab, aa, bb, precision, backend) -> None:
    return None


def moments(
    a: Tensor,
    b: Tensor | None = None,
    *,
    dim: int = 1,
    cross: Iterable[str] | None = None,
    state: Moments | None = None,
    precision: str = "ieee",
    backend: str | None = None,
) -> Moments:
    """Adds a batch of one or two models' activations to ``state``, in one read, and returns it.

    Batches of few samples are copied and wait until a product over them is worth its n x n accumulator.

    Example:
        >>> state = None
        >>> for a, b in batches:
        ...     state = moments(a, b, state=state)
        >>> state.correlation(), state.mean(0), state.variance(1), state.off(0)

    Args:
        a, b: (B, C, *spatial) activations of the two models on the same samples, channels at ``dim``; any
            strides; float32, bfloat16, float16 (float64 not on "triton"). Channel counts may differ. NaN and
            inf reach the statistics of their own channel only (its row and column of a cross product).
        dim: where the channels lie.
        cross: cross products to keep, of "ab", "aa", "bb"; "ab" where there are two models. Fixed by the
            first batch.
        state: what earlier calls returned; changed in place. None starts anew.
        precision: of float32 products: "ieee", "tf32", "bf16x3". On CPU always float32.
        backend: see :func:`backend_of`.

    Returns:
        The :class:`Moments`, float64.

    Raises:
        ValueError: sample counts, channel counts or options do not fit.
        TypeError: activations that are not floating point.
    """
    _check_precision(precision)
    models = {"a": a} if b is None else {"a": a, "b": b}
    for name, x in models.items():
        _check_floating(name, x)
        if not -x.ndim <= dim < x.ndim:
            raise ValueError(f"{name}: expected a dimension {dim}, got shape {tuple(x.shape)}")
    count = a.numel() // a.shape[dim] if a.shape[dim] else 0
    if b is not None:
        dim_b = dim % b.ndim
        if a.ndim != b.ndim or any(a.shape[d] != b.shape[d] for d in range(a.ndim) if d != dim_b):
            raise ValueError(
                f"b: expected the samples of a, shape {tuple(a.shape)} but for dimension {dim}, "
                f"got {tuple(b.shape)}"
            )
    chosen = backend_of(*models.values(), backend=backend)
    if chosen == "triton":
        # Here already: a small batch may be added much later.
        for name, x in models.items():
            if x.dtype not in HALF_AND_SINGLE:
                raise TypeError(
                    f"{name}: expected one of {HALF_AND_SINGLE} on the Triton backend, got {x.dtype}"
                )
    if state is None:
        names = tuple(cross) if cross is not None else ("ab",) if b is not None else ()
        unknown = [n for n in names if n not in CROSS or (b is None and n != "aa")]
        if unknown:
            raise ValueError(
                f"cross: expected names of {CROSS if b is not None else ('aa',)}, got {unknown[0]!r}"
            )
        if count == 0:
            raise ValueError(
                f"a: expected at least one sample in the first batch, got shape {tuple(a.shape)}"
            )
        state = Moments.empty(a.detach(), None if b is None else b.detach(), dim=dim, cross=names)
    else:
        got = tuple(x.shape[dim] for x in models.values())
        expected = tuple(s.shape[0] for s in state.shifts)
        if got != expected:
            raise ValueError(f"a, b: expected {expected} channels as in state, got {got}")
    if count == 0:
        return state
    add = partial(_add_moments, precision=precision, backend=chosen)
    if state.cross and count < PENDING // 4 and not torch.compiler.is_compiling():
        rows = tuple(_own_rows(x.detach(), dim) for x in models.values())
        _leave_pending(state, rows, add)
    else:
        add(state, a.detach(), None if b is None else b.detach(), dim=dim)
    state.count += count
    return state


def _add_moments(
    state: Moments, a: Tensor, b: Tensor | None = None, *, dim: int = 1, precision: str, backend: str
) -> None:
    two = b is not None
    arguments = (
        a,
        b,
        dim,
        state.shifts[0],
        state.shifts[1] if two else None,
        state.stats[0],
        state.stats[1] if two else None,
        state.cross.get("ab"),
        state.cross.get("aa"),
        state.cross.get("bb"),
        precision,
    )
    if torch.compiler.is_compiling():
        _moments_update(*arguments, backend)
    else:  # the custom operator costs more than the sums of a small map
        _module(backend, "moments").update(*arguments)


def _leave_pending(state: Moments, rows: tuple[Tensor, ...], add: partial[None]) -> None:
    """Keeps a small batch until there are enough of its kind."""
    kind = [x.dtype for x in rows]
    if state.pending and (
        not isinstance(state.add, partial)
        or state.add.keywords != add.keywords
        or kind != [x.dtype for x in state.pending[-1]]
    ):
        state.settle()
    state.add = add
    state.pending.append(rows)
    if sum(len(part[0]) for part in state.pending) >= PENDING:
        state.settle()


def _own_rows(x: Tensor, dim: int) -> Tensor:
    """(samples, C), never sharing memory with ``x``, which a network may overwrite."""
    rows = samples_by_channels(x, dim)
    return rows.clone() if rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() else rows


# ---------------------------------------------------------------------------------------- permute_merge


@torch.library.custom_op("fastmatch::permute_merge", mutates_args=("out",))
def _permute_merge(
    weights: Sequence[Tensor],
    alphas: Sequence[float],
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    dims: Sequence[int],
    blocks: Sequence[int],
    out: Tensor,
    backend: str,
) -> None:
    _module(backend, "permute_merge").permute_merge(
        list(weights), list(alphas), list(first), list(second), list(dims), list(blocks), out
    )


@_permute_merge.register_fake
def _(weights, alphas, first, second, dims, blocks, out, backend) -> None:
    return None


def permute_merge(
    weights: Sequence[Tensor],
    alphas: Sequence[float],
    first: Sequence[Tensor | None] | None = None,
    second: Sequence[Tensor | None] | None = None,
    *,
    dims: tuple[int, int] = (0, 1),
    blocks: tuple[int, int] = (1, 1),
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``sum_k alphas[k] * weights[k]``, each weight reordered on up to two axes, in one read and one write.

    Example:
        >>> merged = permute_merge([w_a, w_b], [0.5, 0.5], [None, rows_of_b], [None, columns_of_b])
        >>> aligned = permute_merge([w_b], [1.0], [rows_of_b])

    Args:
        weights: tensors of one shape, dtype and device; float64 not on "triton". Sums run in float32 at
            least, and the result has the weights' dtype. NaN and inf follow arithmetic.
        alphas: one number a weight.
        first: per weight an index (int64) for ``dims[0]``, or None where it stays; ``new[i] = w[index[i]]``.
            Need not be a permutation, but has one entry per block.
        second: the same for ``dims[1]``.
        dims: two different axes in rising order; of the second only if an index names it.
        blocks: how many neighbouring elements move together along each: 49 for the columns behind a
            flattened 512 x 7 x 7 map.
        out: written and returned; may be one of the weights that has no index (merging in place).
        backend: see :func:`backend_of`.

    Raises:
        ValueError: shapes, indices or options that do not fit.
        TypeError: weights that are not floating point, or an index that is not int64.
    """
    if not weights:
        raise ValueError("weights: expected at least one")
    head = weights[0]
    for k, weight in enumerate(weights):
        _check_floating(f"weights[{k}]", weight)
        if weight.shape != head.shape or weight.dtype != head.dtype:
            raise ValueError(
                f"weights[{k}]: expected {tuple(head.shape)} of {head.dtype} as weights[0], "
                f"got {tuple(weight.shape)} of {weight.dtype}"
            )
    if len(alphas) != len(weights):
        raise ValueError(f"alphas: expected {len(weights)}, one a weight, got {len(alphas)}")
    lists: list[list[Tensor | None]] = []
    for name, given, dim, block in zip(("first", "second"), (first, second), dims, blocks, strict=True):
        indices: list[Tensor | None] = [None] * len(weights) if given is None else list(given)
        if len(indices) != len(weights):
            raise ValueError(f"{name}: expected {len(weights)} entries, one a weight, got {len(indices)}")
        for k, index in enumerate(indices):
            if index is not None:
                _check_index(f"{name}[{k}]", index, head.shape, dim, block)
        lists.append(indices)
    if not 0 <= dims[0] < dims[1] and any(i is not None for i in lists[1]):
        raise ValueError(f"dims: expected two axes in rising order, got {tuple(dims)}")
    chosen = backend_of(*weights, *(i for part in lists for i in part if i is not None), backend=backend)
    if out is None:
        out = torch.empty_like(head, memory_format=torch.contiguous_format)
    elif out.shape != head.shape or out.dtype != head.dtype or out.device != head.device:
        raise ValueError(f"out: expected a tensor like weights[0], got {tuple(out.shape)} of {out.dtype}")
    arguments = (list(weights), list(alphas), lists[0], lists[1], list(dims), list(blocks), out)
    if not torch.compiler.is_compiling() and _shares_memory(out, weights, lists):
        # torch.library knows no output that is also an input; under torch.compile this is never eager.
        _module(chosen, "permute_merge").permute_merge(*arguments)
        return out
    _permute_merge(*arguments, chosen)
    return out


def _shares_memory(out: Tensor, weights: Sequence[Tensor], indices: list[list[Tensor | None]]) -> bool:
    """Whether ``out`` is one of the weights, which must then stay in place."""
    found = False
    for k, weight in enumerate(weights):
        if out.numel() == 0 or weight.untyped_storage().data_ptr() != out.untyped_storage().data_ptr():
            continue
        same = weight.data_ptr() == out.data_ptr() and weight.stride() == out.stride()
        if not same or any(part[k] is not None for part in indices):
            raise ValueError(f"out: shares memory with weights[{k}], which is reordered or another view")
        found = True
    return found


def _check_index(name: str, index: Tensor, shape: torch.Size, dim: int, block: int) -> None:
    if index.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {index.dtype}")
    if not 0 <= dim < len(shape):
        raise ValueError(f"dims: expected axes of a tensor of shape {tuple(shape)}, got {dim}")
    if block < 1 or shape[dim] % block:
        raise ValueError(f"blocks: expected a divisor of axis {dim} of length {shape[dim]}, got {block}")
    expected = shape[dim] // block
    if index.shape != (expected,):
        raise ValueError(f"{name}: expected {expected} entries for axis {dim}, got {tuple(index.shape)}")
    _check_range(name, index, expected)


def _check_range(name: str, index: Tensor, size: int) -> None:
    # Kernels do not check bounds. Reading two numbers back costs a GPU far less than a wild read.
    if index.numel() and not torch.compiler.is_compiling():
        low, high = (int(x) for x in index.aminmax())
        if low < 0 or high >= size:
            raise ValueError(f"{name}: expected entries of 0..{size - 1}, got {low}..{high}")


# ---------------------------------------------------------------------------------- gain and cost_rows


def _check_factors(
    factors: Factors,
    b_index: Tensor | None,
    contraction_index: Tensor | Sequence[Tensor | None] | None,
    backend: str | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None], tuple[int, int], str]:
    """(A's, B's, contraction index of each pair, (n, m), backend), or an error that names what does not fit."""
    if not factors:
        raise ValueError("factors: expected at least one pair")
    a, b = [pair[0] for pair in factors], [pair[1] for pair in factors]
    for k, pair in enumerate(factors):
        for x in pair:
            _check_floating(f"factors[{k}]", x)
        if any(x.ndim != 2 for x in pair) or a[k].shape[1] != b[k].shape[1]:
            raise ValueError(
                f"factors[{k}]: expected (n, d) and (m, d), got {tuple(a[k].shape)} and {tuple(b[k].shape)}"
            )
        if len(a[k]) != len(a[0]) or len(b[k]) != len(b[0]):
            raise ValueError(
                f"factors[{k}]: expected {len(a[0])} and {len(b[0])} rows as factors[0], "
                f"got {len(a[k])} and {len(b[k])}"
            )
        if a[k].dtype != a[0].dtype or b[k].dtype != a[0].dtype:
            raise TypeError(f"factors[{k}]: expected {a[0].dtype}, got {a[k].dtype} and {b[k].dtype}")
    if contraction_index is None or isinstance(contraction_index, Tensor):
        contractions: list[Tensor | None] = [contraction_index] * len(factors)
    else:
        contractions = list(contraction_index)
    if len(contractions) != len(factors):
        raise ValueError(f"contraction_index: expected {len(factors)}, one a pair, got {len(contractions)}")
    for k, index in enumerate(contractions):
        if index is not None:
            depth = b[k].shape[1]
            _check_gather(f"contraction_index[{k}]", index, depth, depth)
    m = len(b[0])
    if b_index is not None:
        _check_gather("b_index", b_index, None, m)
        m = len(b_index)
    given = [x for x in (b_index, *contractions) if x is not None]
    return a, b, contractions, (len(a[0]), m), backend_of(*a, *b, *given, backend=backend)


def _check_gather(name: str, index: Tensor, length: int | None, size: int) -> None:
    if index.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {index.dtype}")
    if index.ndim != 1 or (length is not None and len(index) != length):
        raise ValueError(f"{name}: expected {length or 'a vector of'} entries, got {tuple(index.shape)}")
    _check_range(name, index, size)


@torch.library.custom_op("fastmatch::gain", mutates_args=("out",))
def _gain(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    b_index: Tensor | None,
    contraction_index: Sequence[Tensor | None],
    out: Tensor,
    accumulate: bool,
    precision: str,
    backend: str,
) -> None:
    _module(backend, "gain").gain(
        list(a), list(b), b_index, list(contraction_index), out, accumulate, precision
    )


@_gain.register_fake
def _(a, b, b_index, contraction_index, out, accumulate, precision, backend) -> None:
    return None


def gain(
    factors: Factors,
    *,
    b_index: Tensor | None = None,
    contraction_index: Tensor | Sequence[Tensor | None] | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    precision: str = "ieee",
    backend: str | None = None,
) -> Tensor:
    """The gain matrix ``G = sum_k A_k @ B_k[b_index][:, contraction_index[k]].T``, no permuted copy made.

    Example:
        >>> g = gain([(w_a, w_b), (bias_a[:, None], bias_b[:, None])], contraction_index=[inputs, None])
        >>> gain([rank_update(w_a, w_b, inputs, new_inputs)], out=g, accumulate=True)

    Args:
        factors: pairs (n, d_k), (m, d_k) of one dtype; float64 not on "triton". Any strides.
        b_index: (m',) int64, which of B's rows, in which order.
        contraction_index: (d_k,) int64 for every pair, or one per pair or None: the order of B's columns.
        out: (n, m') float32 (float64 for float64 factors), written and returned.
        accumulate: add to what ``out`` holds: a rank-r update costs ``2 n m r`` operations.
        precision: of float32 products on "triton": "ieee", "tf32", "bf16x3". Always float32 on "cpu".
        backend: see :func:`backend_of`.

    Raises:
        ValueError, TypeError: shapes, types, indices or options that do not fit.
    """
    _check_precision(precision)
    a, b, contractions, shape, chosen = _check_factors(factors, b_index, contraction_index, backend)
    dtype = torch.float64 if a[0].dtype == torch.float64 else torch.float32
    if accumulate and out is None:
        raise ValueError("out: expected the gain to add to, got None")
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=a[0].device)
    elif out.shape != shape or out.dtype != dtype or out.device != a[0].device:
        raise ValueError(
            f"out: expected {shape} of {dtype} on {a[0].device}, "
            f"got {tuple(out.shape)} of {out.dtype} on {out.device}"
        )
    _gain(a, b, b_index, contractions, out, accumulate, precision, chosen)
    return out


def _row_topk(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    v: Tensor,
    k: int,
    b_index: Tensor | None,
    contraction_index: Sequence[Tensor | None],
    precision: str,
    sizes: Tensor | None,
    tile: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _module(backend, "cost_rows").row_topk(
        list(zip(a, b, strict=True)),
        v,
        k,
        b_index=b_index,
        contraction_index=list(contraction_index),
        precision=precision,
        sizes=sizes,
        tile=tuple(tile),
    )


_row_topk_op = torch.library.custom_op("fastmatch::row_topk", mutates_args=())(_row_topk)


@_row_topk_op.register_fake
def _(
    a, b, v, k, b_index, contraction_index, precision, sizes, tile, backend
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if a[0].dtype == torch.float64 else torch.float32
    n = a[0].shape[0]
    return (
        a[0].new_empty(n, k, dtype=torch.int64),
        a[0].new_empty(n, k, dtype=dtype),
        a[0].new_empty(n, dtype=dtype),
    )


def _row_min(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    v: Tensor,
    b_index: Tensor | None,
    contraction_index: Sequence[Tensor | None],
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _module(backend, "cost_rows").row_min(
        list(zip(a, b, strict=True)),
        v,
        b_index=b_index,
        contraction_index=list(contraction_index),
        precision=precision,
    )


_row_min_op = torch.library.custom_op("fastmatch::row_min", mutates_args=())(_row_min)


@_row_min_op.register_fake
def _(a, b, v, b_index, contraction_index, precision, backend) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if a[0].dtype == torch.float64 else torch.float32
    n = a[0].shape[0]
    return a[0].new_empty(n, dtype=dtype), a[0].new_empty(n, dtype=torch.int64)


def _check_duals(v: Tensor, m: int, device: torch.device) -> None:
    if v.shape != (m,) or not v.is_floating_point() or v.device != device:
        raise ValueError(
            f"v: expected {m} floating point numbers on {device}, got {tuple(v.shape)} of {v.dtype} on {v.device}"
        )


def _check_screening(precision: str, dtype: torch.dtype, backend: str) -> None:
    if precision != "bf16" or backend == "reference":
        return
    if backend != "cpu":
        raise ValueError(f"precision: 'bf16' is of backend 'cpu', got {backend!r}, which takes {PRECISIONS}")
    if dtype == torch.float64:
        raise ValueError("precision: 'bf16' takes factors of at most float32, got torch.float64")


def row_topk(
    factors: Factors,
    v: Tensor,
    k: int,
    *,
    b_index: Tensor | None = None,
    contraction_index: Tensor | Sequence[Tensor | None] | None = None,
    precision: str = "ieee",
    sizes: Tensor | None = None,
    tile: tuple[int, int] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per row k columns of smallest ``c_ij - v_j``, ``c = -gain(factors)``, and a bound on all the others.

    The n x m matrix is never stored. Entries not above the bound are the row's smallest, in order; what is
    outside the list is at least the bound, rounding included.

    Args:
        factors, b_index, contraction_index, backend: as for :func:`gain`.
        precision: as for :func:`gain`, or "bf16" for factors up to float32 on "cpu": one product of factors rounded to
            bfloat16, each entry lowered by a bound on what the rounding took. Costs and minima are then at most the
            true ones (but for float32's rounding), the bound as valid as ever. For processors with bfloat16 matrix
            units; slow elsewhere.
        v: (m,) column duals; -inf keeps a column out of every list.
        k: how many, at least 0.
        sizes: (n,) float64, ``sum_k |a_ik| max_j |b_jk|`` or more, where the caller knows it: the bound needs it, and
            computing it reads the factors once more. "bf16" has no use for it.
        tile: rows and columns computed at a time on "cpu"; the other backends have their own.

    Returns:
        (indices (n, k) int64, costs c (n, k), bound (n,)); -1 and +inf where a row has fewer than k entries.

    Raises:
        ValueError, TypeError: shapes, types, indices or options that do not fit.
    """
    _check_precision(precision, ROW_PRECISIONS)
    if k < 0:
        raise ValueError(f"k: expected at least 0, got {k}")
    a, b, contractions, (n, m), chosen = _check_factors(factors, b_index, contraction_index, backend)
    _check_screening(precision, a[0].dtype, chosen)
    _check_duals(v, m, a[0].device)
    if sizes is not None and (
        sizes.shape != (n,) or sizes.dtype != torch.float64 or sizes.device != v.device
    ):
        raise ValueError(
            f"sizes: expected {n} float64 numbers on {v.device}, "
            f"got {tuple(sizes.shape)} of {sizes.dtype} on {sizes.device}"
        )
    if tile is not None and (len(tile) != 2 or min(tile) < 1):
        raise ValueError(f"tile: expected (rows, columns), both at least 1, got {tile}")
    return _run(
        _row_topk_op, _row_topk, a, b, v, k, b_index, contractions, precision, sizes, tile or (), chosen
    )


def row_min(
    factors: Factors,
    v: Tensor,
    *,
    b_index: Tensor | None = None,
    contraction_index: Tensor | Sequence[Tensor | None] | None = None,
    precision: str = "ieee",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Per row the smallest ``c_ij - v_j`` (n,) and its column (n,) int64; arguments as :func:`row_topk`."""
    _check_precision(precision, ROW_PRECISIONS)
    a, b, contractions, (_, m), chosen = _check_factors(factors, b_index, contraction_index, backend)
    _check_screening(precision, a[0].dtype, chosen)
    _check_duals(v, m, a[0].device)
    return _run(_row_min_op, _row_min, a, b, v, b_index, contractions, precision, chosen)


def _row_softmin(
    a: Sequence[Tensor], b: Sequence[Tensor], v: Tensor, temperature: float, precision: str, backend: str
) -> Tensor:
    return _module(backend, "row_softmin").row_softmin(
        list(zip(a, b, strict=True)), v, temperature, precision=precision
    )


_row_softmin_op = torch.library.custom_op("fastmatch::row_softmin", mutates_args=())(_row_softmin)


@_row_softmin_op.register_fake
def _(a, b, v, temperature, precision, backend) -> Tensor:
    dtype = torch.float64 if a[0].dtype == torch.float64 else torch.float32
    return a[0].new_empty(a[0].shape[0], dtype=dtype)


def row_softmin(
    factors: Factors, v: Tensor, temperature: float, *, precision: str = "ieee", backend: str | None = None
) -> Tensor:
    """Per row the soft minimum ``-t log sum_j exp((v_j - c_ij) / t)``, ``c = -gain(factors)``: (n,).

    Never above the row's minimum, and within ``t log m`` of it. The n x n matrix is never stored.

    Args:
        factors, precision, backend: as for :func:`gain`. Entries of NaN or +inf are left out.
        v: (m,) column duals.
        temperature: t, in the unit of the costs, above 0.

    Raises:
        ValueError, TypeError: shapes, types or options that do not fit.
    """
    _check_precision(precision)
    a, b, _, (_, m), chosen = _check_factors(factors, None, None, backend)
    _check_duals(v, m, a[0].device)
    _check_temperature("temperature", temperature)
    return _run(_row_softmin_op, _row_softmin, a, b, v, temperature, precision, chosen)


def _check_temperature(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def sinkhorn_duals(
    factors: Factors,
    temperatures: Sequence[float],
    *,
    v: Tensor | None = None,
    relaxation: float = 1.0,
    precision: str = "tf32",
    backend: str | None = None,
) -> Tensor:
    """Column duals near an assignment's, by Sinkhorn's iteration (Cuturi 2013) in the log domain at falling temperatures.

    At each temperature ``u_i = softmin_j (c_ij - v_j)``, then ``v_j = softmin_i (c_ij - u_i)``: two products. They are to
    start an exact solver from, which proves its result without them; so TF32 will do where there is one.

    Example:
        >>> v = sinkhorn_duals([(w_a, w_b)], [1.0, 0.3, 0.1])

    Args:
        factors, precision, backend: as for :func:`gain`; as many rows as columns.
        temperatures: in the unit of the costs, above 0; see ``bench/results/duals.md``.
        v: (n,) where to start; zeros by default.
        relaxation: below 2; at temperatures under RELAXED of the first, each half step goes so many times as far. About
            1.8 saves half of the steps and more (Thibault et al. 2017); at high temperatures it diverges.

    Returns:
        (n,) float32 (float64 for float64 factors).

    Raises:
        ValueError, TypeError: shapes, types or options that do not fit.
    """
    for k, temperature in enumerate(temperatures):
        _check_temperature(f"temperatures[{k}]", temperature)
    if not 0 < relaxation < 2:
        raise ValueError(f"relaxation: expected a number between 0 and 2, got {relaxation}")
    a, b, _, (n, m), _ = _check_factors(factors, None, None, backend)
    if n != m:
        raise ValueError(f"factors: expected as many rows as columns, got {n} and {m}")
    dtype = torch.float64 if a[0].dtype == torch.float64 else torch.float32
    duals = torch.zeros(m, device=b[0].device) if v is None else v
    _check_duals(duals, m, a[0].device)
    duals = duals.to(dtype)
    turned = list(zip(b, a, strict=True))
    rows = None
    for temperature in temperatures:
        reach = relaxation if temperature < RELAXED * temperatures[0] else 1.0
        fresh = row_softmin(factors, duals, temperature, precision=precision, backend=backend)
        rows = fresh if rows is None else torch.lerp(rows, fresh, reach)
        fresh = row_softmin(turned, rows, temperature, precision=precision, backend=backend)
        duals = torch.lerp(duals, fresh, reach)
    return duals


# --------------------------------------------------------------------------------------- channel_affine


@torch.library.custom_op("fastmatch::channel_affine", mutates_args=("out",))
def _channel_affine(
    x: Tensor,
    dim: int,
    goal_mean: Tensor,
    goal_std: Tensor,
    method: str,
    eps: float,
    out: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _module(backend, "channel_affine").channel_affine(x, dim, goal_mean, goal_std, method, eps, out)


@_channel_affine.register_fake
def _(x, dim, goal_mean, goal_std, method, eps, out, backend) -> tuple[Tensor, Tensor]:
    return torch.empty_like(goal_mean), torch.empty_like(goal_mean)


def channel_affine(
    x: Tensor,
    goal_mean: Tensor,
    goal_std: Tensor,
    method: str = "repair",
    *,
    dim: int = 1,
    eps: float = 1e-5,
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's output brought to its goals by its own statistics, which come back too.

    With mean mu and population variance v of each channel and ``g = goal_std / sqrt(v + eps)``:
    repair ``(x - mu) g + goal_mean``, rescale ``x g``, reshift ``x - mu + goal_mean``.

    Example:
        >>> z, mean, variance = channel_affine(z, goal_mean, goal_std, "repair")

    Args:
        x: (B, C, *spatial) with channels at ``dim``, at least one sample; float64 not on "triton". Any strides.
            NaN and inf stay in their channel.
        goal_mean, goal_std: (C,), float64 (others are converted).
        method: "repair", "rescale", "reshift".
        dim: where the channels lie.
        eps: added to the variance.
        out: like ``x``, written and returned; may be ``x``.
        backend: see :func:`backend_of`.

    Returns:
        (out, mean (C,) float64, population variance (C,) float64).

    Raises:
        ValueError, TypeError: shapes, types or options that do not fit.
    """
    _check_floating("x", x)
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"x: expected a dimension {dim}, got shape {tuple(x.shape)}")
    if method not in AFFINE_METHODS:
        raise ValueError(f"method: expected one of {AFFINE_METHODS}, got {method!r}")
    if x.numel() == 0:
        raise ValueError(f"x: expected at least one sample and channel, got shape {tuple(x.shape)}")
    for name, goal in (("goal_mean", goal_mean), ("goal_std", goal_std)):
        if goal.shape != (x.shape[dim],):
            raise ValueError(f"{name}: expected {x.shape[dim]} numbers, got shape {tuple(goal.shape)}")
    chosen = backend_of(x, goal_mean, goal_std, backend=backend)
    if out is None:
        out = torch.empty_like(x)
    elif out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(f"out: expected a tensor like x, got {tuple(out.shape)} of {out.dtype}")
    goals = (goal_mean.detach().double(), goal_std.detach().double())
    arguments = (x.detach(), dim, *goals, method, eps, out)
    if (
        not torch.compiler.is_compiling()
        and x.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
    ):
        # torch.library knows no output that is also an input; under torch.compile this is never eager.
        mean, variance = _module(chosen, "channel_affine").channel_affine(*arguments)
    else:
        mean, variance = _channel_affine(*arguments, chosen)
    return out, mean, variance
