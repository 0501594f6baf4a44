"""Small assignment problems over whole rows, in one core's cache and without the interpreter's lock.

The steps: rows take their best columns; free rows bid in a short auction (Bertsekas 1988); augmenting row reduction and
shortest augmenting paths (Jonker and Volgenant 1987) finish exactly. There is no column reduction: if a few rows have the
minima of most columns, it leaves duals that take longer to undo than zeros.

The auction and the augmentation are not those of the candidate lists, because at these sizes a row is a few vectors. A
solve by lists takes 3 to 7 times as long at n = 64, and 2 to 4 times at n = 256.

The costs of one problem are ``sign * c``. ``c`` is flat, row i begins at ``start + i * width``, and the width is a whole
number of vectors; the entries beyond the columns are forbidden. Differences to the column duals v are float64, and so are
the column and row numbers that travel with values in vectors.
"""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit

# lists.py imports nearly the same names: both find the best two columns of a row, from different data.
from fastmatch_kernels._numba.simd import (
    WIDTH,
    add,
    ctz,
    difference,
    lane,
    less_equal_mask,
    load,
    maximum,
    minimum,
    reduce_minimum,
    replace_at_most,
    select,
    splat,
    store,
)
from fastmatch_kernels.lap.rows import row_minimum
from fastmatch_kernels.lap.state import BIDS, POPS, READS, SEARCHES

__all__ = ["INFEASIBLE", "SOLVED", "WRONG", "row_minima", "solve_stack"]

SOLVED, WRONG, INFEASIBLE = 0, 1, 2

ALL = (1 << WIDTH) - 1
"""The mask of a vector whose lanes all hold."""


@njit(nogil=True, cache=True, forceinline=True)
def _finite(c, start, n, m, width):  # pragma: no cover - compiled
    """Return whether the sum of all entries is finite; if it is, so is every entry."""
    zero = splat(0.0)
    total, other, rest = zero, zero, 0.0
    for at in range(start, start + n * width, width):
        j = at
        while j + 2 * WIDTH <= at + m:
            total = add(total, load(c, j))
            other = add(other, load(c, j + WIDTH))
            j += 2 * WIDTH
        for k in range(j, at + m):
            rest += np.float64(c[k])
    total = add(total, other)
    return less_equal_mask(difference(zero, total, zero), zero) == ALL and rest - rest == 0.0


@njit(nogil=True, cache=True, forceinline=True)
def _match_rows(c, start, sign, n, v, row_of, col_of):  # pragma: no cover - compiled
    """Match rows to a free column among their best; return the mean difference between a row's least two c - v."""
    width = v.shape[0]
    signs = splat(sign)
    total = 0.0
    for i in range(0, n, 2):
        at = start + i * width
        other = at + width if i + 1 < n else at
        one, two = _two_least(c, at, other, sign, v)
        for k in range(i, min(i + 2, n)):
            first, j, second, _ = one if k == i else two
            total += second - first
            if row_of[j] >= 0 and first == second:
                at = start + k * width
                limit = splat(first)
                for e in range(0, width, WIDTH):
                    bits = less_equal_mask(difference(signs, load(c, at + e), load(v, e)), limit)
                    while bits != 0 and row_of[e + ctz(bits)] >= 0:
                        bits &= bits - 1
                    if bits != 0:
                        j = e + ctz(bits)
                        break
            if row_of[j] < 0 and first < np.inf:
                col_of[k] = j
                row_of[j] = k
    return total / n


@njit(nogil=True, cache=True, forceinline=True)
def _two_least(c, at, other, sign, v):  # pragma: no cover - compiled
    """Return (least c - v, its column, second least, its column if the two are equal) of the rows at ``at`` and ``other``.

    Two rows at once keep the processor busy, because each minimum has to wait for the one before.
    """
    signs, none = splat(sign), splat(np.inf)
    first, second, column = none, none, splat(0.0)
    first2, second2, column2 = none, none, splat(0.0)
    here, step = splat(0.0), splat(np.float64(WIDTH))
    for j in range(0, v.shape[0], WIDTH):
        duals = load(v, j)
        x = difference(signs, load(c, at + j), duals)
        y = difference(signs, load(c, other + j), duals)
        second = minimum(maximum(first, x), second)
        second2 = minimum(maximum(first2, y), second2)
        column = select(x, first, here, column)
        column2 = select(y, first2, here, column2)
        first = minimum(x, first)
        first2 = minimum(y, first2)
        here = add(here, step)
    return _across(first, second, column), _across(first2, second2, column2)


