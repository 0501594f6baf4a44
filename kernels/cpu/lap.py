"""Numba phases of the dense assignment solver; the plan that strings them together is fastmatch.assignment.dense.

Minimisation over an (n, m) matrix with n <= m. ``sign`` is 1 or -1 (a maximisation), so that no negated
copy is made: everything below speaks of costs ``c = sign * C``. Column duals ``v`` are float64 and only ever
fall; row duals are implied, ``u_i = min_j c_ij - v_j``.

Each row holds a *shortlist*: the K columns of smallest ``c - v`` when it was last read, and a bound on all
others. Since v only falls, ``c - v`` only rises, and the bound stays valid: a row is read again only when a
decision is not settled by its list. That is what makes most of the matrix be read only once.

Arrays that belong to one solve, allocated by the caller:

=============  ==============  =====================================================================
v              (m,) float64    column duals
near           (n, K) intp     shortlist columns, -1 where a row has fewer
near_cost      (n, K) float64  their costs c
bound          (n,) float64    least c - v outside the list when it was read; inf if nothing is outside
row_of         (m,) intp       row matched to a column, -1 if free
col_of         (n,) intp       column matched to a row; FREE, or ASIDE for a row left out for now
cost_of        (n,) float64    cost of a row's match
counts         (4,) int64      rows read again, bids, columns popped, searches
=============  ==============  =====================================================================
"""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = [
    "ASIDE",
    "BIDS",
    "FREE",
    "POPS",
    "READS",
    "SEARCHES",
    "K",
    "auction",
    "augment",
    "first_read",
    "pop",
    "row_best",
    "row_minima",
    "row_reduction",
    "shortlists",
    "sift_up",
]

K = 16
"""Entries of a shortlist. Fewer cost more re-reads, more cost every bid; 12 to 24 measured alike."""

LANES = 64
DEPTH = 16
COARSE = 32
"""A row scan takes minima over strided sets of columns, 64 lanes side by side, DEPTH columns a lane: an elementwise
minimum of vectors, which compilers turn into vector instructions without leave to reorder. Only lanes whose
minimum matters are looked into one by one."""

FREE, ASIDE = -1, -3

READS, BIDS, POPS, SEARCHES = range(4)


@njit(nogil=True, cache=True, fastmath={"reassoc", "nsz"})
def first_read(C, sign, lo, hi, column_min, row_sum):  # pragma: no cover - compiled
    """Column minima of c over rows lo..hi, and row sums, which are finite only if every entry is."""
    m = C.shape[1]
    for i in range(lo, hi):
        total = 0.0
        for j in range(m):
            x = sign * np.float64(C[i, j])
            total += x
            if x < column_min[j]:
                column_min[j] = x
        row_sum[i] = total


@njit(nogil=True, cache=True)
def lanes_of(m):  # pragma: no cover - compiled
    """How many lanes a row of m columns has; lane b = s * LANES + l holds columns s * LANES * DEPTH + g * LANES + l."""
    span = LANES * DEPTH
    whole = m // span
    rest = m - whole * span
    return whole * LANES + min(rest, LANES)


@njit(nogil=True, cache=True)
def _lane_minima(row, sign, v, minima):  # pragma: no cover - compiled
    """The least c - v of every lane."""
    # Unsigned indices: a signed one could be negative, count from the end, and end vectorization.
    m, lanes, span = np.uintp(v.shape[0]), np.uintp(LANES), np.uintp(LANES * DEPTH)
    start, first = np.uintp(0), np.uintp(0)
    while start < m:
        stop = min(start + span, m)
        width = min(lanes, stop - start)
        for lane in range(width):
            j = start + lane
            minima[first + lane] = sign * np.float64(row[j]) - v[j]
        at = start + lanes
        while at + lanes <= stop:
            for lane in range(LANES):
                j = at + np.uintp(lane)
                x = sign * np.float64(row[j]) - v[j]
                y = minima[first + np.uintp(lane)]
                minima[first + np.uintp(lane)] = x if x < y else y
            at += lanes
        while at < stop:
            lane = at - start - (at - start) // lanes * lanes
            x = sign * np.float64(row[at]) - v[at]
            if x < minima[first + lane]:
                minima[first + lane] = x
            at += np.uintp(1)
        start += span
        first += lanes


