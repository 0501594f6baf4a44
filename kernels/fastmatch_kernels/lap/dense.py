"""Numba phases of the dense assignment solver; the plan that strings them together is fastmatch.assignment.dense.

Minimisation over an (n, m) matrix with n <= m. ``sign`` is 1 or -1 (a maximisation), so that no negated
copy is made: everything below speaks of costs ``c = sign * C``. Column duals ``v`` are float64 and only ever
fall; row duals are implied, ``u_i = min_j c_ij - v_j``.

Each row holds a *shortlist*: the columns of smallest ``c - v`` when it was last read, and a bound on all
others. Since v only falls, ``c - v`` only rises, and the bound stays valid: a row is read again only when a
decision is not settled by its list. That is what makes most of the matrix be read only once.

Arrays that belong to one solve, allocated by the caller:

=============  ================  =====================================================================
v              (m,) float64      column duals
near           (n, CAPACITY) i4  shortlist columns
near_cost      like near, C's    their costs c, in C's dtype; inf behind the last
bound          (n,) float64      least c - v outside the list when it was read; inf if nothing is outside
row_of         (m,) intp         row matched to a column, -1 if free
col_of         (n,) intp         column matched to a row; FREE, or ASIDE for a row left out for now
cost_of        (n,) float64      cost of a row's match
counts         (4,) int64        rows read again, bids, columns popped, searches
=============  ================  =====================================================================
"""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels._numba.simd import (
    WIDTH,
    add,
    ctz,
    difference,
    gather,
    less_equal_mask,
    less_mask,
    load,
    maximum,
    minimum,
    reduce_minimum,
    replace_at_most,
    splat,
)
from fastmatch_kernels.lap.passes import CAPACITY, list_row, row_minimum, workspace

__all__ = [
    "ASIDE",
    "BIDS",
    "FREE",
    "POPS",
    "READS",
    "SEARCHES",
    "auction",
    "augment",
    "best_two",
    "column_reduction",
    "pop",
    "row_duals",
    "row_reduction",
    "sift_up",
    "tie_reduction",
]

FREE, ASIDE = -1, -3

READS, BIDS, POPS, SEARCHES = range(4)


@njit(nogil=True, cache=True)
def column_reduction(C, sign, v, row_at, row_of, col_of, cost_of):  # pragma: no cover - compiled
    """Gives columns to the rows that have their minima, first come (Jonker and Volgenant 1987)."""
    for j in range(v.shape[0]):
        i = row_at[j]
        if i >= 0 and v[j] > -np.inf and col_of[i] == FREE:
            row_of[j] = i
            col_of[i] = j
            cost_of[i] = sign * np.float64(C[i, j])


@njit(nogil=True, cache=True)
def tie_reduction(C, sign, v, patience, row_of, col_of, cost_of, counts):  # pragma: no cover - compiled
    """Gives free rows a free column whose minimum they share, as entries with few values have; v are column minima.

    Each row is read as far as the first such column, from a place of its own. Ends once ``patience`` rows more
    than found one have not.
    """
    m = v.shape[0]
    signs, zero = splat(sign), splat(0.0)
    scanned = 0
    for i in range(col_of.shape[0]):
        if col_of[i] != FREE:
            continue
        if patience < 0:
            break
        patience -= 1
        row = C[i]
        start = i * WIDTH * 5 % m
        start -= start % WIDTH
        for half in range(2):
            lo, hi = (start, m) if half == 0 else (0, start)
            for j in range(lo, hi, WIDTH):
                scanned += WIDTH
                if j + WIDTH <= m:
                    bits = less_equal_mask(difference(signs, load(row, j), load(v, j)), zero)
                else:
                    bits = (1 << (m - j)) - 1
                while bits != 0:
                    column = j + ctz(bits)
                    bits &= bits - 1
                    x = sign * np.float64(row[column])
                    if row_of[column] < 0 and x == v[column]:
                        row_of[column] = i
                        col_of[i] = column
                        cost_of[i] = x
                        patience += 2
                        break
                if col_of[i] != FREE:
                    break
            if col_of[i] != FREE:
                break
    counts[READS] += scanned // m


@njit(nogil=True, cache=True)
def row_duals(C, sign, lo, hi, v, near, near_cost, bound, u):  # pragma: no cover - compiled
    """u_i = the least c - v of rows lo..hi, by their lists where these can tell; returns how many rows were read.

    A matched row without a list has the least at its column: the bound.
    """
    read = 0
    for i in range(lo, hi):
        u[i], _place, _second = _two_best(v, near[i], near_cost[i])
        if u[i] == np.inf:
            u[i] = bound[i]
        elif u[i] > bound[i]:
            u[i] = row_minimum(C[i], sign, v)
            read += 1
    return read


