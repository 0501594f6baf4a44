"""Problems whose columns repeat: one column stands for all its copies and takes as many rows.

That is the transportation problem with supplies of 1 (Hitchcock 1941), by shortest augmenting paths. A full column that a
search reaches sends all its rows on.
"""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels._numba.simd import (
    WIDTH,
    add,
    ctz,
    difference,
    less_equal_mask,
    less_mask,
    load,
    minimum,
    reduce_minimum,
    select,
    splat,
    store,
)
from fastmatch_kernels.lap.paths import row_vector
from fastmatch_kernels.lap.state import POPS, SEARCHES

__all__ = ["fill_columns", "hash_columns", "hash_rows", "rows_equal", "take_columns"]

HIGH_BITS = np.uint64(29)
"""Shift that brings high bits down: small whole numbers, as floats, differ in these only."""


@njit(nogil=True, cache=True)
def hash_columns(bits, m, odd, total):  # pragma: no cover - compiled
    """Add to ``total`` a number per column of a flat matrix of m columns, from its unsigned bits and a number per row."""
    for i in range(odd.shape[0]):
        at, factor = i * m, odd[i]
        for j in range(m):
            x = np.uint64(bits[at + j])
            total[j] += (x ^ (x >> HIGH_BITS)) * factor


@njit(nogil=True, cache=True)
def hash_rows(bits, m, odd, total):  # pragma: no cover - compiled
    """Add to ``total`` a number per row of a flat matrix of m columns, from its unsigned bits and a number per column."""
    for i in range(total.shape[0]):
        at, found = i * m, total[i]
        for j in range(m):
            x = np.uint64(bits[at + j])
            found += (x ^ (x >> HIGH_BITS)) * odd[j]
        total[i] = found


@njit(nogil=True, cache=True)
def take_columns(c, first, group, out):  # pragma: no cover - compiled
    """Write columns ``first`` of a flat matrix to the flat ``out``; return whether each column j equals ``first[group[j]]``.

    A row is in the nearest cache when its entries are compared: numpy's gather and a pass of its own that compares read everything twice.
    """
    m, few = group.shape[0], first.shape[0]
    at = to = 0
    while at < c.shape[0]:
        for k in range(few):
            out[to + k] = c[at + first[k]]
        different = False
        for j in range(m):
            different |= c[at + j] != out[to + group[j]]
        if different:
            return False
        at += m
        to += few
    return True


@njit(nogil=True, cache=True)
def rows_equal(c, m, copies, like):  # pragma: no cover - compiled
    """Return whether row ``copies[k]`` of a flat matrix of m columns equals row ``like[k]``, for all k."""
    for k in range(copies.shape[0]):
        at, other = copies[k] * m, like[k] * m
        different = False
        for j in range(m):
            different |= c[at + j] != c[other + j]
        if different:
            return False
    return True


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def _leave(i, g, head, following, before):  # pragma: no cover - compiled
    """Take row i off the list of column g's rows."""
    p, q = before[i], following[i]
    if p >= 0:
        following[p] = q
    else:
        head[g] = q
    if q >= 0:
        before[q] = p


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def _join(i, g, head, following, before):  # pragma: no cover - compiled
    """Put row i on the list of column g's rows."""
    before[i] = -1
    following[i] = head[g]
    if head[g] >= 0:
        before[head[g]] = i
    head[g] = i


@njit(nogil=True, cache=True)
def fill_columns(c, m, sign, room, v, col_of, order, counts):  # pragma: no cover - compiled
    """Assign each row of ``order`` a column of the flat (n, m) matrix, column j at most ``room[j]`` rows.

    Args:
        room: (m,) int64, at least 1 each; their sum is at least n.
        v: (m,) float64, column duals, 0 at first; those of columns with room left stay 0.
        col_of: (n,) int64, -1 at first.

    Returns:
        A row without a path, or -1 if all rows have a column.
    """
    n = col_of.shape[0]
    width = (m + WIDTH - 1) // WIDTH * WIDTH
    fill = sign * np.inf
    w, dist, taken, came_from = np.empty(width), np.empty(width), np.empty(width), np.empty(width)
    final, queue, used = np.empty(m), np.empty(m, np.int64), np.zeros(m, np.int64)
    head, following, before = np.full(m, -1, np.int64), np.full(n, -1, np.int64), np.full(n, -1, np.int64)
    waiting, base_of = np.empty(n + 1, np.int64), np.empty(n + 1)
    signs = splat(sign)
    for j in range(width):
        w[j] = v[j] if j < m else -np.inf
        taken[j] = 0.0 if j < m else np.inf
    for source in order:
        dist[:] = np.inf
        tail, done, level, goal = 0, 0, -np.inf, -1
        waits = 1
        waiting[0], base_of[0] = source, 0.0
        found = True
        while goal < 0:
            while waits > 0 and goal < 0:  # rows at this level
                waits -= 1
                i = waiting[waits]
                shift, limit, number = splat(base_of[waits]), splat(level), splat(np.float64(i))
                counts[POPS] += 1
                for j in range(0, m, WIDTH):
                    x = add(shift, difference(signs, row_vector(c, i * m, j, m, fill), load(w, j)))
                    old = load(dist, j)
                    lower = less_mask(x, old)
                    if lower != 0:
                        store(came_from, j, select(x, old, number, load(came_from, j)))
                        store(dist, j, minimum(x, old))
                        now = less_equal_mask(x, limit) & lower
                        while now != 0:
                            k = j + ctz(now)
                            now &= now - 1
                            if used[k] < room[k]:
                                goal = k
                                break
                            queue[tail], final[tail] = k, level
                            tail += 1
                            dist[k], w[k] = np.inf, -np.inf
                    if goal >= 0:
                        break
            if goal >= 0:
                break
            if done == tail:  # the next level
                nearest = splat(np.inf)
                for j in range(0, m, WIDTH):
                    nearest = minimum(load(dist, j), nearest)
                level = reduce_minimum(nearest)
                if not level < np.inf:
                    found = False
                    break
                limit = splat(level)
                for j in range(0, m, WIDTH):
                    bits = less_equal_mask(load(dist, j), limit)
                    if bits != 0:
                        free = less_equal_mask(add(load(dist, j), load(taken, j)), limit)
                        if free != 0:
                            goal = j + ctz(free)
                            break
                        while bits != 0:
                            k = j + ctz(bits)
                            bits &= bits - 1
                            queue[tail], final[tail] = k, level
                            tail += 1
                            dist[k], w[k] = np.inf, -np.inf
                if goal >= 0:
                    break
            k = queue[done]
            done += 1
            i = head[k]
            while i >= 0:
                waiting[waits], base_of[waits] = i, level - (sign * np.float64(c[i * m + k]) - v[k])
                waits += 1
                i = following[i]
        counts[SEARCHES] += 1
        for s in range(tail):
            k = queue[s]
            if found:
                v[k] += min(final[s] - level, 0.0)  # rounding must not raise it: duals only fall
            w[k] = v[k]
        if not found:
            return source
        used[goal] += 1
        if used[goal] == room[goal]:
            taken[goal] = np.inf
        k = goal
        while True:
            i = np.int64(came_from[k])
            old = col_of[i]
            if old >= 0:
                _leave(i, old, head, following, before)
            col_of[i] = k
            _join(i, k, head, following, before)
            k = old
            if i == source:
                break
    return -1
