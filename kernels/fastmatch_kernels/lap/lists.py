"""Results from candidate lists: a row's best two columns, whether its match is tight, and row duals."""

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
from fastmatch_kernels.lap.state import FREE

__all__ = ["best_two", "flat_lists", "keep_tight", "note_costs", "row_duals"]


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def best_two(C, v, start, length, cols, costs, i):  # pragma: no cover - compiled
    """Return (least c - v in row i's list, its first place in the pool, second least).

    It takes the arrays one by one, because taking a tuple apart counts references, which costs as much as the work.
    """
    at = start[i]
    if C is None:
        return _best_two_of_many(v, cols, costs, at, length[i])
    return _best_two_of_three(v, cols, costs, at)


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
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


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
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
def row_duals(C, sign, lo, hi, v, lists, matching, u):  # pragma: no cover - compiled
    """Write u_i, the least c - v, of rows lo..hi, all matched; return how many rows had to be read for it."""
    start, length, cols, costs, bound = lists
    _, col_of, cost_of = matching
    read = 0
    for i in range(lo, hi):
        first, _, _ = best_two(C, v, start, length, cols, costs, i)
        least = min(first, cost_of[i] - v[col_of[i]])
        if least > bound[i]:
            least = row_minimum(C[i], sign, v)
            read += 1
        u[i] = least
    return read


@njit(nogil=True, cache=True)
def keep_tight(C, v, lists, matching):  # pragma: no cover - compiled
    """Free the rows whose match is not their least c - v, as far as lists and bounds tell."""
    start, length, cols, costs, bound = lists
    row_of, col_of, cost_of = matching
    for i in range(col_of.shape[0]):
        j = col_of[i]
        if j >= 0:
            first, _, _ = best_two(C, v, start, length, cols, costs, i)
            if cost_of[i] - v[j] > min(first, bound[i]):
                row_of[j] = -1
                col_of[i] = FREE


@njit(nogil=True, cache=True)
def flat_lists(C, v, lists, rows):  # pragma: no cover - compiled
    """Return how many of ``rows`` have lists that end in ties with their best entry, and so tell little."""
    start, length, cols, costs, bound = lists
    flat = 0
    for i in rows:
        first, _, _ = best_two(C, v, start, length, cols, costs, i)
        flat += first == bound[i]
    return flat


@njit(nogil=True, cache=True)
def note_costs(C, sign, col_of, cost_of):  # pragma: no cover - compiled
    """Write the costs of the matched pairs."""
    for i in range(col_of.shape[0]):
        if col_of[i] >= 0:
            cost_of[i] = sign * np.float64(C[i, col_of[i]])
