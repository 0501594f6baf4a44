"""Inner products of a tensor with a reordered one on CPU: the second is read through its indices, without a copy.

Products of float32 are exact in float64, so the error is that of the float64 sum alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels._numba.half import HALF, decode
from fastmatch_kernels._numba.parallel import over_rows

__all__ = ["inner", "row_products", "row_squares", "squares_and_inner"]

GATHER_COST = 4
"""Entries read in order in the time of one that is gathered."""

TOGETHER = 8
"""Stored rows of which columns are read at once: an index and a sum are loaded once for all of them."""

_REASSOCIATE = {"reassoc", "contract"}  # lets sums use vector lanes; NaN and inf keep their meaning


@njit(nogil=True)
def _number(x, half):  # pragma: no cover - compiled
    """A number, or what bits of ``half`` stand for."""
    return x if half is None else decode(x, half, np.float32(0))


@njit(nogil=True, fastmath=_REASSOCIATE)
def _sum_rows(
    lo, hi, a, b, half, rows, columns, now_rows, now_columns, then_rows, then_columns
):  # pragma: no cover - compiled
    """The sum over k in lo..hi and j of <a[:, rows[k], :, columns[j]], b[:, now_rows[k], :, now_columns[j]]>.

    Minus the same with ``then``, where that is not None. a, b: (outer, n1, middle, n2, inner), contiguous, numbers or bits of
    ``half``; indices: unsigned integers.
    """
    total = 0.0
    # What is gathered goes through a row: a sum that waits for every gather takes twice as long.
    terms = np.empty(columns.shape[0])
    for o in range(a.shape[0]):
        for k in range(lo, hi):
            for m in range(a.shape[2]):
                x, y = a[o, rows[k], m], b[o, now_rows[k], m]
                z = y if then_rows is None else b[o, then_rows[k], m]
                for j in range(columns.shape[0]):
                    u, v = x[columns[j]], y[now_columns[j]]
                    if a.shape[4] == 1:
                        step = np.float64(_number(v[0], half))
                        if then_rows is not None:
                            step -= _number(z[then_columns[j], 0], half)
                        terms[j] = _number(u[0], half) * step
                    else:
                        part = 0.0
                        for r in range(a.shape[4]):
                            step = np.float64(_number(v[r], half))
                            if then_rows is not None:
                                step -= _number(z[then_columns[j], r], half)
                            part += _number(u[r], half) * step
                        terms[j] = part
                for j in range(columns.shape[0]):
                    total += terms[j]
    return total


def inner(
    a: Tensor,
    b: Tensor,
    moved: Mapping[int, Tensor],
    now: Mapping[int, Tensor],
    then: Mapping[int, Tensor] | None,
) -> float:
    """Return the inner product under ``now``, minus that under ``then`` if given, over the positions ``moved``.

    Args:
        a: float32 or float64; or a half type that b has too.
        b: float32 or float64, or that half type, of a's shape.
        moved: dimension -> positions to sum over; all positions of the dimensions that it does not name.
        now: at most two dimensions with ``then``: dimension -> positions of ``b``.
        then: the same for the inner product that is subtracted.
    """
    shape, first, second, columns = a.shape, -1, -1, 1  # -1: no such dimension
    dims = sorted(now.keys() | (then or {}).keys())
    # Seen as (outer, rows, middle, columns, rest). Rows and columns are the reordered dimensions; if there is one, the
    # rows are the dimensions before it, or it is itself the rows.
    if len(dims) == 2:
        first, second = dims
        outer, rows, middle = math.prod(shape[:first]), shape[first], math.prod(shape[first + 1 : second])
    elif dims and dims[0] > 0:
        outer, rows, middle, second = 1, math.prod(shape[: dims[0]]), 1, dims[0]
    else:
        outer, rows, middle, first = 1, shape[0], 1, 0
    if second > 0:
        columns = shape[second]
    view = (outer, rows, middle, columns, math.prod(shape[1 + max(first, second) :]))

    def positions(dim: int, count: int, order: Mapping[int, Tensor]) -> np.ndarray:
        index, picked = order.get(dim), moved.get(dim)
        if index is None:
            index = picked
        elif picked is not None:
            index = index[picked]
        # Unsigned, so that compiled code does not check for negative indices.
        return np.arange(count, dtype=np.uint32) if index is None else index.numpy().astype(np.uint32)

    places = [positions(*dim, order) for order in ({}, now) for dim in ((first, rows), (second, columns))]
    before = (
        (None, None) if then is None else (positions(first, rows, then), positions(second, columns, then))
    )
    half = HALF.get(a.dtype)
    views = [_numbers(t.contiguous().view(view), half) for t in (a, b)]
    work = len(places[0]) * len(places[1]) * outer * middle * view[4] * GATHER_COST
    arguments = [*views, half, *places, *before]
    parts: list[float] = []
    over_rows(len(places[0]), work, lambda lo, hi: parts.append(_sum_rows(lo, hi, *arguments)))
    return math.fsum(parts)


@njit(nogil=True, fastmath=_REASSOCIATE)
def _three_sums(a, b, half, like, sums):  # pragma: no cover - compiled
    """Write <a, a>, <b, b> and <a, b> of flat bits to ``sums``; they are numbers of ``half``, or of like's type if that is None."""
    first = second = both = 0.0
    for i in range(a.shape[0]):
        x, y = np.float64(decode(a[i], half, like)), np.float64(decode(b[i], half, like))
        first += x * x
        second += y * y
        both += x * y
    sums[0], sums[1], sums[2] = first, second, both


