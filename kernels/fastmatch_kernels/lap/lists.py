"""Numba phases of the assignment solver that sees costs through shortlists alone (factor costs).

Minimisation, n rows and m >= n columns. Row i's list is ``cols[start_i : start_i + length_i]`` with ``costs``
beside it, and ``bound_i`` is below ``c_ij - v_j`` for every j outside. Duals only fall, so bounds stay valid.
No phase reads the cost: a row whose decision its list does not settle is put into ``pending`` and passed over.
The caller reads all pending rows in one product of matrices, and calls again.

=============  ==============  =====================================================================
v              (m,) float64    column duals
start, length  (n,) int64      where a row's list lies
cols, costs    int32, float64  the pool the lists lie in
bound          (n,) float64    inf where the list holds every column
row_of         (m,) int64      row matched to a column, -1 if free
col_of         (n,) int64      column matched to a row, -1 if free
cost_of        (n,) float64    cost of a row's match
pending        (n,) int64      rows to be read again; ``waiting`` (n,) uint8 marks them
counts         (4,) int64      rows read again, bids, columns popped, searches
=============  ==============  =====================================================================
"""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels.lap.dense import pop, sift_up

__all__ = ["BIDS", "POPS", "READS", "SEARCHES", "auction", "augment", "greedy"]

READS, BIDS, POPS, SEARCHES = range(4)

PATIENCE = 32
"""Rows a stuck search may ask for before it is given up for this sweep."""


@njit(nogil=True, cache=True)
def greedy(v, start, length, cols, costs, bound, row_of, col_of, cost_of):  # pragma: no cover - compiled
    """Matches free rows to the best column of their list where that is free; duals stay as they are."""
    for i in range(col_of.shape[0]):
        if col_of[i] >= 0:
            continue
        least, at = np.inf, -1
        for e in range(start[i], start[i] + length[i]):
            x = costs[e] - v[cols[e]]
            if x < least:
                least, at = x, e
        if at >= 0 and least <= bound[i] and row_of[cols[at]] < 0:
            row_of[cols[at]] = i
            col_of[i] = cols[at]
            cost_of[i] = costs[at]


@njit(nogil=True, cache=True)
def auction(
    v,
    start,
    length,
    cols,
    costs,
    bound,
    row_of,
    col_of,
    cost_of,
    stack,
    top,
    eps,
    limit,
    pending,
    waits,
    counts,
):  # pragma: no cover - compiled
    """Gauss-Seidel auction over ``stack[:top]``, for at most ``limit`` bids; returns (top, waits).

    With ``eps`` = 0 it is augmenting row reduction (Jonker and Volgenant 1987): a row whose two best tie over
    a taken column is left free, which is what makes it end.
    """
    bids = 0
    while top > 0 and bids < limit:
        top -= 1
        i = stack[top]
        bids += 1
        first, second, at = np.inf, np.inf, -1
        for e in range(start[i], start[i] + length[i]):
            x = costs[e] - v[cols[e]]
            if x < first:
                second = first
                first = x
                at = e
            elif x < second:
                second = x
        if second > bound[i]:
            pending[waits] = i
            waits += 1
            continue
        if not second < np.inf:
            continue
        j = cols[at]
        old = row_of[j]
        if eps == 0.0 and old >= 0 and not first < second:
            continue
        lower = v[j] - ((second - first) + eps)
        if old >= 0 and not lower < v[j]:
            continue  # the step is below the dual's rounding: a price war without end
        v[j] = lower
        row_of[j] = i
        col_of[i] = j
        cost_of[i] = costs[at]
        if old >= 0:
            col_of[old] = -1
            stack[top] = old
            top += 1
    counts[BIDS] += bids
    return top, waits


@njit(nogil=True, cache=True)
def augment(
    v, start, length, cols, costs, bound, row_of, col_of, cost_of, sources, at, limit, pending, waits, waiting,
    counts, key, heap, where, came_from, via, base_of, touched, scanned,
):  # pragma: no cover - compiled  # fmt: skip
    """Shortest augmenting paths from ``sources[at:]`` until ``limit`` units of work; returns (at, waits).

    A row enters the heap a second time as a marker, item m + i, at the least distance that anything outside
    its list can have. A marker that comes up before a free column means that the list does not settle the
    search: the row goes to ``pending``, the search asks for what else it can see is missing, and the source
    stays free until the caller has read those rows. Any other source is still searched for exactly.
    """
    m = v.shape[0]
    work = 0
    while at < sources.shape[0] and work <= limit:
        source = sources[at]
        at += 1
        if col_of[source] >= 0:
            continue
        counts[SEARCHES] += 1
        size, touches, scans, asked = 0, 0, 0, 0
        best, goal = np.inf, -1
        row, base = source, 0.0
        base_of[row] = base
        while True:
            for e in range(start[row], start[row] + length[row]):
                j = np.int64(cols[e])
                x = base + (costs[e] - v[j])
                if x < best and x < key[j] and where[j] != -2:
                    came_from[j] = row
                    via[j] = e
                    if row_of[j] < 0:
                        best, goal = x, j
                        continue
                    key[j] = x
                    if where[j] < 0:
                        touched[touches] = j
                        touches += 1
                        where[j] = size
                        heap[size] = j
                        size += 1
                    sift_up(heap, where, key, where[j])
            work += length[row]
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
            found = -1
            while size > 0 and key[heap[0]] < best:
                item = pop(heap, where, key, size)
                size -= 1
                if item < m:
                    found = item
                    break
                asked += 1
                if not waiting[item - m]:
                    waiting[item - m] = 1
                    pending[waits] = item - m
                    waits += 1
            if found < 0 or asked >= PATIENCE:
                break
            scanned[scans] = found
            scans += 1
            row = row_of[found]
            base = key[found] - (cost_of[row] - v[found])
            base_of[row] = base
        counts[POPS] += scans
        work += 8 * scans
        if asked == 0 and goal >= 0:
            for s in range(scans):
                j = scanned[s]
                v[j] += key[j] - best
        for t in range(touches):
            key[touched[t]] = np.inf
            where[touched[t]] = -1
        if asked == 0 and goal >= 0:
            j = goal
            while True:
                i = came_from[j]
                row_of[j] = i
                following = col_of[i]
                col_of[i] = j
                cost_of[i] = costs[via[j]]
                j = following
                if i == source:
                    break
    return at, waits
