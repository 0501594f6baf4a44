"""Rows take their best columns: the first matching, from given column duals."""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels._numba.simd import (
    WIDTH,
    add,
    ctz,
    difference,
    lane,
    less_equal_mask,
    load,
    magnitude,
    maximum,
    minimum,
    reduce_minimum,
    replace_at_most,
    select,
    splat,
)
from fastmatch_kernels.lap.copying import copy_to
from fastmatch_kernels.lap.paths import row_vector
from fastmatch_kernels.lap.state import LARGEST

__all__ = ["free_rows", "match_surveyed", "reduce_surveyed", "survey", "two_least"]


@njit(nogil=True, cache=True, forceinline=True)
def two_least(c, at, other, sign, m, v):  # pragma: no cover - compiled
    """Return (least c - v, its column, second least, its column if the two are equal) of the rows at ``at`` and ``other``.

    Two rows at once keep the processor busy, because each minimum has to wait for the one before.
    """
    signs, none = splat(sign), splat(np.inf)
    first, second, column = none, none, splat(0.0)
    first2, second2, column2 = none, none, splat(0.0)
    here, step = splat(0.0), splat(np.float64(WIDTH))
    for j in range(0, m, WIDTH):
        duals = load(v, j)
        x = difference(signs, row_vector(c, at, j, m, sign * np.inf), duals)
        y = difference(signs, row_vector(c, other, j, m, sign * np.inf), duals)
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


@njit(nogil=True, cache=True, inner=True)
def _free_tie(c, at, sign, m, v, row_of, value, begin, otherwise):  # pragma: no cover - compiled
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


@njit(nogil=True, cache=True, inner=True)
def free_rows(col_of, stack):  # pragma: no cover - compiled
    """Put the free rows on ``stack``, the first on top; return their number."""
    top = 0
    for i in range(col_of.shape[0] - 1, -1, -1):
        stack[top] = i
        top += col_of[i] < 0
    return top


@njit(nogil=True, cache=True)
def survey(c, start, scale, m, v, lo, hi, least, seconds, columns):  # pragma: no cover - compiled
    """Read rows lo..hi once: their least c - v, its column, and the least one of the other columns.

    Duals only fall. So ``seconds`` remains a bound on the other columns.

    Return the sum of the sizes of all entries but forbidden ones. It is finite only if there is no NaN and no infinity of the
    wrong sign.
    """
    scales, none, zero, top = splat(scale), splat(np.inf), splat(0.0), splat(LARGEST)
    sizes = zero
    step = splat(np.float64(WIDTH))
    for i in range(lo, hi, 2):
        at = start + i * m
        other = at + m if i + 1 < hi else at
        first, second, column = none, none, zero
        first2, second2, column2 = none, none, zero
        here = zero
        for j in range(0, m, WIDTH):
            duals = load(v, j)
            p, q = row_vector(c, at, j, m, scale * np.inf), row_vector(c, other, j, m, scale * np.inf)
            x, y = difference(scales, p, duals), difference(scales, q, duals)
            p, q = difference(scales, p, zero), difference(scales, q, zero)
            sizes = add(sizes, add(select(top, p, zero, magnitude(p)), select(top, q, zero, magnitude(q))))
            second = minimum(maximum(first, x), second)
            second2 = minimum(maximum(first2, y), second2)
            column = select(x, first, here, column)
            column2 = select(y, first2, here, column2)
            first = minimum(x, first)
            first2 = minimum(y, first2)
            here = add(here, step)
        least[i], columns[i], seconds[i], _ = _across(first, second, column)
        if i + 1 < hi:
            least[i + 1], columns[i + 1], seconds[i + 1], _ = _across(first2, second2, column2)
    total = 0.0
    for k in range(WIDTH):
        total += lane(sizes, k)
    return total


@njit(nogil=True, cache=True)
def match_surveyed(
    c, start, sign, m, v, lo, hi, least, seconds, columns, row_of, col_of
):  # pragma: no cover - compiled
    """Match rows lo..hi to a free column among their best, which :func:`survey` has found."""
    begin = 0  # all columns before it are taken
    for i in range(lo, hi):
        if not least[i] < np.inf:
            continue
        j = columns[i]
        if row_of[j] >= 0 and least[i] == seconds[i]:
            while begin < m and row_of[begin] >= 0:
                begin += 1
            j = _free_tie(c, start + i * m, sign, m, v, row_of, least[i], begin, j)
        if row_of[j] < 0:
            col_of[i] = j
            row_of[j] = i


@njit(nogil=True, cache=True)
def reduce_surveyed(
    c, start, sign, m, v, seconds, columns, row_of, col_of, stack, top
):  # pragma: no cover - compiled
    """Run augmenting row reduction among the rows ``stack[:top]`` by what :func:`survey` has found; return what is left.

    A row takes its best column and lowers its dual until the bound on the others is reached. If it is reached already, the row
    takes a free column that reaches it too. So no row is read but for such a column. Nothing happens unless half of a
    few rows would find one, and all is undone unless half of the rows do.
    """
    none = np.int64(-1)
    begin = 0
    while begin < m and row_of[begin] >= 0:
        begin += 1
    few, likely = min(top, MISSES), 0
    for e in range(few):
        i = stack[e * top // few]
        if seconds[i] < np.inf:
            likely += _free_tie(c, start + i * m, sign, m, v, row_of, seconds[i], begin, none) >= 0
    if 2 * likely < few:
        return top
    n = col_of.shape[0]
    v_before, row_before, col_before = np.empty(v.shape[0]), np.empty(m, np.int64), np.empty(n, np.int64)
    copy_to(v_before, v)
    copy_to(row_before, row_of)
    copy_to(col_before, col_of)
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
            j = _free_tie(c, start + i * m, sign, m, v, row_of, seconds[i], begin, none)
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
    top = free_rows(col_of, stack)
    if 2 * top > before:
        copy_to(v, v_before)
        copy_to(row_of, row_before)
        copy_to(col_of, col_before)
        top = free_rows(col_of, stack)
    return top
