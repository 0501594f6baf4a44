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
from fastmatch_kernels.lap.paths import row_vector

__all__ = ["match_rows", "match_surveyed", "survey", "two_least"]


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


@njit(nogil=True, cache=True, inner=True)
def match_rows(c, start, sign, lo, hi, m, v, row_of, col_of, least, gaps):  # pragma: no cover - compiled
    """Match rows lo..hi to a free column among their best; write their least c - v, and by how much the second exceeds it."""
    begin = 0  # all columns before it are taken
    for i in range(lo, hi, 2):
        at = start + i * m
        other = at + m if i + 1 < hi else at
        one, two = two_least(c, at, other, sign, m, v)
        for k in range(i, min(i + 2, hi)):
            first, j, second, _ = one if k == i else two
            least[k] = first
            gaps[k] = second - first
            if not first < np.inf:
                continue
            if row_of[j] >= 0 and first == second:
                while begin < m and row_of[begin] >= 0:
                    begin += 1
                j = _free_tie(c, start + k * m, sign, m, v, row_of, first, begin, j)
            if row_of[j] < 0:
                col_of[k] = j
                row_of[j] = k


@njit(nogil=True, cache=True)
def survey(c, sign, m, v, lo, hi, least, gaps, columns):  # pragma: no cover - compiled
    """Read rows lo..hi once: their least c - v, its column, and by how much the second exceeds it.

    Return the sum of the entries' absolute values, which is finite only if every entry is.
    """
    signs, none, zero = splat(sign), splat(np.inf), splat(0.0)
    sizes = zero
    step = splat(np.float64(WIDTH))
    for i in range(lo, hi, 2):
        at = i * m
        other = at + m if i + 1 < hi else at
        first, second, column = none, none, zero
        first2, second2, column2 = none, none, zero
        here = zero
        for j in range(0, m, WIDTH):
            duals = load(v, j)
            p, q = row_vector(c, at, j, m, sign * np.inf), row_vector(c, other, j, m, sign * np.inf)
            if j + WIDTH <= m:
                sizes = add(sizes, add(magnitude(p), magnitude(q)))
            x, y = difference(signs, p, duals), difference(signs, q, duals)
            second = minimum(maximum(first, x), second)
            second2 = minimum(maximum(first2, y), second2)
            column = select(x, first, here, column)
            column2 = select(y, first2, here, column2)
            first = minimum(x, first)
            first2 = minimum(y, first2)
            here = add(here, step)
        for j in range(m - m % WIDTH, m):
            sizes = add(sizes, splat(abs(np.float64(c[at + j])) + abs(np.float64(c[other + j]))))
        low, j, high, _ = _across(first, second, column)
        least[i], gaps[i], columns[i] = low, high - low, j
        if i + 1 < hi:
            low, j, high, _ = _across(first2, second2, column2)
            least[i + 1], gaps[i + 1], columns[i + 1] = low, high - low, j
    total = 0.0
    for k in range(WIDTH):
        total += lane(sizes, k)
    return total


@njit(nogil=True, cache=True)
def match_surveyed(c, sign, m, v, least, gaps, columns, row_of, col_of):  # pragma: no cover - compiled
    """Match rows to a free column among their best, which :func:`survey` has found."""
    begin = 0
    for i in range(col_of.shape[0]):
        if not least[i] < np.inf:
            continue
        j = columns[i]
        if row_of[j] >= 0 and gaps[i] == 0.0:
            while begin < m and row_of[begin] >= 0:
                begin += 1
            j = _free_tie(c, i * m, sign, m, v, row_of, least[i], begin, j)
        if row_of[j] < 0:
            col_of[i] = j
            row_of[j] = i
