"""Row reductions of ``c_ij - v_j`` for costs given by factors, on CPU: BLAS tiles, then a streamed top-k.

Tiles of c come from the caller's BLAS in the factors' own precision; these kernels keep, per row, the k smallest ``c - v``
with their columns, and afterwards compute the costs of what was kept again, in float64 from the factors. So
what the solver sees is exact to float64; the tiles' rounding only lowers the bound on what was not kept.

Work on a tile: one compare an entry, a vector of them at a time; an insertion only where one hits, about
k log(m / k) times a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from fastmatch.kernels.cpu.parallel import over_rows
from fastmatch.kernels.reference.cost_rows import product_error, term_sizes
from fastmatch.kernels.reference.gain import gathered
from numba import njit

__all__ = [
    "DISTANCES",
    "TILE",
    "each_tile",
    "merge_tile",
    "products",
    "rescore",
    "row_min",
    "row_topk",
    "smallest",
]

TILE = (1024, 8192)
"""Rows and columns of a tile: 32 MB in float32, large enough for BLAS on all cores."""

CHUNK = 64
DISTANCES = {"dot": 0, "l2": 1, "l1": 2}


@njit(nogil=True, cache=True)
def merge_tile(tile, v, lo, hi, first, values, items):  # pragma: no cover - compiled
    """Merges rows lo..hi of ``tile - v``, whose columns are first, first + 1, ..., into sorted lists.

    ``values`` and ``items`` are (rows, k): the k smallest seen so far, rising; inf and -1 where fewer. NaN never enters.
    """
    width, chunk, one = np.uintp(tile.shape[1]), np.uintp(CHUNK), np.uintp(1)
    last = np.uintp(values.shape[1] - 1)
    for i in range(lo, hi):
        x, best, item = tile[i], values[i], items[i]
        worst = best[last]
        at = np.uintp(0)
        while at < width:
            stop = min(at + chunk, width)
            if stop - at == chunk:
                hits = 0
                for lane in range(CHUNK):
                    hits += x[at + np.uintp(lane)] - v[at + np.uintp(lane)] < worst
                if hits == 0:
                    at = stop
                    continue
            while at < stop:
                y = x[at] - v[at]
                if y < worst:
                    e = last
                    while e > 0 and best[e - one] > y:
                        best[e] = best[e - one]
                        item[e] = item[e - one]
                        e -= one
                    best[e] = y
                    item[e] = first + np.int64(at)
                    worst = best[last]
                at += one
            at = stop


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def rescore(A, B, rows, items, lo, hi, metric, scale, out):  # pragma: no cover - compiled
    """out[r, e] += scale * (a . b, |a - b|^2 or |a - b|_1) in float64 for a = A[rows[r]], b = B[items[r, e]].

    Entries with item -1 are set to inf.
    """
    for r in range(lo, hi):
        a = A[rows[r]]
        for e in range(items.shape[1]):
            if items[r, e] < 0:
                out[r, e] = np.inf
                continue
            b = B[items[r, e]]
            total = 0.0
            if metric == 0:
                for q in range(a.shape[0]):
                    total += np.float64(a[q]) * np.float64(b[q])
            elif metric == 1:
                for q in range(a.shape[0]):
                    difference = np.float64(a[q]) - np.float64(b[q])
                    total += difference * difference
            else:
                for q in range(a.shape[0]):
                    total += abs(np.float64(a[q]) - np.float64(b[q]))
            out[r, e] += scale * total


def each_tile(
    shape: tuple[int, int],
    tile: Sequence[int],
    dtype: torch.dtype,
    fill: Callable[[slice, slice, torch.Tensor], None],
    take: Callable[[np.ndarray, int, int, int, int], None],
    work: float,
) -> None:
    """Forms a matrix tile by tile: ``fill(rows, columns, out)`` writes one, ``take(tile, top, first, lo, hi)`` reads its
    rows lo..hi, on several cores; its first row and column are ``top`` and ``first``. ``work``: of an entry, for the split.
    """
    n, m = shape
    height, width = tile
    # One buffer for all tiles: fresh pages would cost as much as the product.
    room = torch.empty(min(height, n) * min(width, m), dtype=dtype)
    for top in range(0, n, height):
        rows = slice(top, min(top + height, n))
        count = rows.stop - top
        for first in range(0, m, width):
            columns = slice(first, min(first + width, m))
            out = room[: count * (columns.stop - first)].view(count, columns.stop - first)
            fill(rows, columns, out)
            over_rows(count, int(out.numel() * work), partial(take, out.numpy(), top, first))


def smallest(
    n: int,
    v: torch.Tensor,
    kept: int,
    tile: Sequence[int],
    fill: Callable[[slice, slice, torch.Tensor], None],
) -> tuple[np.ndarray, np.ndarray]:
    """The ``kept`` smallest of ``c - v`` of n rows and their columns, rising; inf and -1 where there are fewer.

    ``fill(rows, columns, out)`` writes one tile of c in v's dtype.
    """
    values = torch.full((n, kept), torch.inf, dtype=v.dtype).numpy()
    items = np.full((n, kept), -1, np.int32)
    duals = v.numpy()

    def take(entries: np.ndarray, top: int, first: int, lo: int, hi: int) -> None:
        rows = slice(top, top + len(entries))
        merge_tile(entries, duals[first:], lo, hi, first, values[rows], items[rows])

    # Most of a tile is passed over by one comparison of vectors.
    each_tile((n, len(v)), tile, v.dtype, fill, take, 1 / 8)
    return values, items


def products(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]],
    b_index: torch.Tensor | None = None,
    contraction_index: Sequence[torch.Tensor | None] | None = None,
) -> Callable[[slice, slice, torch.Tensor], None]:
    """What writes a tile of ``c = -sum_k A_k B_k^T`` in the tile's dtype."""
    contractions = contraction_index or [None] * len(factors)

    def fill(rows: slice, columns: slice, out: torch.Tensor) -> None:
        for k, ((a, b), inner) in enumerate(zip(factors, contractions, strict=True)):
            if b_index is None:
                right = gathered(b[columns], None, inner)
            else:
                right = gathered(b, b_index[columns], inner)
            # The first product overwrites: filling the tile beforehand would be another pass over it.
            out.addmm_(a[rows].to(out.dtype), right.to(out.dtype).T, beta=int(k > 0), alpha=-1)

    return fill


