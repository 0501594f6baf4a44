"""Shortest augmenting paths over whole rows, level by level (Jonker and Volgenant 1987).

A level is a distance. All columns at the present level are scanned before a larger distance is looked for, and a free
column at that level ends the search at once. Equal entries therefore cost no search among themselves.

Columns are searched in whole vectors; arrays over columns have ``width`` elements, the number of columns rounded up to whole
vectors.
"""

from __future__ import annotations

from typing import NamedTuple

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
    load_part,
    minimum,
    reduce_minimum,
    select,
    splat,
    store,
)
from fastmatch_kernels.lap.state import POPS, SEARCHES

__all__ = ["level_columns", "new_search", "path", "paths", "row_vector"]


SHORT = 64
"""Columns that a search has scanned before it looks at distances first and writes them only where a row brings some nearer. Before
that, most rows do, and a processor mispredicts where."""

LINE, PAGE = 8, 512
"""float64 in a line and in a page of memory."""


class Search(NamedTuple):
    """The workspace of :func:`path`. Between searches, ``w`` equals the duals, and -inf beyond the columns."""

    w: np.ndarray  # (width,) float64: v, and -inf once a column is scanned
    dist: np.ndarray  # (width,) float64: distance of a column, inf once it is scanned
    final: np.ndarray  # (width,) float64: distances of the columns in the queue
    came_from: np.ndarray  # (width,) float64: the row before a column on its path
    queue: np.ndarray  # (width,) int64: columns to scan
    taken: np.ndarray  # (width,) float64: 0 for free columns, else inf


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def row_vector(c, at, j, m, fill):  # pragma: no cover - compiled
    """Return entries j..j+7 of the row at ``at``, and ``fill`` beyond its m columns."""
    if j + WIDTH <= m:
        return load(c, at + j)
    return load_part(c, at + j, m - j, fill)


@njit(nogil=True, cache=True, inner=True)
def new_search(state):  # pragma: no cover - compiled
    """Return the workspace of :func:`path`."""
    v, row_of = state.v, state.row_of
    m = row_of.shape[0]
    width = (m + WIDTH - 1) // WIDTH * WIDTH
    # Vectors that begin within a line are read in two parts. Stores hold up reads from the same place in another page.
    stride = (width + PAGE - 1) // PAGE * PAGE + PAGE // 5 // LINE * LINE
    room = np.empty(5 * stride + LINE)
    at = -room.ctypes.data // 8 % LINE
    w, dist, final = room[at : at + width], room[at + stride :][:width], room[at + 2 * stride :][:width]
    came_from, taken = room[at + 3 * stride :][:width], room[at + 4 * stride :][:width]
    queue = np.empty(width, np.int64)
    for j in range(width):
        w[j] = v[j] if j < m else -np.inf
        taken[j] = 0.0 if j < m and row_of[j] < 0 else np.inf
    return Search(w, dist, final, came_from, queue, taken)


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def _scan(c, at, sign, m, base, i, first, short, w, dist, came_from):  # pragma: no cover - compiled
    """Update all distances through row i; return the least distance and a column that has it.

    Scanned columns have w = -inf and dist = inf. ``first``: it is the search's first row, and distances are new. ``short``: most rows
    bring some column nearer.
    """
    signs, shift, row = splat(sign), splat(base), splat(np.float64(i))
    nearest = splat(np.inf)
    for j in range(0, m, WIDTH):
        x = add(shift, difference(signs, row_vector(c, at, j, m, sign * np.inf), load(w, j)))
        if first:
            store(came_from, j, row)
            store(dist, j, x)
        else:
            old = load(dist, j)
            if short or less_mask(x, old) != 0:
                store(came_from, j, select(x, old, row, load(came_from, j)))
                store(dist, j, minimum(x, old))
            x = minimum(x, old)
        nearest = minimum(x, nearest)
    low = reduce_minimum(nearest)
    j = ctz(less_equal_mask(nearest, splat(low)))
    while dist[j] > low:
        j += WIDTH
    return low, j


@njit(nogil=True, cache=True, inner=True, borrows=True)
def _scan_zeros(m, i, first, w, dist, came_from):  # pragma: no cover - compiled
    """Do what :func:`_scan` does, for row i of zeros: after the first one, another brings no column nearer."""
    if first:
        for j in range(w.shape[0]):
            dist[j] = -w[j]
            came_from[j] = i
    nearest = splat(np.inf)
    for j in range(0, m, WIDTH):
        nearest = minimum(load(dist, j), nearest)
    low = reduce_minimum(nearest)
    j = 0
    while dist[j] > low:
        j += 1
    return low, j


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def _enqueue(j, low, w, dist, final, queue, tail):  # pragma: no cover - compiled
    """Append column j, at distance ``low``, to the queue of columns to scan; return the queue's end."""
    queue[tail] = j
    final[tail] = low
    dist[j] = np.inf
    w[j] = -np.inf
    return tail + 1


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def _collect(m, low, taken, w, dist, final, queue, tail):  # pragma: no cover - compiled
    """Enqueue all columns at distance ``low``, up to a free one; return (a free one or -1, the queue's end)."""
    level = splat(low)
    for j in range(0, m, WIDTH):
        bits = less_equal_mask(load(dist, j), level)
        if bits != 0:
            free = less_equal_mask(add(load(dist, j), load(taken, j)), level)
            if free != 0:
                return j + ctz(free), tail
            while bits != 0:
                tail = _enqueue(j + ctz(bits), low, w, dist, final, queue, tail)
                bits &= bits - 1
    return -1, tail


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def _scan_level(
    c, at, sign, m, base, i, low, short, row_of, w, dist, came_from, final, queue, tail
):  # pragma: no cover
    """Update distances through row i, enqueueing the columns it brings to ``low``; return as :func:`_collect` does."""
    signs, shift, row, level = splat(sign), splat(base), splat(np.float64(i)), splat(low)
    for j in range(0, m, WIDTH):
        x = add(shift, difference(signs, row_vector(c, at, j, m, sign * np.inf), load(w, j)))
        old = load(dist, j)
        if short or less_mask(x, old) != 0:
            store(came_from, j, select(x, old, row, load(came_from, j)))
            store(dist, j, minimum(x, old))
            now = less_equal_mask(x, level)
            while now != 0:
                k = j + ctz(now)
                now &= now - 1
                if row_of[k] < 0:
                    return k, tail
                tail = _enqueue(k, low, w, dist, final, queue, tail)
    return -1, tail


