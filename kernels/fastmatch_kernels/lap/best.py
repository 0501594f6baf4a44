"""The best columns of rows that bid again and again: most bids need no read of the whole row.

A row that bids is read once, and its best columns and a bound on all others are kept. Column duals only fall, so c - v only
rises, and the bound stays valid: the least two of the kept columns are the row's least two while the second is at most the bound.

What is kept: of each of STRIDE sets of columns the least one, if that is at most the least of all second ones. They are about seven
if costs are random, and are found in one scan. Where they are more than WIDTH, two or four sets count as one.
Of random costs that settles most bids. Lists of larger matrices (``rows``) are longer and take three scans.
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
from fastmatch_kernels.lap import state as shared
from fastmatch_kernels.lap.paths import row_vector
from fastmatch_kernels.lap.state import KEPT_FROM, LARGEST, STRIDE, State

__all__ = [
    "AHEAD",
    "LINE",
    "at_most",
    "best_two",
    "bound_of",
    "forget",
    "least_of",
    "least_two_of",
    "new_best",
    "read_best",
    "with_best",
]

AHEAD, LINE = 8192, 64
"""Bytes by which a first read of all rows prefetches, and bytes of a cache line. Between rows, the processor's own prefetcher
stops."""


new_best = njit(nogil=True, cache=True, inner=True)(shared.new_best)


@njit(nogil=True, cache=True, inner=True, borrows=True)
def forget(best):  # pragma: no cover - compiled
    """Keep nothing: duals have risen."""
    items, numbers = best
    for at in range(items.shape[0], items.shape[0] + items.shape[0] // WIDTH):
        numbers[at] = -np.inf


@njit(nogil=True, cache=True, forceinline=True)
def with_best(state):  # pragma: no cover - compiled
    """Return the state with room for the best columns of its rows, unless rows are short. Those that never bid need none."""
    v, row_of, col_of, least, seconds, columns, stack, counts, _ = state
    best = new_best(col_of.shape[0] if row_of.shape[0] >= KEPT_FROM else np.int64(0))
    return State(v, row_of, col_of, least, seconds, columns, stack, counts, best)


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def bound_of(best, i):  # pragma: no cover - compiled
    """Return the bound on the c - v of row i in the columns that are not kept; -inf if none are."""
    return best.numbers[best.items.shape[0] + i]


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def at_most(a, b, d, e, limit):  # pragma: no cover - compiled
    """Return a mask of STRIDE sets, a vector of which after the other: bit k says whether the minimum of set k is at most ``limit``."""
    low = less_equal_mask(a, limit) | (less_equal_mask(b, limit) << WIDTH)
    return low | (less_equal_mask(d, limit) << (2 * WIDTH)) | (less_equal_mask(e, limit) << (3 * WIDTH))


@njit(nogil=True, cache=True, inner=True, borrows=True)
def _scan(c, at, m, sign, v, room, base, measured, turn):  # pragma: no cover - compiled
    """Find the least c - v of every set of the row at ``at``, and write their columns to ``room[base:]``.

    Returns:
        (bound, bits, sizes): a set whose bit is on has its least entry in ``room[base + set] + set``; all other columns are at least at the
        bound. At most WIDTH bits are on, and at least one if an entry is finite.
        ``sizes`` is the sum of unscaled sizes, if ``measured``. Among ties, sets from ``turn`` on come first.
    """
    signs, none, zero = splat(sign), splat(np.inf), splat(0.0)
    a, b, d, e, others, more = none, none, none, none, none, none
    p, q, r, s, one, two = zero, zero, zero, zero, zero, zero
    j = 0
    while j + STRIDE <= m:
        here = splat(np.float64(j))
        if measured:
            for k in range(AHEAD // c.itemsize, AHEAD // c.itemsize + STRIDE, LINE // c.itemsize):
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
        j += STRIDE
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
    store(room, base, p)
    store(room, base + WIDTH, q)
    store(room, base + 2 * WIDTH, r)
    store(room, base + 3 * WIDTH, s)
    bound = reduce_minimum(minimum(others, more))
    limit = splat(min(bound, LARGEST))
    bits = at_most(a, b, d, e, limit)
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
    tied = at_most(a, b, d, e, limit) & ~bits
    later = tied & -(1 << turn)  # so that rows keep different ones of them
    while tied != 0 and popcount(bits) < WIDTH:
        next_ = later if later != 0 else tied
        bits |= next_ & -next_
        later &= later - 1
        tied &= ~bits
    return bound, bits, sum_lanes(add(one, two))


@njit(nogil=True, cache=True, inner=True, borrows=True)
def read_best(costs, v, best, i, place, measured):  # pragma: no cover - compiled
    """Read row i and keep its best columns, as those of row ``place``.

    Returns:
        What :func:`least_two_of` does, of all columns, and the sum of unscaled sizes if ``measured``.
    """
    c, start, _, m, sign = costs
    items, numbers = best
    at_bound = items.shape[0] + place
    base = items.shape[0] + items.shape[0] // WIDTH
    at, to = start + i * m, place * WIDTH
    bound, bits, sizes = _scan(c, at, m, sign, v, numbers, base, measured, 7 * i % STRIDE)
    numbers[at_bound] = bound
    store(numbers, to, splat(np.inf))
    for f in range(WIDTH):
        items[to + f] = 0
    first, second, column, tied = np.inf, np.inf, np.int64(0), np.int64(0)
    while bits != 0:
        k = ctz(bits)
        bits &= bits - 1
        j = np.int64(numbers[base + k]) + k
        cost = sign * np.float64(c[at + j])
        numbers[to], items[to] = cost, j
        to += 1
        x = cost - v[j]  # without branches, which would be mispredicted
        high = first if x < first else x
        tied = j if x <= first else tied
        column = j if x < first else column
        first = x if x < first else first
        second = high if high < second else second
    return first, column, min(second, bound), tied, sizes


@njit(nogil=True, cache=True, inner=True, borrows=True)
def least_two_of(v, best, i):  # pragma: no cover - compiled
    """Return (least c - v, its column, second least, its column if the two are equal) of the columns kept for row i.

    The last one may be the first one again, if a column that is not kept ties with it.
    """
    items, to = best.items, i * WIDTH
    x = difference(splat(1.0), load(best.numbers, to), gather(v, items, to))
    first = reduce_minimum(x)
    least = splat(first)
    holders = less_equal_mask(x, least)
    others = holders & (holders - 1)
    if others != 0:
        return first, items[to + ctz(holders)], first, items[to + ctz(others)]
    j = items[to + ctz(holders)]
    return first, j, reduce_minimum(replace_at_most(x, least, splat(np.inf))), j


@njit(nogil=True, cache=True, inner=True, borrows=True)
def best_two(costs, v, best, i):  # pragma: no cover - compiled
    """Return what :func:`least_two_of` does, of all columns of row i, and whether it had to be read."""
    if bound_of(best, i) > -np.inf:
        first, j, second, tied = least_two_of(v, best, i)
        if second <= bound_of(best, i):
            return first, j, second, tied, False
    first, j, second, tied, _ = read_best(costs, v, best, i, i, np.bool_(False))
    return first, j, second, tied, True


@njit(nogil=True, cache=True, inner=True, borrows=True)
def least_of(v, best, i):  # pragma: no cover - compiled
    """Return the least c - v of row i if what is kept tells, else -inf."""
    if bound_of(best, i) == -np.inf:
        return -np.inf
    to = i * WIDTH
    x = reduce_minimum(difference(splat(1.0), load(best.numbers, to), gather(v, best.items, to)))
    return x if x <= bound_of(best, i) else -np.inf