@njit(nogil=True, cache=True)
def _two_best(v, items, costs):  # pragma: no cover - compiled
    """(least, its place in the list, second least) of c - v in a row's list, which is three vectors long."""
    one = splat(1.0)
    a = difference(one, load(costs, 0), gather(v, items, 0))
    b = difference(one, load(costs, WIDTH), gather(v, items, WIDTH))
    c = difference(one, load(costs, 2 * WIDTH), gather(v, items, 2 * WIDTH))
    low = minimum(a, b)
    first = minimum(low, c)
    second = minimum(maximum(a, b), maximum(low, c))  # of each lane
    lowest = reduce_minimum(first)
    limit = splat(lowest)
    holders = less_equal_mask(a, limit)
    holders |= less_equal_mask(b, limit) << WIDTH
    holders |= less_equal_mask(c, limit) << (2 * WIDTH)
    if holders & (holders - 1) != 0:
        return lowest, ctz(holders), lowest
    return lowest, ctz(holders), reduce_minimum(replace_at_most(first, limit, second))


@njit(nogil=True, cache=True)
def best_two(v, near, near_cost, bound, col_of, stale):  # pragma: no cover - compiled
    """Marks rows whose lists do not tell their best two; returns the mean difference between the two of the others."""
    total, told = 0.0, 0
    for i in range(col_of.shape[0]):
        if col_of[i] != ASIDE:
            first, _place, second = _two_best(v, near[i], near_cost[i])
            stale[i] = second > bound[i]
            if second <= bound[i] and second < np.inf:
                total += second - first
                told += 1
    return total / told if told > 0 else 0.0


@njit(nogil=True, cache=True)
def auction(
    C, sign, v, near, near_cost, bound, row_of, col_of, cost_of, stack, top, eps, limit, counts
):  # pragma: no cover - compiled
    """Gauss-Seidel auction: the rows on ``stack[:top]`` bid until all are matched or ``limit`` bids are spent.

    A row takes its best column and lowers its dual until the column is ``eps`` worse than the row's second
    best. With ``eps`` = 0 this is augmenting row reduction (Jonker and Volgenant 1987), which need not end:
    a row whose two best tie is then left free. Returns the rows still on the stack; rows given up on have
    ``col_of`` -1 and are not on it.
    """
    work = workspace(v.shape[0])
    bids = 0
    while top > 0 and bids < limit:
        top -= 1
        i = stack[top]
        bids += 1
        first, place, second = _two_best(v, near[i], near_cost[i])
        if second > bound[i]:
            list_row(C, sign, i, v, work, near, near_cost, bound)
            counts[READS] += 1
            bids += v.shape[0] // 512  # a read is work too: slices stay short
            first, place, second = _two_best(v, near[i], near_cost[i])
            second = min(second, bound[i])
        if not second < np.inf:
            continue  # one allowed column or none: the shortest paths decide
        j = near[i, place]
        old = row_of[j]
        if eps == 0.0 and old >= 0 and first == second:
            continue
        v[j] -= (second - first) + eps
        row_of[j] = i
        col_of[i] = j
        cost_of[i] = near_cost[i, place]
        if old >= 0:
            col_of[old] = -1
            stack[top] = old
            top += 1
    counts[BIDS] += bids
    return top


@njit(nogil=True, cache=True)
def row_reduction(v, near, near_cost, bound, row_of, col_of, cost_of):  # pragma: no cover - compiled
    """Matches every free row that has a free column among its best, at no change of the duals."""
    for i in range(col_of.shape[0]):
        if col_of[i] != FREE:
            continue
        first, _place, _second = _two_best(v, near[i], near_cost[i])
        if first < np.inf and first <= bound[i]:
            for e in range(CAPACITY):  # any free column among the equally good will do
                j = near[i, e]
                if row_of[j] < 0 and near_cost[i, e] - v[j] == first:
                    row_of[j] = i
                    col_of[i] = j
                    cost_of[i] = near_cost[i, e]
                    break


# An indexed binary heap: items are columns 0..m-1 and markers m..m+n-1 (row i's list ends here).