@njit(nogil=True, cache=True)
def _keep_smallest(values, items, size, value, item):  # pragma: no cover - compiled
    """Puts (value, item) into a full, sorted list of ``size``; what falls out is the last."""
    at = np.uintp(size - 1)
    one = np.uintp(1)
    while at > 0 and values[at - one] > value:
        values[at] = values[at - one]
        items[at] = items[at - one]
        at -= one
    values[at] = value
    items[at] = item


@njit(nogil=True, cache=True)
def _list_row(C, sign, i, v, minima, values, items, near, near_cost, bound):  # pragma: no cover - compiled
    """Reads row i and writes its shortlist: the K smallest c - v, the next one being the bound."""
    m = v.shape[0]
    row = C[i]
    _lane_minima(row, sign, v, minima)
    lanes = minima.shape[0]
    span = LANES * DEPTH
    size = K + 1
    for e in range(size):
        values[e] = np.inf
        items[e] = -1
    # The (K + 1)-th smallest of COARSE minima over disjoint sets bounds the (K + 1)-th smallest entry from above,
    # and leaves few entries below it: about COARSE * -log(1 - (K + 1) / COARSE), 24 of them.
    limit = np.inf
    if lanes >= COARSE:
        coarse = values[size:]
        for lane in range(COARSE):
            coarse[lane] = minima[lane]
        at, step = np.uintp(COARSE), np.uintp(COARSE)
        while at + step <= np.uintp(lanes):
            for lane in range(COARSE):
                x = minima[at + np.uintp(lane)]
                y = coarse[lane]
                coarse[lane] = x if x < y else y
            at += step
        for lane in range(COARSE):
            if coarse[lane] < values[K]:
                _keep_smallest(values, items, size, coarse[lane], lane)
        limit = values[K]
        for e in range(size):
            values[e] = np.inf
            items[e] = -1
    # Rows alike in many columns (dead units) start at different places, so that they do not all list the same ones.
    worst = np.inf
    shift = (i * 7919) % lanes if lanes > 0 else 0
    for step in range(lanes):
        b = step + shift
        if b >= lanes:
            b -= lanes
        if minima[b] > limit or minima[b] >= worst:
            continue
        j = np.uintp((b // LANES) * span + b % LANES)
        stop = np.uintp(min((b // LANES + 1) * span, m))
        while j < stop:
            x = sign * np.float64(row[j]) - v[j]
            if x < worst:
                _keep_smallest(values, items, size, x, j)
                worst = values[K]
            j += np.uintp(LANES)
    for e in range(K):
        near[i, e] = items[e]
        near_cost[i, e] = sign * np.float64(row[items[e]]) if items[e] >= 0 else np.inf
    bound[i] = values[K]


@njit(nogil=True, cache=True)
def shortlists(C, sign, lo, hi, v, near, near_cost, bound):  # pragma: no cover - compiled
    """The shortlists of rows lo..hi: one read of them."""
    minima = np.empty(lanes_of(v.shape[0]))
    values = np.empty(K + 1 + COARSE)
    items = np.empty(K + 1, np.intp)
    for i in range(lo, hi):
        _list_row(C, sign, i, v, minima, values, items, near, near_cost, bound)


@njit(nogil=True, cache=True)
def row_minima(C, sign, lo, hi, v, out):  # pragma: no cover - compiled
    """out_i = min_j c_ij - v_j over rows lo..hi: one read of them."""
    minima = np.empty(lanes_of(v.shape[0]))
    for i in range(lo, hi):
        _lane_minima(C[i], sign, v, minima)
        least = np.inf
        for b in range(minima.shape[0]):
            least = min(least, minima[b])
        out[i] = least


@njit(nogil=True, cache=True)
def row_best(C, sign, lo, hi, v, least, column):  # pragma: no cover - compiled
    """The least c - v of rows lo..hi and a column that has it: one read of them."""
    m = v.shape[0]
    minima = np.empty(lanes_of(m))
    span = LANES * DEPTH
    for i in range(lo, hi):
        row = C[i]
        _lane_minima(row, sign, v, minima)
        best, at = np.inf, 0
        for b in range(minima.shape[0]):
            if minima[b] < best:
                best, at = minima[b], b
        least[i] = best
        column[i] = -1
        if best < np.inf:
            j = np.uintp((at // LANES) * span + at % LANES)
            while sign * np.float64(row[j]) - v[j] != best:
                j += np.uintp(LANES)
            column[i] = j


@njit(nogil=True, cache=True)
def _two_best(i, v, near, near_cost):  # pragma: no cover - compiled
    """(least, its place in the list, second least) of c - v in row i's list."""
    first, second, place = np.inf, np.inf, -1
    for e in range(K):
        j = near[i, e]
        if j < 0:
            break
        x = near_cost[i, e] - v[j]
        if x < first:
            second = first
            first = x
            place = e
        elif x < second:
            second = x
    return first, place, second


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
    minima = np.empty(lanes_of(v.shape[0]))
    values = np.empty(K + 1 + COARSE)
    items = np.empty(K + 1, np.intp)
    bids = 0
    while top > 0 and bids < limit:
        top -= 1
        i = stack[top]
        bids += 1
        first, place, second = _two_best(i, v, near, near_cost)
        if second > bound[i]:
            _list_row(C, sign, i, v, minima, values, items, near, near_cost, bound)
            counts[READS] += 1
            bids += v.shape[0] // 512  # a read is work too: slices stay short
            first, place, second = _two_best(i, v, near, near_cost)
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
def row_reduction(C, sign, v, near, near_cost, bound, row_of, col_of, cost_of, counts):  # pragma: no cover
    """Matches every free row that has a free column among its best, at no change of the duals; returns how many are left."""
    left = 0
    for i in range(col_of.shape[0]):
        if col_of[i] != FREE:
            continue
        first, place, _second = _two_best(i, v, near, near_cost)
        if place >= 0 and first <= bound[i]:
            # Any free column among the equally good will do.
            for e in range(K):
                j = near[i, e]
                if j >= 0 and row_of[j] < 0 and near_cost[i, e] - v[j] == first:
                    row_of[j] = i
                    col_of[i] = j
                    cost_of[i] = near_cost[i, e]
                    break
        if col_of[i] != FREE:
            continue
        left += 1
    return left


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
    key, heap, where, came_from, base_of, touched, scanned,
):  # pragma: no cover - compiled  # fmt: skip
    """Shortest augmenting paths from the free rows start..n until ``limit`` units of work are spent.

    Dijkstra over columns with costs reduced by the duals. A row enters with its shortlist and, as a marker, the
    least distance that anything outside the list could have; when the marker comes up the row is read in
    full. A free column's distance is an upper bound: nothing at or above it is put on the heap, and the
    search ends when the least key reaches it.

    ``key``, ``where`` (m + n), ``heap`` (m + n), ``came_from`` (m), ``base_of`` (n), ``touched`` (m + n) and
    ``scanned`` (m) are workspace; ``key`` must be inf and ``where`` -1 throughout.

    Returns the row to go on with (n when done), or -1 - i when row i cannot be matched.
    """
    n, m = col_of.shape[0], v.shape[0]
    minima = np.empty(lanes_of(m))
    values = np.empty(K + 1 + COARSE)
    items = np.empty(K + 1, np.intp)
    work = 0
    span = LANES * DEPTH
    for source in range(start, n):
        if col_of[source] != FREE:
            continue
        if work > limit:
            return source
        counts[SEARCHES] += 1
        size, touches, scans = 0, 0, 0
        best, goal = np.inf, -1
        row, base = source, 0.0
        base_of[row] = base
        while True:
            # The row's shortlist.
            for e in range(K):
                j = near[row, e]
                if j < 0:
                    break
                x = base + (near_cost[row, e] - v[j])
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
            # The nearest column; markers on the way are read in full.
            found = -1
            while size > 0 and key[heap[0]] < best:
                item = pop(heap, where, key, size)
                size -= 1
                work += 1
                if item < m:
                    found = item
                    break
                i = item - m
                here = base_of[i]
                _list_row(C, sign, i, v, minima, values, items, near, near_cost, bound)
                counts[READS] += 1
                work += m >> 5
                for b in range(minima.shape[0]):
                    if here + minima[b] >= best:
                        continue
                    lane = (b // LANES) * span + b % LANES
                    for j in range(lane, min((b // LANES + 1) * span, m), LANES):
                        x = here + (sign * np.float64(C[i, j]) - v[j])
                        if x < best and x < key[j] and where[j] != -2:
                            came_from[j] = i
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
            if found < 0:
                break
            scanned[scans] = found
            scans += 1
            row = row_of[found]
            base = key[found] - (cost_of[row] - v[found])
            base_of[row] = base
        if goal < 0:
            return -1 - source
        counts[POPS] += scans
        for s in range(scans):
            j = scanned[s]
            v[j] += key[j] - best
        for t in range(touches):
            key[touched[t]] = np.inf
            where[touched[t]] = -1
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
