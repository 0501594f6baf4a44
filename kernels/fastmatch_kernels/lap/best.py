"""The best columns of rows that bid again and again: most bids need no read of the whole row.

A row that bids is read once, and its best columns and a bound on all others are kept. Column duals only fall, so c - v only
rises, and the bound stays valid: the least two of the kept columns are the row's least two while the second is at most the bound.
In 300 x 300 random costs that settles nine bids of ten. Lists of larger matrices (``rows``) are longer and take three scans.
"""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels._numba.nontemporal import prefetch
from fastmatch_kernels._numba.simd import (
    WIDTH,
    add,
    ctz,
    difference,
    gather,
    less_equal_mask,
    less_mask,
    load,
    magnitude,
    maximum,
    minimum,
    popcount,
    reduce_minimum,
    replace_at_most,
    select,
    splat,
    store,
    sum_lanes,
)
from fastmatch_kernels.lap.paths import row_vector
from fastmatch_kernels.lap.state import LARGEST, Best

__all__ = ["SETS", "best_two", "forget", "least_of", "least_two_of", "new_best", "read_best"]

SETS = 4 * WIDTH
"""Sets of columns that are alike modulo SETS. The least of each set, where that is at most the least of all second ones, are the
row's best columns: about seven, if they are random."""

AHEAD, LINE = 8192, 64
"""Bytes by which a first read of all rows prefetches, and bytes of a cache line. Between rows, the processor's own prefetcher
stops."""


@njit(nogil=True, cache=True, inner=True, borrows=True)
def forget(best):  # pragma: no cover - compiled
    """Keep nothing: duals have risen."""
    for i in range(best.bounds.shape[0]):
        best.bounds[i] = -np.inf


@njit(nogil=True, cache=True, inner=True)
def new_best(n):  # pragma: no cover - compiled
    """Return room for n rows, with nothing kept."""
    best = Best(np.empty(n * WIDTH), np.empty(n * WIDTH, np.int32), np.empty(n))
    forget(best)
    return best


