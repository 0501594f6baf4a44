"""Row reductions of ``c_ij - v_j`` for costs given by factors, on CPU: BLAS tiles, then a streamed top-k.

Tiles of x = c - v come from the caller's BLAS in the factors' own precision; these kernels keep, per row, the k smallest
with their columns, and afterwards compute the costs of what was kept again, in float64 from the factors. So
what the solver sees is exact to float64; the tiles' rounding only lowers the bound on what was not kept.

Work on a tile: one compare an entry, a vector of them at a time; an insertion only where one hits, about
k log(m / k) times a row.
"""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["DISTANCES", "merge_tile", "rescore"]

CHUNK = 64
DISTANCES = {"dot": 0, "l2": 1, "l1": 2}


@njit(nogil=True, cache=True)
def merge_tile(tile, lo, hi, first, values, items):  # pragma: no cover - compiled
    """Merges rows lo..hi of ``tile``, whose columns are first, first + 1, ..., into sorted lists.

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
                    hits += x[at + np.uintp(lane)] < worst
                if hits == 0:
                    at = stop
                    continue
            while at < stop:
                y = x[at]
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
