"""Passes over a row of a cost matrix: its minimum, its candidate list.

Costs are ``c = sign * C`` with C (n, m) float32 or float64. Differences ``c - v`` are float64. Vector instructions come from
fastmatch_kernels._numba.simd, because numba compiles a minimum over floats to a scalar loop.
"""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels._numba.simd import (
    WIDTH,
    ctz,
    difference,
    less_equal_mask,
    load,
    load_part,
    minimum,
    popcount,
    reduce_minimum,
    splat,
    store,
)
from fastmatch_kernels.lap.state import CAPACITY, LARGEST

__all__ = [
    "list_row",
    "list_rows",
    "row_minimum",
    "workspace",
]

WANTED = 17
"""Entries that a list should have at least."""

VECTORS = 16
"""Stretches that a row is cut into. Each of the eight lanes of a stretch is a set of columns. At least WANTED entries are
at most x if WANTED of these sets have minima of at most x, and rarely many more."""

SETS = (VECTORS + 1) * WIDTH  # the last vector holds the columns that do not fill one
BLOCK = 4 * WIDTH


@njit(nogil=True, cache=True, inner=True)
def workspace(m):  # pragma: no cover - compiled
    """Return the workspace of :func:`list_row`: minima of sets, blocks that hold candidates, their bits, a sorted list."""
    blocks = m // BLOCK + 1
    return (
        np.empty(SETS),
        np.empty(blocks + 1, np.int64),
        np.empty(blocks + 1, np.int64),
        np.empty(CAPACITY + 1),
        np.empty(CAPACITY + 1, np.int32),
    )


@njit(nogil=True, cache=True, inner=True)
def row_minimum(row, sign, v):  # pragma: no cover - compiled
    """Return the least c - v of a row."""
    m = v.shape[0]
    signs, none = splat(sign), splat(np.inf)
    a, b, c, d = none, none, none, none
    j = 0
    while j + BLOCK <= m:
        a = minimum(difference(signs, load(row, j), load(v, j)), a)
        b = minimum(difference(signs, load(row, j + WIDTH), load(v, j + WIDTH)), b)
        c = minimum(difference(signs, load(row, j + 2 * WIDTH), load(v, j + 2 * WIDTH)), c)
        d = minimum(difference(signs, load(row, j + 3 * WIDTH), load(v, j + 3 * WIDTH)), d)
        j += BLOCK
    lowest = reduce_minimum(minimum(minimum(a, b), minimum(c, d)))
    for k in range(j, m):
        lowest = min(lowest, sign * np.float64(row[k]) - v[k])
    return lowest


@njit(nogil=True, cache=True, inner=True)
def _minima(row, sign, v, sets):  # pragma: no cover - compiled
    """Write the least c - v of SETS disjoint sets of columns."""
    m = v.shape[0]
    vectors = m // WIDTH
    step = (vectors + VECTORS - 1) // VECTORS * WIDTH
    signs, none = splat(sign), splat(np.inf)
    g, start = 0, 0
    while start + 4 * step <= vectors * WIDTH and g + 4 <= VECTORS:
        a, b, c, d = (
            none,
            none,
            none,
            none,
        )  # four chains at once, because each minimum has to wait for the one before
        for j in range(start, start + step, WIDTH):
            p, q, r = j + step, j + 2 * step, j + 3 * step
            a = minimum(difference(signs, load(row, j), load(v, j)), a)
            b = minimum(difference(signs, load(row, p), load(v, p)), b)
            c = minimum(difference(signs, load(row, q), load(v, q)), c)
            d = minimum(difference(signs, load(row, r), load(v, r)), d)
        store(sets, g * WIDTH, a)
        store(sets, (g + 1) * WIDTH, b)
        store(sets, (g + 2) * WIDTH, c)
        store(sets, (g + 3) * WIDTH, d)
        g += 4
        start += 4 * step
    while g < VECTORS:
        a = none
        for j in range(start, min(start + step, vectors * WIDTH), WIDTH):
            a = minimum(difference(signs, load(row, j), load(v, j)), a)
        store(sets, g * WIDTH, a)
        g += 1
        start += step
    rest = m - vectors * WIDTH
    last = difference(
        signs,
        load_part(row, vectors * WIDTH, rest, sign * np.inf),
        load_part(v, vectors * WIDTH, rest, 0.0),
    )
    store(sets, VECTORS * WIDTH, last)


@njit(nogil=True, cache=True, inner=True)
def _count(sets, value):  # pragma: no cover - compiled
    limit = splat(value)
    count = 0
    for g in range(0, SETS, WIDTH):
        count += popcount(less_equal_mask(load(sets, g), limit))
    return count


