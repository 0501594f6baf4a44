"""Column and row reduction: matches that cost no change of the duals (Jonker and Volgenant 1987)."""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels._numba.simd import WIDTH, ctz, difference, less_equal_mask, load, splat
from fastmatch_kernels.lap.lists import best_two
from fastmatch_kernels.lap.state import FREE, READS

__all__ = ["column_reduction", "row_reduction", "tie_reduction"]


@njit(nogil=True, cache=True)
def column_reduction(C, sign, v, row_at, matching):  # pragma: no cover - compiled
    """Match column j to ``row_at[j]``, a row that has its minimum, unless an earlier column took that row."""
    row_of, col_of, cost_of = matching
    for j in range(v.shape[0]):
        i = row_at[j]
        if i >= 0 and v[j] > -np.inf and col_of[i] == FREE:
            row_of[j] = i
            col_of[i] = j
            cost_of[i] = sign * np.float64(C[i, j])


@njit(nogil=True, cache=True)
def tie_reduction(C, sign, v, misses, matching, counts):  # pragma: no cover - compiled
    """Match free rows to a free column whose minimum they share; v are column minima. It suits entries of few values.

    Each row is searched for such a column from a different start, wrapping at the end, up to the first one. The function
    ends when the rows without one outnumber the rows with one by more than ``misses``.
    """
    row_of, col_of, cost_of = matching
    m = v.shape[0]
    signs, zero = splat(sign), splat(0.0)
    scanned = 0
    for i in range(col_of.shape[0]):
        if col_of[i] != FREE:
            continue
        if misses < 0:
            break
        misses -= 1
        row = C[i]
        start = i * WIDTH * 5 % m
        start -= start % WIDTH
        for half in range(2):
            lo, hi = (start, m) if half == 0 else (0, start)
            for j in range(lo, hi, WIDTH):
                scanned += WIDTH
                if j + WIDTH <= m:
                    bits = less_equal_mask(difference(signs, load(row, j), load(v, j)), zero)
                else:
                    bits = (1 << (m - j)) - 1
                while bits != 0:
                    column = j + ctz(bits)
                    bits &= bits - 1
                    x = sign * np.float64(row[column])
                    if row_of[column] < 0 and x == v[column]:
                        row_of[column] = i
                        col_of[i] = column
                        cost_of[i] = x
                        misses += 2
                        break
                if col_of[i] != FREE:
                    break
            if col_of[i] != FREE:
                break
    counts[READS] += scanned // m


@njit(nogil=True, cache=True)
def row_reduction(C, v, lists, matching):  # pragma: no cover - compiled
    """Match every free row that has a free column among its best."""
    start, length, cols, costs, bound = lists
    row_of, col_of, cost_of = matching
    for i in range(col_of.shape[0]):
        if col_of[i] != FREE:
            continue
        first, place, _ = best_two(C, v, start, length, cols, costs, i)
        if first < np.inf and first <= bound[i]:
            # Any free column among the equally good will do; without a matrix, only the first one is tried.
            last = place + 1 if C is None else start[i] + length[i]
            for e in range(place, last):
                j = cols[e]
                if row_of[j] < 0 and costs[e] - v[j] == first:
                    row_of[j] = i
                    col_of[i] = j
                    cost_of[i] = costs[e]
                    break
