"""Many small assignment problems: one after the other in a core's cache, the lock released.

Each is solved by column reduction, augmenting row reduction and shortest augmenting paths over the whole row
(Jonker and Volgenant 1987): at these sizes a row is a few vectors, and a list would cost more than it saves.

The costs of one problem are ``sign * c``: ``c`` is flat, row i at ``start + i * width`` with the width a whole number of
vectors; what is beyond the columns is forbidden. Differences to the column duals v are float64, and so are column and row
numbers where they travel with values in vectors.
"""

from __future__ import annotations

import numpy as np
from fastmatch.kernels.cpu.lap_rows import row_minimum
from fastmatch.kernels.cpu.simd import (
    WIDTH,
    bits_not_above,
    chosen,
    difference,
    first_bit,
    greatest,
    instead_of,
    lane,
    least,
    load,
    plus,
    smallest,
    splat,
    store,
)
from numba import njit

__all__ = ["INFEASIBLE", "SOLVED", "WRONG", "row_minima", "solve_stack"]

SOLVED, WRONG, INFEASIBLE = 0, 1, 2

ROUNDS, STEPS = 2, 1
"""Rounds of row reduction, and steps in each, in rows: more would be price wars that a path settles sooner."""

ALL = (1 << WIDTH) - 1


@njit(nogil=True, cache=True, forceinline=True)
def _column_minima(c, start, sign, n, m, v):  # pragma: no cover - compiled
    """v = the least cost of every column; whether every entry of the m columns is finite."""
    width = v.shape[0]
    signs, zero, none = splat(sign), splat(0.0), splat(np.inf)
    finite = True
    for j in range(0, width, WIDTH):
        low, other, faults, extra = none, none, zero, zero  # faults: NaN where 0 times an entry is
        at = start + j
        for _ in range(n // 2):
            x = difference(signs, load(c, at), zero)
            y = difference(signs, load(c, at + width), zero)
            low = least(x, low)
            other = least(y, other)
            faults = plus(faults, difference(zero, x, zero))
            extra = plus(extra, difference(zero, y, zero))
            at += 2 * width
        if n % 2:
            x = difference(signs, load(c, at), zero)
            low = least(x, low)
            faults = plus(faults, difference(zero, x, zero))
        padding = ALL << min(m - j, WIDTH)
        finite &= (bits_not_above(plus(faults, extra), zero) | padding) & ALL == ALL
        store(v, j, least(low, other))
    return finite


@njit(nogil=True, cache=True, forceinline=True)
def _match_minima(c, start, sign, n, v, row_of, col_of, free):  # pragma: no cover - compiled
    """Gives rows a free column whose minimum they have; lists the others in ``free`` and returns how many."""
    width = v.shape[0]
    signs, zero = splat(sign), splat(0.0)
    kept = 0
    for i in range(n):
        at = start + i * width
        for j in range(0, width, WIDTH):
            bits = bits_not_above(difference(signs, load(c, at + j), load(v, j)), zero)
            while bits != 0 and row_of[j + first_bit(bits)] >= 0:
                bits &= bits - 1
            if bits != 0:
                col_of[i] = j + first_bit(bits)
                row_of[col_of[i]] = i
                break
        if col_of[i] < 0:
            free[kept] = i
            kept += 1
    return kept


@njit(nogil=True, cache=True, forceinline=True)
def _two_least(c, at, sign, v):  # pragma: no cover - compiled
    """(the least of c - v, its column, the second least, a column of that if it is the same) of the row at ``at``."""
    signs, none = splat(sign), splat(np.inf)
    first, second, column = none, none, splat(0.0)
    here, step = splat(0.0), splat(np.float64(WIDTH))
    for j in range(0, v.shape[0], WIDTH):
        x = difference(signs, load(c, at + j), load(v, j))
        second = least(greatest(first, x), second)
        column = chosen(x, first, here, column)
        first = least(x, first)
        here = plus(here, step)
    lowest = smallest(first)
    limit = splat(lowest)
    holders = bits_not_above(first, limit)
    k = first_bit(holders)
    j = np.int64(lane(column, k)) + k
    others = holders & (holders - 1)
    if others != 0:
        k = first_bit(others)
        return lowest, j, lowest, np.int64(lane(column, k)) + k
    return lowest, j, smallest(instead_of(first, limit, second)), j


@njit(nogil=True, cache=True, forceinline=True)
def _reduce_rows(c, start, sign, n, v, row_of, col_of, free, waiting):  # pragma: no cover - compiled
    """Augmenting row reduction of the rows in ``free``; returns how many are left there.

    A row takes its best column and lowers its dual to where its second best is as good.
    """
    at, kept, steps = 0, 0, 0
    while at < waiting:
        i = free[at]
        at += 1
        steps += 1
        first, j, second, tied = _two_least(c, start + i * v.shape[0], sign, v)
        if second == first and row_of[j] >= 0:
            j = tied
        old = row_of[j]
        if not second < np.inf or (old >= 0 and (second == first or steps > STEPS * n)):
            free[kept] = i
            kept += 1
            continue
        v[j] -= second - first
        row_of[j] = i
        col_of[i] = j
        if old >= 0:
            col_of[old] = -1
            at -= 1
            free[at] = old
    return kept


@njit(nogil=True, cache=True, forceinline=True)
def _relax(c, at, sign, w, base, i, dist, came_from):  # pragma: no cover - compiled
    """Distances through row i; (the least of all, its column). Columns already scanned have w = -inf, dist = inf."""
    signs, shift, row = splat(sign), splat(base), splat(np.float64(i))
    nearest, column = splat(np.inf), splat(0.0)
    here, step = splat(0.0), splat(np.float64(WIDTH))
    for j in range(0, w.shape[0], WIDTH):
        x = plus(shift, difference(signs, load(c, at + j), load(w, j)))
        old = load(dist, j)
        store(came_from, j, chosen(x, old, row, load(came_from, j)))
        x = least(x, old)
        store(dist, j, x)
        column = chosen(x, nearest, here, column)
        nearest = least(x, nearest)
        here = plus(here, step)
    low = smallest(nearest)
    k = first_bit(bits_not_above(nearest, splat(low)))
    return low, np.int64(lane(column, k)) + k


@njit(nogil=True, cache=True, forceinline=True)
def _augment(
    c, start, sign, v, row_of, col_of, source, w, dist, came_from, scanned, final
):  # pragma: no cover
    """One shortest augmenting path, from row ``source``; False if there is none."""
    width = v.shape[0]
    for j in range(width):
        w[j] = v[j]
        dist[j] = np.inf
    scans = 0
    i, base = source, 0.0
    while True:
        low, j = _relax(c, start + i * width, sign, w, base, i, dist, came_from)
        if not low < np.inf:
            return False
        if row_of[j] < 0:
            break
        scanned[scans] = j
        final[scans] = low
        scans += 1
        dist[j] = np.inf
        w[j] = -np.inf
        i = row_of[j]
        base = low - (sign * np.float64(c[start + i * width + j]) - v[j])
    for s in range(scans):
        v[scanned[s]] += final[s] - low
    while True:
        i = np.int64(came_from[j])
        row_of[j] = i
        following = col_of[i]
        col_of[i] = j
        j = following
        if i == source:
            return True


@njit(nogil=True, cache=True)
def _wrong(C, sign):  # pragma: no cover - compiled
    """Whether a problem holds NaN or an infinity that forbids nothing."""
    for i in range(C.shape[0]):
        for j in range(C.shape[1]):
            if not sign * C[i, j] > -np.inf:
                return True
    return False


@njit(nogil=True, cache=True)
def row_minima(C, sign, v, u):  # pragma: no cover - compiled
    """u = the least c - v of every row."""
    for i in range(C.shape[0]):
        u[i] = row_minimum(C[i], sign, v)


@njit(nogil=True, cache=True)
def solve_stack(C, sign, lo, hi, out, bad, duals):  # pragma: no cover - compiled
    """Solves problems lo..hi of the contiguous stack C (batch, n, m), n <= m: out[b, i] is row i's column.

    ``duals`` (batch, m) takes the column duals, those of unmatched columns the largest; (0, m) takes none.

    bad[b] is 1 for NaN or an infinity of the wrong sign, 2 where forbidden entries leave no assignment, else 0.
    """
    n, m = C.shape[1], C.shape[2]
    width = (m + WIDTH - 1) // WIDTH * WIDTH
    c = C.reshape(C.size) if m == width else np.full(n * width, sign * np.inf).astype(C.dtype)
    v, w, dist, final = np.zeros(width), np.empty(width), np.empty(width), np.empty(width)
    came_from = np.zeros(width)
    row_of, col_of = np.empty(width, np.int64), np.empty(n, np.int64)
    scanned, free = np.empty(width, np.int64), np.empty(n, np.int64)
    for b in range(lo, hi):
        start = b * n * m
        if m != width:
            start = 0
            for i in range(n):
                c[i * width : i * width + m] = C[b, i]
        bad[b] = SOLVED
        finite = _column_minima(c, start, sign, n, m, v)
        if not finite and _wrong(C[b], sign):
            bad[b] = WRONG
            continue
        for j in range(width):
            row_of[j] = -1
            if n != m or not v[j] < np.inf:
                v[j] = 0.0
        waiting = n
        for i in range(n):
            free[i] = i
            col_of[i] = -1
        if n == m:
            waiting = _match_minima(c, start, sign, n, v, row_of, col_of, free)
        for _ in range(ROUNDS):
            waiting = _reduce_rows(c, start, sign, n, v, row_of, col_of, free, waiting)
        for e in range(waiting):
            if not _augment(c, start, sign, v, row_of, col_of, free[e], w, dist, came_from, scanned, final):
                bad[b] = INFEASIBLE
                break
        for i in range(n):
            out[b, i] = col_of[i]
        if duals.shape[0] > 0:
            duals[b] = v[:m]