@njit(nogil=True, cache=True, inner=True, borrows=True)
def path(costs, state, source, search, tied):  # pragma: no cover - compiled
    """Augment along a shortest path from row ``source``; return (whether there is one, whether distances tied).

    ``tied`` tells whether they did in the search before. If so, all columns at a new level are looked for at once; if not,
    only after a second one has turned up.

    Row n, beyond the last one, is a row of zeros. Its paths come last: where they pass a column that another row of zeros has,
    they do not go on from that one.
    """
    c, start, n, m, sign = costs
    v, row_of, col_of, counts = state.v, state.row_of, state.col_of, state.counts
    w, dist, final, came_from, queue, taken = search
    head = tail = np.int64(0)  # numba would compile all callees once more for the literal 0
    i, base, level, goal = source, 0.0, -np.inf, -1
    found = True
    tied_now = False
    while True:
        at, short = start + i * m, head < SHORT
        if head < tail:
            if i < n:
                goal, tail = _scan_level(
                    c, at, sign, m, base, i, level, short, row_of, w, dist, came_from, final, queue, tail
                )
        else:
            if i < n:
                low, j = _scan(c, at, sign, m, base, i, head == 0, short, w, dist, came_from)
            else:
                low, j = _scan_zeros(m, i, head == 0, w, dist, came_from)
            if not low < np.inf:
                found = False
                break
            if low <= level or tied:
                before = tail
                goal, tail = _collect(m, low, taken, w, dist, final, queue, tail)
                tied_now |= low <= level or tail > before + 1
            elif row_of[j] < 0:
                goal = j
            else:
                tail = _enqueue(j, low, w, dist, final, queue, tail)
            level = low
        if goal >= 0:
            break
        j = queue[head]
        head += 1
        i = row_of[j]
        if i < n:
            base = level - (sign * np.float64(c[start + i * m + j]) - v[j])
    counts[POPS] += head
    counts[SEARCHES] += 1
    for s in range(tail):
        j = queue[s]
        if found:
            v[j] += min(final[s] - level, 0.0)  # rounding must not raise it: duals only fall
        w[j] = v[j]
    if not found:
        return False, tied_now
    taken[goal] = np.inf
    j = goal
    while True:
        i = np.int64(came_from[j])
        row_of[j] = i
        if i < n:
            following = col_of[i]
            col_of[i] = j
            j = following
        if i == source:
            return True, tied_now


@njit(nogil=True, cache=True)
def paths(costs, state, order, at, limit):  # pragma: no cover - compiled
    """Augment from the rows ``order[at:]`` until ``limit`` rows are scanned; return where to go on, -1 - i without a path."""
    search, counts = new_search(state), state.counts
    end = counts[POPS] + counts[SEARCHES] + limit
    tied = at < 0  # numba would compile all callees once more for the literal False
    while at < order.shape[0] and counts[POPS] + counts[SEARCHES] < end:
        found, tied = path(costs, state, order[at], search, tied)
        if not found:
            return -1 - order[at]
        at += 1
    return at


@njit(nogil=True, cache=True)
def level_columns(costs, state, limit):  # pragma: no cover - compiled
    """Give unmatched columns the same dual, the largest one, as a problem of more columns than rows demands; return it,
    or inf if that takes more than ``limit`` scans, or is expected to take twice as many after a sixteenth of them.

    That is done along paths from rows of zeros: they take the columns that are left, cost the same in every assignment, and demand just
    that of the columns that they take. So a problem with a few more columns than rows is solved as a square one, without these
    rows in any matrix. If no dual is above an unmatched column's, there is nothing to do.
    """
    n, m, v, row_of, counts = costs.n, costs.m, state.v, state.row_of, state.counts
    low, high = np.inf, -np.inf
    for j in range(m):
        high = max(high, v[j])
        if row_of[j] < 0:
            low = min(low, v[j])
    if low < high:
        left = m - n
        for j in range(m):
            if row_of[j] < 0 and v[j] == high:  # the path is that column
                row_of[j] = n
                left -= 1
        search = new_search(state)
        tied = n < 0  # numba would compile all callees once more for the literal False
        before = counts[POPS]
        for done in range(left):
            scans = np.float64(counts[POPS] - before - done)
            if scans > limit or (scans > limit / 16.0 and scans * left > 2.0 * limit * done):
                return np.inf
            _, tied = path(costs, state, n, search, tied)
        low = np.inf
        for j in range(m):
            if row_of[j] == n:
                row_of[j] = -1
                low = min(low, v[j])
        for j in range(m):
            v[j] = min(v[j], low)  # rounding may leave some above
    return low
