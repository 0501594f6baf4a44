"""Duals that make a matching tight: the price refinement of Goldberg and Kennedy (1995), cut short.

An auction leaves each row on a column that is up to eps worse than the row's best. If rows were freed for that, nearly all of the
matching would be lost. So the other columns' duals fall until the row's own column is its best. Their rows may then find better
columns in turn, and are looked at again. Rows that are still not tight after SWEEPS looks are mostly matched wrongly, and are
freed: a matching that is not optimal has no duals that make it tight.

Duals only fall, so bounds on a row's columns remain valid.
"""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels._numba.simd import WIDTH, ctz, difference, less_mask, load, splat
from fastmatch_kernels.lap.paths import row_vector
from fastmatch_kernels.lap.proof import EPS
from fastmatch_kernels.lap.state import BIDS, READS

__all__ = ["refine"]

SWEEPS = 2
"""Looks at a row before it is freed. More looks free fewer rows, but take more time than their paths."""


@njit(nogil=True, cache=True, inner=True)
def _lower(cost, k, level, v, row_of, dirty):  # pragma: no cover - compiled
    """Lower the dual of column k until it is no better than ``level``; its row has to be looked at again."""
    dual = cost - level
    while cost - dual < level:  # by rounding
        dual -= EPS * max(abs(dual), abs(level))
    v[k] = dual
    if row_of[k] >= 0:
        dirty[row_of[k]] = 1


@njit(nogil=True, cache=True, inner=True)
def _tighten(c, at, sign, m, v, level, row_of, dirty):  # pragma: no cover - compiled
    """Lower the duals of all columns that are better than ``level`` in the row at ``at``."""
    signs, limit = splat(sign), splat(level)
    for j in range(0, m, WIDTH):
        bits = less_mask(difference(signs, row_vector(c, at, j, m, sign * np.inf), load(v, j)), limit)
        while bits != 0:
            k = j + ctz(bits)
            bits &= bits - 1
            _lower(sign * np.float64(c[at + k]), k, level, v, row_of, dirty)


@njit(nogil=True, cache=True)
def refine(c, m, sign, v, lists, matching, counts):  # pragma: no cover - compiled
    """Refine over candidate lists, and over the whole row where a list does not tell.

    Rows that are not tight then keep their columns: the caller frees them.
    """
    start, length, cols, costs, bound = lists
    row_of, col_of, cost_of = matching
    n = col_of.shape[0]
    dirty = np.ones(n, np.uint8)
    for _ in range(SWEEPS):
        for i in range(n):
            j = col_of[i]
            if j < 0 or dirty[i] == 0:
                continue
            dirty[i] = 0
            level = cost_of[i] - v[j]
            counts[BIDS] += 1
            if level <= bound[i]:
                for e in range(start[i], start[i] + length[i]):
                    cost = np.float64(costs[e])
                    if cost - v[cols[e]] < level:
                        _lower(cost, cols[e], level, v, row_of, dirty)
            else:
                _tighten(c, i * m, sign, m, v, level, row_of, dirty)
                counts[READS] += 1
                bound[i] = level
