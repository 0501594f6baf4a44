"""Many small assignment problems: one after the other in a core's cache, the lock released.

Each is solved by column reduction, augmenting row reduction and shortest augmenting paths over the whole row
(Jonker and Volgenant 1987): at these sizes a row is a few vectors, and a list would cost more than it saves.
"""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["solve_stack"]


@njit(nogil=True, cache=True)
def solve_stack(C, sign, lo, hi, out, bad):  # pragma: no cover - compiled
    """Solves problems lo..hi of the stack C (batch, n, m), n <= m: out[b, i] is row i's column.

    bad[b] is 1 for NaN or an infinity of the wrong sign, 2 where forbidden entries leave no assignment, else 0.
    """
    n, m = np.uintp(C.shape[1]), np.uintp(C.shape[2])
    c = np.empty((n, m))
    v, dist = np.empty(m), np.empty(m)
    row_of, col_of = np.empty(m, np.intp), np.empty(n, np.intp)
    came_from, left = np.empty(m, np.intp), np.empty(m, np.intp)
    free = np.empty(n, np.intp)
    for b in range(lo, hi):
        wrong = 0
        for i in range(n):
            for j in range(m):
                x = sign * np.float64(C[b, i, j])
                c[i, j] = x
                wrong += not (x > -np.inf)
        bad[b] = 1 if wrong else 0
        if wrong:
            continue
        for j in range(m):
            v[j] = 0.0
            row_of[j] = -1
        for i in range(n):
            col_of[i] = -1
        if n == m:
            for j in range(m):
                v[j] = np.inf
            for i in range(n):
                for j in range(m):
                    x = c[i, j]
                    v[j] = x if x < v[j] else v[j]
            for j in range(m):
                if not v[j] < np.inf:
                    v[j] = 0.0
        waiting = 0
        for i in range(n):
            free[waiting] = i
            waiting += 1
        # Row reduction, with a bound on its steps: float ties would go on for ever.
        for _ in range(2):
            queue, at, kept, steps = waiting, 0, 0, 0
            while at < queue:
                i = free[at]
                at += 1
                steps += 1
                first, second = np.inf, np.inf
                for j in range(m):
                    x = c[i, j] - v[j]
                    y = x if x > first else first
                    second = y if y < second else second
                    first = x if x < first else first
                best = -1
                for j in range(m):
                    if c[i, j] - v[j] == first and first < np.inf:
                        best = np.intp(j)
                        if row_of[j] < 0:
                            break
                if best < 0 or not second < np.inf:
                    free[kept] = i
                    kept += 1
                    continue
                old = row_of[best]
                if old >= 0 and (first == second or steps > 4 * n):
                    free[kept] = i
                    kept += 1
                    continue
                v[best] -= second - first
                row_of[best] = i
                col_of[i] = best
                if old >= 0:
                    col_of[old] = -1
                    at -= 1
                    free[at] = old
            waiting = kept
        for w in range(waiting):
            source = free[w]
            for j in range(m):
                dist[j] = np.inf
                left[j] = j
                came_from[j] = -1
            size, low = np.intp(m), 0.0
            i, goal = source, -1
            # left[:size] are the columns not yet scanned; scanned ones are moved behind.
            while True:
                base = low - (c[i, col_of[i]] - v[col_of[i]]) if col_of[i] >= 0 else low
                least, place = np.inf, -1
                for e in range(size):
                    j = left[e]
                    x = base + (c[i, j] - v[j])
                    if x < dist[j]:
                        dist[j] = x
                        came_from[j] = i
                    if dist[j] < least or (dist[j] == least and least < np.inf and row_of[j] < 0):
                        least = dist[j]
                        place = e
                if place < 0:
                    break
                low = least
                j = left[place]
                size -= 1
                left[place] = left[size]
                left[size] = j
                if row_of[j] < 0:
                    goal = j
                    break
                i = row_of[j]
            if goal < 0:
                bad[b] = 2
                break
            for e in range(size, np.intp(m)):
                j = left[e]
                if dist[j] < low:
                    v[j] += dist[j] - low
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
