"""Many small assignment problems: one after the other in a core's cache, the lock released.

Each is solved by column reduction, augmenting row reduction and shortest augmenting paths over the whole row
(Jonker and Volgenant 1987): at these sizes a row is a few vectors, and a list would cost more than it saves.
"""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["solve_stack"]


# No NaN reaches these functions, and the sign of zero is nothing to them: that much leave lets minima vectorize.
LEAVE = {"nnan", "nsz"}


@njit(nogil=True, cache=True)
def _load(C, sign, c):  # pragma: no cover - compiled
    """c = sign * C in float64; False for NaN or -inf."""
    wrong = 0
    for i in range(C.shape[0]):
        for j in range(C.shape[1]):
            x = sign * np.float64(C[i, j])
            c[i, j] = x
            wrong += not (x > -np.inf)
    return wrong == 0


@njit(nogil=True, cache=True, fastmath=LEAVE)
def _least_difference(row, v, work):  # pragma: no cover - compiled
    """work = row - v; its minimum."""
    least = np.inf
    for j in range(np.uintp(v.shape[0])):
        x = row[j] - v[j]
        work[j] = x
        least = x if x < least else least
    return least


@njit(nogil=True, cache=True, fastmath=LEAVE)
def _least(x):  # pragma: no cover - compiled
    least = np.inf
    for j in range(np.uintp(x.shape[0])):
        least = x[j] if x[j] < least else least
    return least


@njit(nogil=True, cache=True, fastmath=LEAVE)
def _relax(row, w, base, i, dist, came_from):  # pragma: no cover - compiled
    """Distances through row i; the least of all columns not yet scanned (those have w = -inf and dist = inf)."""
    least = np.inf
    for j in range(np.uintp(w.shape[0])):
        x = base + (row[j] - w[j])
        d = dist[j]
        shorter = x < d
        came_from[j] = i if shorter else came_from[j]
        d = x if shorter else d
        dist[j] = d
        least = d if d < least else least
    return least


@njit(nogil=True, cache=True)
def _where(x, value):  # pragma: no cover - compiled
    """The first place of a value that occurs."""
    j = np.uintp(0)
    while x[j] != value:
        j += np.uintp(1)
    return j


@njit(nogil=True, cache=True)
def solve_stack(C, sign, lo, hi, out, bad):  # pragma: no cover - compiled
    """Solves problems lo..hi of the stack C (batch, n, m), n <= m: out[b, i] is row i's column.

    bad[b] is 1 for NaN or an infinity of the wrong sign, 2 where forbidden entries leave no assignment, else 0.
    """
    n, m = C.shape[1], C.shape[2]
    c = np.empty((n, m))
    v, w, dist, final = np.empty(m), np.empty(m), np.empty(m), np.empty(m)
    row_of, col_of = np.empty(m, np.int64), np.empty(n, np.int64)
    came_from, scanned = np.empty(m, np.int64), np.empty(m, np.int64)
    free = np.empty(n, np.int64)
    for b in range(lo, hi):
        bad[b] = 0
        if not _load(C[b], sign, c):
            bad[b] = 1
            continue
        row_of[:] = -1
        col_of[:] = -1
        v[:] = 0.0
        if n == m:
            v[:] = np.inf
            for i in range(n):
                for j in range(m):
                    v[j] = c[i, j] if c[i, j] < v[j] else v[j]
            for j in range(m):
                if not v[j] < np.inf:
                    v[j] = 0.0
        for i in range(n):
            free[i] = i
        waiting = n
        # Row reduction (ARR); its steps are bounded, since with float ties it need not end.
        for _ in range(2):
            queue, at, kept, steps = waiting, 0, 0, 0
            while at < queue:
                i = free[at]
                at += 1
                steps += 1
                first = _least_difference(c[i], v, dist)
                if not first < np.inf:
                    free[kept] = i
                    kept += 1
                    continue
                j = _where(dist, first)
                dist[j] = np.inf
                second = _least(dist)
                if second == first and row_of[j] >= 0:
                    j = _where(dist, first)  # a tie: perhaps its other column is free
                old = row_of[j]
                if (old >= 0 and (second == first or steps > 4 * n)) or not second < np.inf:
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
            waiting = kept
        for e in range(waiting):
            source = free[e]
            w[:] = v
            dist[:] = np.inf
            scans = 0
            i, base, goal = source, 0.0, -1
            low = 0.0
            while True:
                least = _relax(c[i], w, base, i, dist, came_from)
                if not least < np.inf:
                    break
                low = least
                j = np.int64(_where(dist, least))
                if row_of[j] < 0:
                    goal = j
                    break
                scanned[scans] = j
                final[scans] = least
                scans += 1
                dist[j] = np.inf
                w[j] = -np.inf
                i = row_of[j]
                base = low - (c[i, j] - v[j])
            if goal < 0:
                bad[b] = 2
                break
            for s in range(scans):
                v[scanned[s]] += final[s] - low
            j = goal
            while True:
                i = came_from[j]
                row_of[j] = i
                following = col_of[i]
                col_of[i] = j
                j = following
                if i == source:
                    break
        for i in range(n):
            out[b, i] = col_of[i]