@njit(nogil=True, cache=True, inner=True, borrows=True)
def _scan(c, at, m, sign, v, room, measured, turn):  # pragma: no cover - compiled
    """Find the least c - v of every set of the row at ``at``, and write their columns to ``room``.

    Returns:
        (bound, bits, sizes): a set whose bit is on has its least entry in ``room[set] + set``; all other columns are at least at the
        bound. At least one bit is on, at least two if there are as many finite entries, and at most WIDTH.
        ``sizes`` is the sum of unscaled sizes, if ``measured``. Among ties, sets from ``turn`` on come first.
    """
    signs, none, zero = splat(sign), splat(np.inf), splat(0.0)
    a, b, d, e, others, more = none, none, none, none, none, none
    p, q, r, s, one, two = zero, zero, zero, zero, zero, zero
    j = 0
    while j + SETS <= m:
        here = splat(np.float64(j))
        if measured:
            for k in range(AHEAD // c.itemsize, AHEAD // c.itemsize + SETS, LINE // c.itemsize):
                prefetch(c, at + j + k)
            one, two = add(one, magnitude(load(c, at + j))), add(two, magnitude(load(c, at + j + WIDTH)))
            one = add(one, magnitude(load(c, at + j + 2 * WIDTH)))
            two = add(two, magnitude(load(c, at + j + 3 * WIDTH)))
        x = difference(signs, load(c, at + j), load(v, j))
        others, p, a = minimum(maximum(x, a), others), select(x, a, here, p), minimum(x, a)
        x = difference(signs, load(c, at + j + WIDTH), load(v, j + WIDTH))
        more, q, b = minimum(maximum(x, b), more), select(x, b, here, q), minimum(x, b)
        x = difference(signs, load(c, at + j + 2 * WIDTH), load(v, j + 2 * WIDTH))
        others, r, d = minimum(maximum(x, d), others), select(x, d, here, r), minimum(x, d)
        x = difference(signs, load(c, at + j + 3 * WIDTH), load(v, j + 3 * WIDTH))
        more, s, e = minimum(maximum(x, e), more), select(x, e, here, s), minimum(x, e)
        j += SETS
    here, turns = splat(np.float64(j)), (m - j + WIDTH - 1) // WIDTH
    while j < m:  # the sets turn: the next vector's is the first
        if measured:
            one = add(one, magnitude(row_vector(c, at, j, m, 0.0)))
        x = difference(signs, row_vector(c, at, j, m, sign * np.inf), load(v, j))
        others, x, y = minimum(maximum(x, a), others), minimum(x, a), select(x, a, here, p)
        a, b, d, e, p, q, r, s = b, d, e, x, q, r, s, y
        j += WIDTH
    while 0 < turns < 4:
        a, b, d, e, p, q, r, s = b, d, e, a, q, r, s, p
        turns += 1
    store(room, 0, p)
    store(room, WIDTH, q)
    store(room, 2 * WIDTH, r)
    store(room, 3 * WIDTH, s)
    bound = reduce_minimum(minimum(others, more))
    limit = splat(min(bound, LARGEST))
    bits = less_equal_mask(a, limit) | (less_equal_mask(b, limit) << WIDTH)
    bits |= (less_equal_mask(d, limit) << (2 * WIDTH)) | (less_equal_mask(e, limit) << (3 * WIDTH))
    if popcount(bits) <= WIDTH:
        return bound, bits, sum_lanes(add(one, two))
    # One of every two sets, and if these are too many, one of every four.
    for sets in (2, 4):
        other = minimum(maximum(a, b), maximum(d, e)) if sets == 2 else maximum(minimum(a, b), minimum(d, e))
        bound = min(bound, reduce_minimum(other))
        limit = splat(bound)
        bits = less_mask(a, limit) | (less_mask(b, limit) << WIDTH)
        bits |= (less_mask(d, limit) << (2 * WIDTH)) | (less_mask(e, limit) << (3 * WIDTH))
        if popcount(bits) <= WIDTH:
            break
    tied = less_equal_mask(a, limit) | (less_equal_mask(b, limit) << WIDTH)
    tied |= (less_equal_mask(d, limit) << (2 * WIDTH)) | (less_equal_mask(e, limit) << (3 * WIDTH))
    tied &= ~bits
    later = tied & -(1 << turn)  # so that rows keep different ones of them
    while tied != 0 and popcount(bits) < WIDTH:
        next_ = later if later != 0 else tied
        bits |= next_ & -next_
        later &= later - 1
        tied &= ~bits
    return bound, bits, sum_lanes(add(one, two))


@njit(nogil=True, cache=True, inner=True, borrows=True)
def read_best(costs, v, best, i, room, measured):  # pragma: no cover - compiled
    """Read row i and keep its best columns; return the sum of unscaled sizes if ``measured``. ``room`` is (SETS,) float64."""
    c, start, _, m, sign = costs
    kept, items, bounds = best
    at, to = start + i * m, i * WIDTH
    bounds[i], bits, sizes = _scan(c, at, m, sign, v, room, measured, 7 * i % SETS)
    store(kept, to, splat(np.inf))
    for f in range(WIDTH):
        items[to + f] = 0
    while bits != 0:
        k = ctz(bits)
        bits &= bits - 1
        j = np.int64(room[k]) + k
        kept[to], items[to] = sign * np.float64(c[at + j]), j
        to += 1
    return sizes


@njit(nogil=True, cache=True, inner=True, borrows=True)
def least_two_of(v, best, i):  # pragma: no cover - compiled
    """Return (least c - v, its column, second least, its column if the two are equal) of the columns kept for row i."""
    items, to = best.items, i * WIDTH
    x = difference(splat(1.0), load(best.costs, to), gather(v, items, to))
    first = reduce_minimum(x)
    least = splat(first)
    holders = less_equal_mask(x, least)
    others = holders & (holders - 1)
    if others != 0:
        return first, items[to + ctz(holders)], first, items[to + ctz(others)]
    if holders == 0:
        return np.inf, 0, np.inf, 0
    j = items[to + ctz(holders)]
    return first, j, reduce_minimum(replace_at_most(x, least, splat(np.inf))), j


@njit(nogil=True, cache=True, inner=True, borrows=True)
def best_two(costs, v, best, i, room):  # pragma: no cover - compiled
    """Return (least c - v, its column, second least, its column if the two are equal) of row i; read it if need be."""
    if best.bounds[i] > -np.inf:
        first, j, second, tied = least_two_of(v, best, i)
        if second <= best.bounds[i]:
            return first, j, second, tied
    read_best(costs, v, best, i, room, np.bool_(False))
    first, j, second, tied = least_two_of(v, best, i)
    return first, j, min(second, best.bounds[i]), tied


@njit(nogil=True, cache=True, inner=True, borrows=True)
def least_of(v, best, i):  # pragma: no cover - compiled
    """Return the least c - v of row i if what is kept tells, else -inf."""
    if best.bounds[i] == -np.inf:
        return -np.inf
    to = i * WIDTH
    x = reduce_minimum(difference(splat(1.0), load(best.costs, to), gather(v, best.items, to)))
    return x if x <= best.bounds[i] else -np.inf
