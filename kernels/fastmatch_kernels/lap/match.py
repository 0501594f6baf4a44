"""Rows take their best columns: the first matching, from given column duals."""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels._numba.nontemporal import prefetch
from fastmatch_kernels._numba.simd import (
    WIDTH,
    add,
    ctz,
    difference,
    lane,
    less_equal_mask,
    load,
    magnitude,
    minimum,
    reduce_minimum,
    replace_at_most,
    select,
    splat,
    sum_lanes,
)
from fastmatch_kernels.lap.best import AHEAD, LINE, at_most, new_best, read_best
from fastmatch_kernels.lap.kept import keep, room_to_keep, take
from fastmatch_kernels.lap.paths import row_vector
from fastmatch_kernels.lap.state import LARGEST, STRIDE

__all__ = [
    "MISSES",
    "free_rows",
    "free_tie",
    "match_surveyed",
    "reduce_surveyed",
    "survey",
    "survey_best",
    "two_least",
]


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def _minima(c, at, sign, m, v, plain, measured):  # pragma: no cover - compiled
    """Return the least c - v of the STRIDE sets of columns of the row at ``at``, and sums of unscaled sizes if ``measured``.

    The least two entries of a row are among these minima and the rest of the set that holds the least, so no column number has to
    travel with a value.

    ``plain``: v is 0 and is not read.
    """
    signs, none, zero, fill = splat(sign), splat(np.inf), splat(0.0), sign * np.inf
    a, b, d, e = none, none, none, none
    one, two = zero, zero
    j = 0
    while j + STRIDE <= m:
        if measured:
            for k in range(AHEAD // c.itemsize, AHEAD // c.itemsize + STRIDE, LINE // c.itemsize):
                prefetch(c, at + j + k)
        x, y = load(c, at + j), load(c, at + j + WIDTH)
        if measured:
            one, two = add(one, magnitude(x)), add(two, magnitude(y))
        a = minimum(difference(signs, x, zero if plain else load(v, j)), a)
        b = minimum(difference(signs, y, zero if plain else load(v, j + WIDTH)), b)
        x, y = load(c, at + j + 2 * WIDTH), load(c, at + j + 3 * WIDTH)
        if measured:
            one, two = add(one, magnitude(x)), add(two, magnitude(y))
        d = minimum(difference(signs, x, zero if plain else load(v, j + 2 * WIDTH)), d)
        e = minimum(difference(signs, y, zero if plain else load(v, j + 3 * WIDTH)), e)
        j += STRIDE
    while j < m:
        x = row_vector(c, at, j, m, fill)
        if measured:
            one = add(one, magnitude(x if j + WIDTH <= m else row_vector(c, at, j, m, 0.0)))
        x = difference(signs, x, zero if plain else load(v, j))
        a, b, d, e = b, d, e, minimum(x, a)  # the sets turn: the next vector's is the first
        j += WIDTH
    rest = (m % STRIDE + WIDTH - 1) // WIDTH
    while 0 < rest < 4:
        a, b, d, e = b, d, e, a
        rest += 1
    return a, b, d, e, add(one, two)


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def _least_two(c, at, sign, m, v, a, b, d, e):  # pragma: no cover - compiled
    """Return (least c - v, its column, second least, its column if the two are equal) of a row, from its sets' minima."""
    lowest = reduce_minimum(minimum(minimum(a, b), minimum(d, e)))
    limit, none = splat(lowest), splat(np.inf)
    holders = at_most(a, b, d, e, limit)
    column = ctz(holders)
    first, second = np.inf, np.inf
    for j in range(column, m, STRIDE):  # without branches, which would be mispredicted
        x = sign * np.float64(c[at + j]) - v[j]
        column = j if x < first else column
        high = first if x < first else x
        first = x if x < first else first
        second = high if high < second else second
    others = holders & (holders - 1)
    if second == lowest:
        others = 1 << (column % STRIDE)
    if others == 0:
        a, b = replace_at_most(a, limit, none), replace_at_most(b, limit, none)
        d, e = replace_at_most(d, limit, none), replace_at_most(e, limit, none)
        return lowest, column, min(second, reduce_minimum(minimum(minimum(a, b), minimum(d, e)))), column
    for j in range(ctz(others), m, STRIDE):
        if j != column and sign * np.float64(c[at + j]) - v[j] <= lowest:
            return lowest, column, lowest, j
    return lowest, column, lowest, column


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def two_least(c, at, sign, m, v):  # pragma: no cover - compiled
    """Return (least c - v, its column, second least, its column if the two are equal) of the row at ``at``."""
    a, b, d, e, _ = _minima(c, at, sign, m, v, False, False)
    return _least_two(c, at, sign, m, v, a, b, d, e)


@njit(nogil=True, cache=True, inner=True)
def free_tie(c, at, sign, m, v, row_of, value, begin, otherwise):  # pragma: no cover - compiled
    """Return a free column from ``begin`` on whose c - v is at most ``value`` in the row at ``at``; else ``otherwise``."""
    signs, limit = splat(sign), splat(value)
    for j in range(begin - begin % WIDTH, m, WIDTH):
        bits = less_equal_mask(difference(signs, row_vector(c, at, j, m, sign * np.inf), load(v, j)), limit)
        while bits != 0 and row_of[j + ctz(bits)] >= 0:
            bits &= bits - 1
        if bits != 0:
            return j + ctz(bits)
    return otherwise


MISSES = 16
"""Rows that look for a tied free column in vain, beyond those that find one, before no row looks for one any more."""


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def free_rows(state):  # pragma: no cover - compiled
    """Put the free rows on the stack, the first on top; return their number."""
    col_of, stack = state.col_of, state.stack
    top = 0
    for i in range(col_of.shape[0] - 1, -1, -1):
        stack[top] = i
        top += col_of[i] < 0
    return top


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def _sizes(c, at, scale, m):  # pragma: no cover - compiled
    """Return the sum of the sizes of a row's entries but forbidden ones."""
    scales, zero, top = splat(scale), splat(0.0), splat(LARGEST)
    sizes, total = zero, 0.0
    for j in range(0, m, WIDTH):
        p = difference(scales, row_vector(c, at, j, m, scale * np.inf), zero)
        sizes = add(sizes, select(top, p, zero, magnitude(p)))
    for k in range(WIDTH):
        total += lane(sizes, k)
    return total


@njit(nogil=True, cache=True, borrows=True)
def survey(costs, state, lo, hi, fits):  # pragma: no cover - compiled
    """Read rows lo..hi once: their least c - v, its column, and the least one of the other columns.

    Return the sum of the sizes of all entries but forbidden ones. It is finite only if there is no NaN and no infinity of the
    wrong sign. If ``fits``, that is known, and the sum may be infinite.
    """
    c, start, _, m, scale = costs
    v, least, seconds, columns = state.v, state.least, state.seconds, state.columns
    total = 0.0
    plain = True
    for j in range(m):
        plain &= v[j] == 0.0
    for i in range(lo, hi):
        at = start + i * m
        if plain:
            a, b, d, e, sizes = _minima(c, at, scale, m, v, True, True)
        else:
            a, b, d, e, sizes = _minima(c, at, scale, m, v, False, True)
        size = abs(scale) * sum_lanes(sizes)
        total += size if size < np.inf or fits else _sizes(c, at, scale, m)
        least[i], columns[i], seconds[i], _ = _least_two(c, at, scale, m, v, a, b, d, e)
    return total


@njit(nogil=True, cache=True)
def survey_best(costs, state, lo, hi, fits):  # pragma: no cover - compiled
    """The same, and keep the best columns of every row. That takes no longer where rows come from memory."""
    c, start, n, m, scale = costs
    v, least, seconds, columns = state.v, state.least, state.seconds, state.columns
    items, numbers = state.best
    one, here, total = new_best(np.int64(1)), np.int64(0), 0.0  # several threads read
    for i in range(lo, hi):
        least[i], columns[i], seconds[i], _, sizes = read_best(costs, v, one, i, here, np.bool_(True))
        for k in range(WIDTH):
            items[i * WIDTH + k], numbers[i * WIDTH + k] = one.items[k], one.numbers[k]
        numbers[n * WIDTH + i] = one.numbers[WIDTH]
        size = abs(scale) * sizes
        total += size if size < np.inf or fits else _sizes(c, start + i * m, scale, m)
    return total


@njit(nogil=True, cache=True, borrows=True)
def match_surveyed(costs, state, lo, hi):  # pragma: no cover - compiled
    """Match rows lo..hi to a free column among their best, which :func:`survey` has found."""
    c, start, _, m, sign = costs
    v, row_of, col_of, least, seconds, columns, _, _, _ = state
    begin = 0  # all columns before it are taken
    for i in range(lo, hi):
        if not least[i] < np.inf:
            continue
        j = columns[i]
        if row_of[j] >= 0 and least[i] == seconds[i]:
            while begin < m and row_of[begin] >= 0:
                begin += 1
            j = free_tie(c, start + i * m, sign, m, v, row_of, least[i], begin, j)
        if row_of[j] < 0:
            col_of[i] = j
            row_of[j] = i


@njit(nogil=True, cache=True)
def reduce_surveyed(costs, state, top):  # pragma: no cover - compiled
    """Run augmenting row reduction among the rows ``stack[:top]`` by what :func:`survey` has found; return what is left.

    A row takes its best column and lowers its dual until the bound on the others is reached. If it is reached already, the row
    takes a free column that reaches it too. So no row is read but for such a column. Nothing happens unless half of a
    few rows would find one, and all is undone unless half of the rows do.
    """
    c, start, n, m, sign = costs
    v, row_of, col_of, _, seconds, columns, stack, _, _ = state
    none = np.int64(-1)
    begin = 0
    while begin < m and row_of[begin] >= 0:
        begin += 1
    few, likely = min(top, MISSES), 0
    for e in range(few):
        i = stack[e * top // few]
        if seconds[i] < np.inf:
            likely += free_tie(c, start + i * m, sign, m, v, row_of, seconds[i], begin, none) >= 0
    if 2 * likely < few:
        return top
    held = np.empty(room_to_keep(state))
    keep(held, np.int64(0), state)
    before, hits, misses, bids = top, 0, 0, 0
    while top > 0 and bids < 2 * n and misses < hits + MISSES:
        top -= 1
        i = stack[top]
        bids += 1
        if not seconds[i] < np.inf:
            continue
        j = columns[i]
        x = sign * np.float64(c[start + i * m + j]) - v[j]
        if x < seconds[i]:
            v[j] -= seconds[i] - x
        elif x > seconds[i] or row_of[j] >= 0:
            while begin < m and row_of[begin] >= 0:
                begin += 1
            j = free_tie(c, start + i * m, sign, m, v, row_of, seconds[i], begin, none)
            if j < 0:
                misses += 1
                continue
            hits += 1
        # These lines stand in the bids of small matrices and of lists too: a function of them was measured to slow those down.
        old = row_of[j]
        row_of[j] = i
        col_of[i] = j
        if old >= 0:
            col_of[old] = -1
            stack[top] = old
            top += 1
    top = free_rows(state)
    if 2 * top > before:
        take(held, np.int64(0), state)
        top = free_rows(state)
    return top