@njit(nogil=True, cache=True, forceinline=True)
def _across(first, second, column):  # pragma: no cover - compiled
    """Return (least, its column, second least, its column if the two are equal) from the values of every lane."""
    lowest = reduce_minimum(first)
    limit = splat(lowest)
    holders = less_equal_mask(first, limit)
    k = ctz(holders)
    j = np.int64(lane(column, k)) + k
    others = holders & (holders - 1)
    if others != 0:
        k = ctz(others)
        return lowest, j, lowest, np.int64(lane(column, k)) + k
    return lowest, j, reduce_minimum(replace_at_most(first, limit, second)), j


@njit(nogil=True, cache=True, forceinline=True)
def _bid(c, start, sign, v, row_of, col_of, stack, top, eps, limit, counts):  # pragma: no cover - compiled
    """Let the rows on ``stack[:top]`` bid until the stack is empty or ``limit`` bids are spent; return what is left.

    A row takes its best column and lowers its dual until the column is ``eps`` worse than the row's second best. With
    eps = 0 this is augmenting row reduction: a row whose two best tie is left free. Two rows bid at once; the second
    one's bid is postponed if the first has changed a dual that it depends on.
    """
    width = v.shape[0]
    bids = 0
    while top > 0 and bids < limit:
        top -= 1
        i = stack[top]
        k = stack[top - 1] if top > 0 else i
        one, two = _two_least(c, start + i * width, start + k * width, sign, v)
        first, j, second, tied = one
        stays = k != i
        if stays:
            top -= 1
            x = sign * np.float64(c[start + k * width + j]) - v[j]
            stays = x > two[2]
            if not stays:
                stack[top] = k
                top += 1
        for _ in range(2):
            bids += 1
            if second == first and row_of[j] >= 0:
                j = tied
            old = row_of[j]
            if second < np.inf and (old < 0 or eps > 0.0 or second > first):
                v[j] -= (second - first) + eps
                row_of[j] = i
                col_of[i] = j
                if old >= 0:
                    col_of[old] = -1
                    stack[top] = old
                    top += 1
            if not stays:
                break
            i = k
            first, j, second, tied = two
            stays = False
    counts[BIDS] += bids
    return top


@njit(nogil=True, cache=True, forceinline=True)
def _free_rows(col_of, stack):  # pragma: no cover - compiled
    """Put the free rows on ``stack``, the first on top; return their number."""
    top = 0
    for i in range(col_of.shape[0] - 1, -1, -1):
        stack[top] = i
        top += col_of[i] < 0
    return top


@njit(nogil=True, cache=True, forceinline=True)
def _relax(c, at, sign, w, base, i, dist, came_from):  # pragma: no cover - compiled
    """Update the distances through row i; return the least of all and its column.

    Scanned columns have w = -inf and dist = inf.
    """
    signs, shift, row = splat(sign), splat(base), splat(np.float64(i))
    nearest, column = splat(np.inf), splat(0.0)
    here, step = splat(0.0), splat(np.float64(WIDTH))
    for j in range(0, w.shape[0], WIDTH):
        x = add(shift, difference(signs, load(c, at + j), load(w, j)))
        old = load(dist, j)
        store(came_from, j, select(x, old, row, load(came_from, j)))
        x = minimum(x, old)
        store(dist, j, x)
        column = select(x, nearest, here, column)
        nearest = minimum(x, nearest)
        here = add(here, step)
    low = reduce_minimum(nearest)
    k = ctz(less_equal_mask(nearest, splat(low)))
    return low, np.int64(lane(column, k)) + k


@njit(nogil=True, cache=True, forceinline=True)
def _free_at(dist, taken, low):  # pragma: no cover - compiled
    """Return a free column whose distance is ``low``, -1 if there is none."""
    limit = splat(low)
    for j in range(0, dist.shape[0], WIDTH):
        bits = less_equal_mask(add(load(dist, j), load(taken, j)), limit)
        if bits != 0:
            return j + ctz(bits)
    return -1