@njit(nogil=True, cache=True)
def sift_up(heap, where, key, at):  # pragma: no cover - compiled
    """Moves the item at place ``at`` up until its parent is no larger."""
    item = heap[at]
    k = key[item]
    while at > 0:
        parent = (at - 1) >> 1
        other = heap[parent]
        if key[other] <= k:
            break
        heap[at] = other
        where[other] = at
        at = parent
    heap[at] = item
    where[item] = at


@njit(nogil=True, cache=True)
def pop(heap, where, key, size):  # pragma: no cover - compiled
    """Removes the least item; returns it. The heap holds size - 1 items afterwards."""
    least = heap[0]
    where[least] = -2
    last = heap[size - 1]
    size -= 1
    if size > 0:
        k = key[last]
        at = 0
        while True:
            child = 2 * at + 1
            if child >= size:
                break
            if child + 1 < size and key[heap[child + 1]] < key[heap[child]]:
                child += 1
            if key[heap[child]] >= k:
                break
            heap[at] = heap[child]
            where[heap[at]] = at
            at = child
        heap[at] = last
        where[last] = at
    return least


@njit(nogil=True, cache=True)
def augment(
    C, sign, v, near, near_cost, bound, row_of, col_of, cost_of, start, limit, counts,
    key, heap, where, came_from, base_of, touched, scanned, read_in,
):  # pragma: no cover - compiled  # fmt: skip
    """Shortest augmenting paths from the free rows start..n until ``limit`` units of work are spent.

    Dijkstra over columns with costs reduced by the duals. A row enters with its shortlist and, as a marker, the
    least distance that anything outside the list could have. When the marker comes up the row gets a new list; when it
    does again, in the same search, all its columns are relaxed. A free column's distance is an upper bound:
    nothing at or above it is put on the heap, and the search ends when the least key reaches it.

    ``key``, ``where`` (m + n), ``heap`` (m + n), ``came_from`` (m), ``base_of`` (n), ``touched`` (2 (m + n)),
    ``scanned`` (m) and ``read_in`` (n, the search that listed a row) are workspace; ``key`` must be inf, ``where``
    and ``read_in`` -1 throughout.

    Returns the row to go on with (n when done), or -1 - i when row i cannot be matched.
    """
    n, m = col_of.shape[0], v.shape[0]
    room = workspace(m)
    signs, one = splat(sign), splat(1.0)
    free = np.empty(m, np.intp)
    frees = 0
    for j in range(m):
        free[frees] = j
        frees += row_of[j] < 0
    work = 0
    for source in range(start, n):
        if col_of[source] != FREE:
            continue
        if work > limit:
            return source
        counts[SEARCHES] += 1
        size, touches, scans = 0, 0, 0
        best, goal = np.inf, -1
        row, base = source, 0.0
        while True:
            base_of[row] = base
            # The row's shortlist. (The steps stand here twice: as a function they cost a fifth more.)
            shift, below = splat(base), splat(best)
            items, costs = near[row], near_cost[row]
            bits = 0
            for e in range(0, CAPACITY, WIDTH):
                x = add(shift, difference(one, load(costs, e), gather(v, items, e)))
                bits |= less_mask(x, below) << e
            while bits != 0:
                e = ctz(bits)
                bits &= bits - 1
                j = items[e]
                x = base + (np.float64(costs[e]) - v[j])
                if x < best and x < key[j] and where[j] != -2:
                    came_from[j] = row
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
                    scanned[scans] = item
                    scans += 1
                    row = row_of[item]
                    base = key[item] - (cost_of[row] - v[item])
                    break
                i = item - m
                here = base_of[i]
                values, shift = C[i], splat(here)
                # Free columns first: what is not nearer than the nearest need not be looked at. If they are few,
                # that is quick, and one as near as the marker ends the search.
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
                    list_row(C, sign, i, v, room, near, near_cost, bound)
                    read_in[i] = source
                    row, base = i, here
                    break
                below = splat(best)
                for first in range(0, m, WIDTH):
                    if first + WIDTH <= m:
                        x = add(shift, difference(signs, load(values, first), load(v, first)))
                        lower = less_mask(x, below)
                    else:
                        lower = (1 << (m - first)) - 1
                    while lower != 0:
                        j = first + ctz(lower)
                        lower &= lower - 1
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
        if goal < 0:
            return -1 - source
        counts[POPS] += scans
        for s in range(scans):
            j = scanned[s]
            v[j] += key[j] - best
        for t in range(touches):
            key[touched[t]] = np.inf
            where[touched[t]] = -1
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
            cost_of[i] = sign * np.float64(C[i, j])
            j = following
            if i == source:
                break
    return n
