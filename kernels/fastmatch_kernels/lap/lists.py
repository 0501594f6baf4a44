"""Results from candidate lists: a row's best two columns, the mean gap between them, and row duals."""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit

# small.py imports nearly the same names: both find the best two columns of a row, from different data.
from fastmatch_kernels._numba.simd import (
    WIDTH,
    add,
    ctz,
    difference,
    gather,
    lane,
    less_equal_mask,
    load,
    maximum,
    minimum,
    reduce_minimum,
    replace_at_most,
    select,
    splat,
)
from fastmatch_kernels.lap.rows import row_minimum
from fastmatch_kernels.lap.state import ASIDE

__all__ = ["best_two", "mean_gap", "row_duals"]


@njit(nogil=True, cache=True, forceinline=True)
def best_two(C, v, start, length, cols, costs, i):  # pragma: no cover - compiled
    """Return (least c - v in row i's list, its first place in the pool, second least).

    It takes the arrays one by one, because taking a tuple apart counts references, which costs as much as the work.
    """
    at = start[i]
    if C is None:
        return _best_two_of_many(v, cols, costs, at, length[i])
    return _best_two_of_three(v, cols, costs, at)


@njit(nogil=True, cache=True, forceinline=True)
def _best_two_of_three(v, cols, costs, at):  # pragma: no cover - compiled
    """Return :func:`best_two` of a list of three vectors.

    The loop of :func:`_best_two_of_many`, used for these lists too, makes a solve of 500 x 500 Gaussian entries a third slower.
    """
    one = splat(1.0)
    a = difference(one, load(costs, at), gather(v, cols, at))
    b = difference(one, load(costs, at + WIDTH), gather(v, cols, at + WIDTH))
    c = difference(one, load(costs, at + 2 * WIDTH), gather(v, cols, at + 2 * WIDTH))
    low = minimum(a, b)
    first = minimum(low, c)
    second = minimum(maximum(a, b), maximum(low, c))  # of each lane
    lowest = reduce_minimum(first)
    limit = splat(lowest)
    holders = less_equal_mask(a, limit)
    holders |= less_equal_mask(b, limit) << WIDTH
    holders |= less_equal_mask(c, limit) << (2 * WIDTH)
    if holders & (holders - 1) != 0:
        return lowest, at + ctz(holders), lowest
    return lowest, at + ctz(holders), reduce_minimum(replace_at_most(first, limit, second))


@njit(nogil=True, cache=True, forceinline=True)
def _best_two_of_many(v, cols, costs, begin, length):  # pragma: no cover - compiled
    """Return :func:`best_two` of a list of any number of vectors."""
    one, none = splat(1.0), splat(np.inf)
    first, second, at = none, none, splat(0.0)
    here, step = splat(0.0), splat(np.float64(WIDTH))
    for e in range(begin, begin + length, WIDTH):
        x = difference(one, load(costs, e), gather(v, cols, e))
        second = minimum(maximum(first, x), second)
        at = select(x, first, here, at)
        first = minimum(x, first)
        here = add(here, step)
    lowest = reduce_minimum(first)
    limit = splat(lowest)
    holders = less_equal_mask(first, limit)
    k = ctz(holders)
    place = np.int64(lane(at, k)) + k
    holders &= holders - 1
    if holders == 0:
        return lowest, begin + place, reduce_minimum(replace_at_most(first, limit, second))
    while holders != 0:
        k = ctz(holders)
        place = min(place, np.int64(lane(at, k)) + k)
        holders &= holders - 1
    return lowest, begin + place, lowest


@njit(nogil=True, cache=True)
def mean_gap(C, v, lists, col_of, stale):  # pragma: no cover - compiled
    """Return the mean difference between a row's best two; set ``stale`` for rows whose lists may miss one of them."""
    start, length, cols, costs, bound = lists
    total, told = 0.0, 0
    for i in range(col_of.shape[0]):
        if col_of[i] != ASIDE:
            first, _, second = best_two(C, v, start, length, cols, costs, i)
            stale[i] = second > bound[i]
            if second <= bound[i] and second < np.inf:
                total += second - first
                told += 1
    return total / told if told > 0 else 0.0


@njit(nogil=True, cache=True)
def row_duals(C, sign, lo, hi, v, lists, u):  # pragma: no cover - compiled
    """Write u_i, the least c - v, of rows lo..hi; return how many rows their lists left to be read.

    A matched row with an empty list has its least at its column: the bound.
    """
    start, length, cols, costs, bound = lists
    read = 0
    for i in range(lo, hi):
        u[i], _, _ = best_two(C, v, start, length, cols, costs, i)
        if u[i] == np.inf:
            u[i] = bound[i]
        elif u[i] > bound[i]:
            u[i] = row_minimum(C[i], sign, v)
            read += 1
    return read