@njit(nogil=True, cache=True, forceinline=True)
def _augment(
    c, start, sign, v, row_of, col_of, taken, source, w, dist, came_from, scanned, final, counts
):  # pragma: no cover
    """Augment along a shortest path from row ``source``; return False if there is none."""
    width = v.shape[0]
    for j in range(width):
        w[j] = v[j]
        dist[j] = np.inf
    scans = 0
    i, base, last = source, 0.0, -np.inf
    while True:
        low, j = _relax(c, start + i * width, sign, w, base, i, dist, came_from)
        if not low < np.inf:
            return False
        if row_of[j] >= 0 and low == last:  # among ties, a free column ends the search
            goal = _free_at(dist, taken, low)
            j = goal if goal >= 0 else j
        if row_of[j] < 0:
            break
        last = low
        scanned[scans] = j
        final[scans] = low
        scans += 1
        dist[j] = np.inf
        w[j] = -np.inf
        i = row_of[j]
        base = low - (sign * np.float64(c[start + i * width + j]) - v[j])
    taken[j] = np.inf
    counts[POPS] += scans
    counts[SEARCHES] += 1
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
    """Return whether a problem holds NaN or an infinity of the wrong sign."""
    for i in range(C.shape[0]):
        for j in range(C.shape[1]):
            if not sign * C[i, j] > -np.inf:
                return True
    return False


@njit(nogil=True, cache=True)
def row_minima(C, sign, v, u):  # pragma: no cover - compiled
    """Write to u the least c - v of every row."""
    for i in range(C.shape[0]):
        u[i] = row_minimum(C[i], sign, v)


@njit(nogil=True, cache=True)
def solve_stack(C, sign, schedule, lo, hi, out, bad, duals, counts):  # pragma: no cover - compiled
    """Solve problems lo..hi of the contiguous stack C (batch, n, m), n <= m; write row i's column to out[b, i].

    ``duals`` (batch, m), in and out: initial column duals (used if n = m), replaced by the final ones; (0, m): none.
    Unmatched columns have the largest final dual. ``schedule`` is a ``SmallSchedule``, as a plain tuple; ``counts`` is as in ``state``.

    bad[b] is WRONG for NaN or an infinity of the wrong sign, INFEASIBLE if forbidden entries leave no assignment, else
    SOLVED.
    """
    n, m = C.shape[1], C.shape[2]
    width = (m + WIDTH - 1) // WIDTH * WIDTH
    room = np.empty(n * width if m < width else 0, C.dtype)
    c = C.reshape(C.size) if m == width else room
    v, w, dist, final = np.zeros(width), np.empty(width), np.empty(width), np.empty(width)
    came_from, taken = np.zeros(width), np.empty(width)
    row_of, col_of = np.empty(width, np.int64), np.empty(n, np.int64)
    scanned, stack = np.empty(width, np.int64), np.empty(n, np.int64)
    auction_above, repeat_above, phases, first_eps, eps_factor, bids, reductions, extra_steps = schedule
    extra = int(extra_steps * n)
    for b in range(lo, hi):
        start = b * n * m
        if m != width:
            start = 0
            for i in range(n):
                room[i * width : i * width + m] = C[b, i]
                room[i * width + m : (i + 1) * width] = sign * np.inf
        bad[b] = SOLVED
        finite = _finite(c, start, n, m, width)
        if not finite and _wrong(C[b], sign):
            bad[b] = WRONG
            continue
        v[:] = 0.0
        if n == m and duals.shape[0] > 0:
            v[:m] = duals[b]
        row_of[:] = -1
        col_of[:] = -1
        eps = first_eps * _match_rows(c, start, sign, n, v, row_of, col_of)
        counts[READS] += 2 * n
        top = _free_rows(col_of, stack)
        for phase in range(phases if n == m and finite else 0):
            if top <= (auction_above if phase == 0 else repeat_above) * n or not 0.0 < eps < np.inf:
                break
            left = _bid(c, start, sign, v, row_of, col_of, stack, top, eps, bids * n, counts)
            row_of[:] = -1
            col_of[:] = -1
            top = _free_rows(col_of, stack)
            _bid(c, start, sign, v, row_of, col_of, stack, top, 0.0, top + extra, counts)
            top = _free_rows(col_of, stack)
            if left > 0:
                break
            eps *= eps_factor
        for _ in range(reductions):
            top = _free_rows(col_of, stack)
            _bid(c, start, sign, v, row_of, col_of, stack, top, 0.0, top + extra, counts)
        for j in range(width):
            taken[j] = 0.0 if row_of[j] < 0 else np.inf
        for e in range(_free_rows(col_of, stack) - 1, -1, -1):
            if not _augment(
                c, start, sign, v, row_of, col_of, taken, stack[e], w, dist, came_from, scanned, final, counts
            ):
                bad[b] = INFEASIBLE
                break
        for i in range(n):
            out[b, i] = col_of[i]
        if duals.shape[0] > 0:
            duals[b] = v[:m]
    counts[READS] += counts[BIDS] + counts[POPS] + counts[SEARCHES]