@njit(nogil=True, cache=True, inner=True)
def _cutoff(sets):  # pragma: no cover - compiled
    """Return a value that WANTED of the sets' minima, and few more, do not exceed; LARGEST if fewer are finite."""
    low, high = np.inf, 0.0
    finite = 0
    for g in range(0, SETS, WIDTH):
        x = reduce_minimum(load(sets, g))
        low = min(low, x)
        if x < np.inf:
            high += x
            finite += 1
    if finite == 0:
        return LARGEST
    high /= finite
    count = _count(sets, high)
    step = high - low
    while count < WANTED:
        low = high
        high += step
        step *= 2.0
        if not step > 0.0 or not high < LARGEST:
            high = LARGEST
            count = _count(sets, high)
            break
        count = _count(sets, high)
    if count < WANTED:
        return LARGEST
    for _ in range(24):
        if count <= WANTED + 3:
            break
        middle = 0.5 * low + 0.5 * high
        inside = _count(sets, middle)
        if inside < WANTED:
            low = middle
        else:
            high = middle
            count = inside
    return high


@njit(nogil=True, cache=True, inner=True)
def _block(row, signs, sign, v, j, limit):  # pragma: no cover - compiled
    """Return a mask of 32 columns (fewer at the row's end): bit k says whether c - v at column j + k is at most ``limit``."""
    m = v.shape[0]
    if j + BLOCK <= m:
        bits = less_equal_mask(difference(signs, load(row, j), load(v, j)), limit)
        p = j + WIDTH
        bits |= less_equal_mask(difference(signs, load(row, p), load(v, p)), limit) << WIDTH
        p += WIDTH
        bits |= less_equal_mask(difference(signs, load(row, p), load(v, p)), limit) << (2 * WIDTH)
        p += WIDTH
        bits |= less_equal_mask(difference(signs, load(row, p), load(v, p)), limit) << (3 * WIDTH)
        return bits
    bits = 0
    for shift in range(0, m - j, WIDTH):
        p = j + shift
        count = min(WIDTH, m - p)
        x = difference(signs, load_part(row, p, count, sign * np.inf), load_part(v, p, count, 0.0))
        bits |= less_equal_mask(x, limit) << shift
    return bits


@njit(nogil=True, cache=True, inner=True)
def _candidates(row, sign, v, i, cutoff, where, bits):  # pragma: no cover - compiled
    """Find the blocks that hold columns of c - v <= cutoff, and their masks; return the numbers of blocks and of columns.

    Among ties, the first ones are listed. Each row starts at another block, so that rows list different ones.
    """
    m = v.shape[0]
    blocks = (m + BLOCK - 1) // BLOCK
    limit, signs = splat(cutoff), splat(sign)
    j = (i * 7) % blocks * BLOCK
    found = 0
    for _ in range(blocks):
        mask = _block(row, signs, sign, v, j, limit)
        where[found] = j
        bits[found] = mask
        found += mask != 0  # without a branch, which would be mispredicted half the time
        j += BLOCK
        if j >= m:
            j = 0
    columns = 0
    for f in range(found):
        columns += popcount(bits[f])
    return found, columns


@njit(nogil=True, cache=True, inner=True)
def list_row(C, sign, i, v, work, start, cols, costs, bound):  # pragma: no cover - compiled
    """Read row i and write its candidate list: columns of least c - v, and a bound that no other column is below.

    Entries that are not finite are never listed; the bound is inf if all others are such.
    """
    sets, where, bits, values, items = work
    row, at = C[i], start[i]
    _minima(row, sign, v, sets)
    cutoff = _cutoff(sets)
    found, columns = _candidates(row, sign, v, i, cutoff, where, bits)
    if columns > CAPACITY:
        bound[i] = _select(row, sign, v, found, where, bits, values, items)
        for e in range(CAPACITY):
            cols[at + e] = items[e]
            costs[at + e] = sign * row[items[e]]
        return
    bound[i] = np.inf if cutoff == LARGEST else cutoff
    e = at
    for f in range(found):
        mask = bits[f]
        while mask != 0:
            j = where[f] + ctz(mask)
            mask &= mask - 1
            cols[e] = j
            costs[e] = sign * row[j]
            e += 1
    for rest in range(e, at + CAPACITY):
        cols[rest] = 0
        costs[rest] = np.inf


@njit(nogil=True, cache=True, inner=True)
def _select(row, sign, v, found, where, bits, values, items):  # pragma: no cover - compiled
    """Write the CAPACITY candidates of least c - v, in order; return the next one's value."""
    values[:] = np.inf
    for f in range(found):
        mask = bits[f]
        while mask != 0:
            j = where[f] + ctz(mask)
            mask &= mask - 1
            x = sign * np.float64(row[j]) - v[j]
            if x < values[CAPACITY]:
                e = CAPACITY
                while e > 0 and values[e - 1] > x:
                    values[e] = values[e - 1]
                    items[e] = items[e - 1]
                    e -= 1
                values[e] = x
                items[e] = j
    return values[CAPACITY]


@njit(nogil=True, cache=True)
def list_rows(C, sign, rows, v, lists):  # pragma: no cover - compiled
    """Write the candidate lists of ``rows``: one read of each."""
    start, _, cols, costs, bound = lists
    work = workspace(v.shape[0])
    for i in rows:
        list_row(C, sign, i, v, work, start, cols, costs, bound)
