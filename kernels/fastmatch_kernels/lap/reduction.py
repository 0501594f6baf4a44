"""Row reduction over candidate lists: matches that cost no change of the duals (Jonker and Volgenant 1987)."""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels.lap.lists import best_two
from fastmatch_kernels.lap.state import FREE

__all__ = ["row_reduction"]


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