def squares_and_inner(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """Return ``<a, a>``, ``<b, b>`` and ``<a, b>`` of two contiguous tensors of one dtype, read once."""
    words = {2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[a.element_size()]
    sums, like = np.empty(3), np.float64(0) if a.dtype == torch.float64 else np.float32(0)
    _three_sums(*(x.flatten().view(words).numpy() for x in (a, b)), HALF.get(a.dtype), like, sums)
    return float(sums[0]), float(sums[1]), float(sums[2])


@njit(nogil=True, fastmath=_REASSOCIATE)
def _add_rows(a, b, half, rows, cols, lo, hi, out):  # pragma: no cover - compiled
    """out[i] += <a[rows[i]], b[cols[i]]> for i in lo..hi, of numbers or bits of ``half``."""
    for i in range(lo, hi):
        x, y = a[rows[i]], b[cols[i]]
        total = 0.0
        for k in range(x.shape[0]):
            total += np.float64(_number(x[k], half)) * np.float64(_number(y[k], half))
        out[i] += total


@njit(nogil=True, fastmath=_REASSOCIATE)
def _add_columns(a, b, half, rows, cols, lo, hi, out):  # pragma: no cover - compiled
    """out[i] += <a[:, rows[i]], b[:, cols[i]]> for i in lo..hi, of numbers or bits of ``half``."""
    whole = a.shape[0] - a.shape[0] % TOGETHER
    for first in range(0, whole, TOGETHER):
        for i in range(lo, hi):
            row, col = rows[i], cols[i]
            total = 0.0
            for k in range(first, first + TOGETHER):
                total += np.float64(_number(a[k, row], half)) * np.float64(_number(b[k, col], half))
            out[i] += total
    for k in range(whole, a.shape[0]):
        for i in range(lo, hi):
            out[i] += np.float64(_number(a[k, rows[i]], half)) * np.float64(_number(b[k, cols[i]], half))


@njit(nogil=True, fastmath=_REASSOCIATE)
def _add_squares(a, half, lo, hi, out):  # pragma: no cover - compiled
    """out[i] += <a[:, i], a[:, i]> for i in lo..hi, of numbers or bits of ``half``."""
    for first in range(0, a.shape[0], TOGETHER):
        rows = a[first : first + TOGETHER]
        for i in range(lo, hi):
            total = 0.0
            for k in range(rows.shape[0]):
                number = np.float64(_number(rows[k, i], half))
                total += number * number
            out[i] += total


def row_squares(a: Tensor) -> Tensor:
    """Return ``<a, a>`` by row, of a contiguous matrix or of the transpose of one."""
    if a.is_contiguous():
        rows = torch.arange(len(a), device="cpu")
        return row_products(a, a, rows, rows)
    out, half = np.zeros(len(a)), HALF.get(a.dtype)
    view = _numbers(a.T, half)
    over_rows(len(a), a.numel(), lambda lo, hi: _add_squares(view, half, lo, hi, out))
    return torch.from_numpy(out)


def _numbers(tensor: Tensor, half: int | None) -> np.ndarray:
    """Return an array of the tensor's numbers, or of their bits."""
    tensor = tensor.detach()
    return (tensor if half is None else tensor.view(torch.uint16)).numpy()


def row_products(a: Tensor, b: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Return ``<a[rows], b[cols]>`` by row, of two contiguous matrices of one dtype or of the transposes of two such."""
    out, half = np.zeros(len(rows)), HALF.get(a.dtype)
    places = [
        index.numpy().astype(np.uint32) for index in (rows, cols)
    ]  # unsigned: no checks for negative indices
    add, pair = (_add_rows, (a, b)) if a.is_contiguous() else (_add_columns, (a.T, b.T))
    views = [_numbers(t, half) for t in pair]
    work = len(rows) * a.shape[1] * GATHER_COST
    over_rows(len(rows), work, lambda lo, hi: add(*views, half, *places, lo, hi, out))
    return torch.from_numpy(out)