def _smallest_products(factors, v, kept, b_index, contraction_index, tile):
    dtype = torch.float64 if factors[0][0].dtype == torch.float64 else torch.float32
    fill = products(factors, b_index, contraction_index)
    return smallest(len(factors[0][0]), v.to(dtype), kept, tile or TILE, fill)


def row_topk(
    factors: list[tuple[torch.Tensor, torch.Tensor]],
    v: torch.Tensor,
    k: int,
    *,
    b_index: torch.Tensor | None = None,
    contraction_index: list[torch.Tensor | None] | None = None,
    precision: str = "ieee",
    sizes: torch.Tensor | None = None,
    tile: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments and result as in the reference; products in float32 (float64 for float64), whatever ``precision``.

    Half-precision factors are widened a tile at a time, and B is gathered a tile at a time.
    """
    values, items = _smallest_products(factors, v, k + 1, b_index, contraction_index, tile)
    value, index = torch.from_numpy(values), torch.from_numpy(items[:, :k].astype(np.int64))
    duals = v.to(value.dtype)
    listed = index >= 0
    if len(v):
        shift = torch.where(listed, duals[index.clamp(min=0)], 0)
        costs = torch.where(listed, value[:, :k] + shift, torch.inf)
    else:
        costs = value[:, :k].clone()
    outside = value[:, k]
    if k == 0 and len(v):
        outside = torch.full_like(outside, -torch.inf)
    if sizes is None:
        sizes = term_sizes(factors, contraction_index)
    depth = sum(a.shape[1] for a, _ in factors)
    bound = (outside.double() - product_error(sizes, v, depth, value.dtype)).to(value.dtype)
    below = bound.nextafter(bound.new_tensor(-torch.inf))
    return index, costs, torch.where(outside.isfinite(), below, outside)


def row_min(
    factors: list[tuple[torch.Tensor, torch.Tensor]],
    v: torch.Tensor,
    *,
    b_index: torch.Tensor | None = None,
    contraction_index: list[torch.Tensor | None] | None = None,
    precision: str = "ieee",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row the smallest ``c_ij - v_j`` as computed and its column; arguments as :func:`row_topk`."""
    values, items = _smallest_products(factors, v, 1, b_index, contraction_index, ())
    return torch.from_numpy(values)[:, 0], torch.from_numpy(items[:, 0].astype(np.int64))
