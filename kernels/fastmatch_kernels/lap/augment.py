"""Shortest augmenting paths over candidate lists (Jonker and Volgenant 1987, by Dijkstra's algorithm with a heap)."""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels._numba.simd import WIDTH, add, ctz, difference, gather, less_mask, load, splat
from fastmatch_kernels.lap.heap import pop, sift_up
from fastmatch_kernels.lap.rows import list_row, workspace
from fastmatch_kernels.lap.state import FREE, POPS, READS, SEARCHES

__all__ = ["augment"]

MISSING = 32
"""Rows that a stuck search notes for a refill before it stops for this sweep."""


@njit(nogil=True, cache=True)
def augment(
    C, sign, v, lists, matching, sources, at, limit, refills, waits, paths, counts
):  # pragma: no cover - compiled
    """Search from the free rows ``sources[at:]`` until ``limit`` units of work are spent; return (at, waits).

    A unit is a popped item or 1/32 of a row's columns. ``at`` is the next source, or -1 - i if row i cannot be matched.
    ``waits`` is the number of rows in ``refills.pending``, always 0 with a matrix.

    Distances are reduced by the duals. A row enters with its list and, as a marker on the heap, the least distance that
    anything outside the list could have. A free column's distance is an upper bound: nothing at or above it goes on the
    heap, and the search ends when the least key reaches it.

    A marker that comes up first means that the list does not settle the search. With a matrix the row gets a new list; if
    its marker comes up again in the same search, all its columns are relaxed. Without one, the row is noted, the search
    notes what else is missing, and the source stays free until the caller has refilled those rows. Any other source is
    still searched exactly.
    """
    start, length, cols, costs, bound = lists
    row_of, col_of, cost_of = matching
    pending, waiting = refills
    key, heap, where, touched, came_from, via, scanned, base_of, read_in = paths
    m = v.shape[0]
    one, signs = splat(1.0), splat(sign)
    room = workspace(m)
    free, frees = np.empty(m, np.int64), 0  # the free columns; only searches over a matrix ask for them
    if C is not None:
        for j in range(m):
            free[frees] = j
            frees += row_of[j] < 0
    work = 0
    while at < sources.shape[0] and work <= limit:
        source = sources[at]
        at += 1
        if col_of[source] != FREE:
            continue
        counts[SEARCHES] += 1
        size, touches, scans, missing = 0, 0, 0, 0
        best, goal = np.inf, -1
        row, base = source, 0.0
        while True:
            base_of[row] = base
            shift, below = splat(base), splat(best)
            first = start[row]
            for e in range(first, first + length[row], WIDTH):
                near = less_mask(add(shift, difference(one, load(costs, e), gather(v, cols, e))), below)
                while near != 0:
                    entry = e + ctz(near)
                    near &= near - 1
                    j = np.int64(cols[entry])
                    x = base + (np.float64(costs[entry]) - v[j])
                    if x < best and x < key[j] and where[j] != -2:
                        came_from[j] = row
                        if C is None:
                            via[j] = entry
                        if row_of[j] < 0:
                            best, goal = x, j
                            continue
                        # The heap's push is written out: as a function, inlined by numba or by LLVM, it makes searches of
                        # 500 x 500 Gaussian entries 1.5 times slower.
                        key[j] = x
                        if where[j] < 0:
                            touched[touches] = j
                            touches += 1
                            where[j] = size
                            heap[size] = j
                            size += 1
                        sift_up(heap, where, key, where[j])
            work += length[row] >> 5
            x = base + bound[row]
            if x < best:
                item = m + row
                key[item] = x
                touched[touches] = item
                touches += 1
                heap[size] = item
                where[item] = size
                size += 1
                sift_up(heap, where, key, where[item])
            # The nearest column, or a row whose list is used up.
            row = -1
            while size > 0 and key[heap[0]] < best:
                item = pop(heap, where, key, size)
                size -= 1
                work += 1
                if item < m:
                    if missing < MISSING:
                        scanned[scans] = item
                        scans += 1
                        row = row_of[item]
                        base = key[item] - (cost_of[row] - v[item])
                    break
                i = item - m
                if C is None:
                    missing += 1
                    if not waiting[i]:
                        waiting[i] = 1
                        pending[waits] = i
                        waits += 1
                else:
                    values, here = C[i], base_of[i]
                    # Free columns first: if they are few, that is quick, and one as near as the marker ends the search.
                    again = read_in[i] == source
                    if again or frees < m >> 3:
                        for f in range(frees):
                            j = free[f]
                            x = here + (sign * np.float64(values[j]) - v[j])
                            if x < best:
                                came_from[j] = i
                                best, goal = x, j
                        if best <= key[item]:
                            break
                    counts[READS] += 1
                    work += m >> 5
                    if not again:
                        list_row(C, sign, i, v, room, start, cols, costs, bound)
                        read_in[i] = source
                        row, base = i, here
                        break
                    shift, below = splat(here), splat(best)
                    for first in range(0, m, WIDTH):
                        if first + WIDTH <= m:
                            near = less_mask(
                                add(shift, difference(signs, load(values, first), load(v, first))), below
                            )
                        else:
                            near = (1 << (m - first)) - 1
                        while near != 0:
                            j = first + ctz(near)
                            near &= near - 1
                            x = here + (sign * np.float64(values[j]) - v[j])
                            if x < best and x < key[j] and where[j] != -2:
                                came_from[j] = i
                                key[j] = x
                                if where[j] < 0:
                                    touched[touches] = j
                                    touches += 1
                                    where[j] = size
                                    heap[size] = j
                                    size += 1
                                sift_up(heap, where, key, where[j])
            if row < 0:
                break
        counts[POPS] += scans
        found = missing == 0 and goal >= 0
        if found:
            for s in range(scans):
                j = scanned[s]
                v[j] += min(key[j] - best, 0.0)  # rounding must not raise it: duals only fall
        for t in range(touches):
            key[touched[t]] = np.inf
            where[touched[t]] = -1
        if found:
            if C is not None:
                f = 0
                while free[f] != goal:
                    f += 1
                frees -= 1
                free[f] = free[frees]
            j = goal
            while True:
                i = came_from[j]
                row_of[j] = i
                following = col_of[i]
                col_of[i] = j
                if C is None:
                    cost_of[i] = costs[via[j]]
                else:
                    cost_of[i] = sign * np.float64(C[i, j])
                j = following
                if i == source:
                    break
        elif missing == 0:
            return -1 - source, waits
    return at, waits
