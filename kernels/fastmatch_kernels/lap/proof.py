"""The certificate of a solution: its gap, a bound on the rounding in it, and duals that close it."""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels._numba.simd import WIDTH, difference, load, minimum, reduce_minimum, splat
from fastmatch_kernels.lap.paths import row_vector

__all__ = ["gap_of", "least_of_row", "prove"]

EPS = 2.0**-52
TINY = 1e-300

SWEEPS = 8
"""Sweeps that raise duals at most; each is two reads of the matrix. One is nearly always enough."""


@njit(nogil=True, cache=True, inner=True, borrows=True)
def least_of_row(c, at, m, sign, v):  # pragma: no cover - compiled
    """Return the least c - v of the row at ``at``."""
    signs, none = splat(sign), splat(np.inf)
    one, two = none, none
    j = 0
    while j + 2 * WIDTH <= m:
        one = minimum(difference(signs, load(c, at + j), load(v, j)), one)
        two = minimum(difference(signs, load(c, at + j + WIDTH), load(v, j + WIDTH)), two)
        j += 2 * WIDTH
    while j < m:
        one = minimum(difference(signs, row_vector(c, at, j, m, sign * np.inf), load(v, j)), one)
        j += WIDTH
    return reduce_minimum(minimum(one, two))


@njit(nogil=True, cache=True, inner=True, borrows=True)
def gap_of(costs, v, u, col_of):  # pragma: no cover - compiled
    """Return (total, gap, bound) of a matching: see ``fastmatch.assignment.gap``. Unmatched columns have the largest dual."""
    c, start, n, m, sign = costs
    total, gap, size, top = 0.0, 0.0, 0.0, 0.0
    for j in range(m):
        top = max(top, abs(v[j]))
    for i in range(n):
        j = col_of[i]
        x = sign * np.float64(c[start + i * m + j])
        total += x
        gap += (x - v[j]) - u[i]
        size += abs(x) + 2.0 * abs(v[j])
    return total, gap, 4.0 * EPS * (size + n * top + TINY)


@njit(nogil=True, cache=True, borrows=True)
def prove(costs, v, u, col_of, level):  # pragma: no cover - compiled
    """Return (total, gap, bound) after raising duals until the gap is within its bound.

    Searches add and subtract distances, and each step rounds. So a matched entry's c - v may end some units in the last
    place above its row's least, ``u``. Raising the matched column's dual by the difference makes the entry tight again.
    That is one step of Bellman and Ford's algorithm for duals of this matching, which ends if the matching is optimal.
    No dual is raised above ``level``, that of unmatched columns.
    """
    c, start, n, m, sign = costs
    total, gap, bound = gap_of(costs, v, u, col_of)
    for _ in range(SWEEPS):
        if gap <= bound:
            break
        for i in range(n):
            j = col_of[i]
            x = sign * np.float64(c[start + i * m + j]) - least_of_row(c, start + i * m, m, sign, v)
            if x > v[j]:
                v[j] = min(x, level)
        for i in range(n):
            u[i] = least_of_row(c, start + i * m, m, sign, v)
        total, gap, bound = gap_of(costs, v, u, col_of)
    return total, gap, bound
