"""First column duals, and the unit of an auction's eps."""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels._numba.simd import WIDTH, add, difference, load, maximum, minimum, splat, store
from fastmatch_kernels.lap.best import new_best
from fastmatch_kernels.lap.kept import keep
from fastmatch_kernels.lap.match import match_surveyed, survey
from fastmatch_kernels.lap.paths import row_vector
from fastmatch_kernels.lap.state import READS, State

__all__ = ["better_duals", "typical_gap"]

HALVINGS = 24
"""Halvings of the range of duals in which a few of the largest are separated from the others."""


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def _sorted_three(a, b, c):  # pragma: no cover - compiled
    """Return three vectors sorted in each lane."""
    a, b = minimum(a, b), maximum(a, b)
    low, c = minimum(a, c), maximum(a, c)
    return low, minimum(b, c), maximum(b, c)


@njit(nogil=True, cache=True, inner=True, borrows=True)
def _column_centres(costs, v):  # pragma: no cover - compiled
    """Write the medians of nine rows' costs, by column; 0 if that is not finite. ``v`` has whole vectors of columns."""
    c, start, n, m, sign = costs
    step = n // 9
    signs, zero = splat(sign), splat(0.0)
    step *= m
    for j in range(0, m, WIDTH):
        a, b, d = _sorted_three(
            difference(signs, row_vector(c, start, j, m, 0.0), zero),
            difference(signs, row_vector(c, start + 1 * step, j, m, 0.0), zero),
            difference(signs, row_vector(c, start + 2 * step, j, m, 0.0), zero),
        )
        e, f, g = _sorted_three(
            difference(signs, row_vector(c, start + 3 * step, j, m, 0.0), zero),
            difference(signs, row_vector(c, start + 4 * step, j, m, 0.0), zero),
            difference(signs, row_vector(c, start + 5 * step, j, m, 0.0), zero),
        )
        h, k, q = _sorted_three(
            difference(signs, row_vector(c, start + 6 * step, j, m, 0.0), zero),
            difference(signs, row_vector(c, start + 7 * step, j, m, 0.0), zero),
            difference(signs, row_vector(c, start + 8 * step, j, m, 0.0), zero),
        )
        # The median of nine is the median of the largest least, the median of the medians, and the least largest.
        low = maximum(maximum(a, e), h)
        high = minimum(minimum(d, g), q)
        _, middle, _ = _sorted_three(b, f, k)
        _, middle, _ = _sorted_three(low, middle, high)
        store(v, j, middle)
    for j in range(m):
        if not abs(v[j]) < np.inf:
            v[j] = 0.0


@njit(nogil=True, cache=True, inner=True, borrows=True)
def _minima_and_means(costs, least, mean):  # pragma: no cover - compiled
    """Write the least and the mean cost of every column; 0 if that is not finite. Both have whole vectors of columns."""
    c, start, n, m, sign = costs
    signs, zero, fill = splat(sign), splat(0.0), sign * np.inf
    least[:] = np.inf
    mean[:] = 0.0
    i = 0
    while i < n:
        at = start + i * m
        several = i + 4 <= n
        for j in range(0, m, WIDTH):
            x = difference(signs, row_vector(c, at, j, m, fill), zero)
            low, total = minimum(x, load(least, j)), add(x, load(mean, j))
            if several:
                for k in range(1, 4):
                    x = difference(signs, row_vector(c, at + k * m, j, m, fill), zero)
                    low, total = minimum(x, low), add(x, total)
            store(least, j, low)
            store(mean, j, total)
        i += 4 if several else 1
    for j in range(least.shape[0]):
        mean[j] /= n
        if not abs(least[j]) < np.inf:
            least[j] = 0.0
        if not abs(mean[j]) < np.inf:
            mean[j] = 0.0


@njit(nogil=True, cache=True, inner=True, borrows=True)
def _sort(sample):  # pragma: no cover - compiled
    """Sort a few numbers in place; numba's sort takes half a second to compile."""
    for e in range(1, sample.shape[0]):
        x = sample[e]
        k = e
        while k > 0 and sample[k - 1] > x:
            sample[k] = sample[k - 1]
            k -= 1
        sample[k] = x


@njit(nogil=True, cache=True, inner=True)
def _lower_tail(v, m):  # pragma: no cover - compiled
    """Return how far the least of v[:m] is below the median, in distances between the quartiles; from a sample of 65."""
    few = min(m, 65)
    sample = np.empty(few)
    for e in range(few):
        sample[e] = v[e * m // few]
    _sort(sample)
    low = sample[0]
    for j in range(m):
        low = min(low, v[j])
    reach, middle = sample[3 * few // 4] - sample[few // 4], sample[few // 2] - low
    if reach > 0.0:
        return middle / reach
    return np.inf if middle > 0.0 else 0.0


@njit(nogil=True, cache=True, inner=True, borrows=True)
def _cut_off(v, m, spare):  # pragma: no cover - compiled
    """Cut v[:m] off so that at least ``spare`` columns have the largest dual, as columns that no row takes must."""
    low, high = np.inf, -np.inf
    for j in range(m):
        low, high = min(low, v[j]), max(high, v[j])
    for _ in range(HALVINGS):
        middle, above = 0.5 * low + 0.5 * high, 0
        for j in range(m):
            above += v[j] >= middle
        if above >= spare:
            low = middle
        else:
            high = middle
    for j in range(m):
        v[j] = min(v[j], low)


@njit(nogil=True, cache=True)
def typical_gap(least, seconds):  # pragma: no cover - compiled
    """Return the mean difference of rows' two least entries, of which each counts up to four times their upper quartile.

    It is 0 if half of them are 0.
    """
    n = least.shape[0]
    few = min(n, 33)
    sample = np.empty(few)
    for e in range(few):
        sample[e] = seconds[e * n // few] - least[e * n // few]
    _sort(sample)
    top = 4.0 * sample[3 * few // 4]
    total, ties, told = 0.0, 0, 0
    for i in range(n):
        x = seconds[i] - least[i]
        if x < np.inf:
            total += min(x, top)
            told += 1
            ties += x == 0.0
    return total / told if 2 * ties < told else 0.0


@njit(nogil=True, cache=True)
def better_duals(costs, state, numbers, room, at):  # pragma: no cover - compiled
    """Look for first duals with which clearly more rows find a column than in the matching from zeros.

    The columns' minima, their means and their centres are tried: all suit columns that differ by constants. A quarter of
    the rows is asked first. Minima are exact where columns differ by constants alone, and the others are better only if they
    leave clearly fewer rows free. If some minima are far below the others, they count only if nearly all rows find a column,
    because a free column whose dual is far too low forces all others down.

    Args:
        costs: the problem.
        state: the matching from zeros; only its counts are written.
        numbers: (better_minima, better_centres, tail), as in ``SmallSchedule``.
        room: where the duals that are found go, with the matching from them, as :func:`keep` writes it from ``room[at]`` on.

    Returns:
        The free rows of that matching, or n + 1 if no duals are better.
    """
    better_minima, better_centres, tail = numbers
    n, m, width, counts = costs.n, costs.m, state.v.shape[0], state.counts
    some = n // 4
    quarter, whole = 0, 0
    for i in range(n):
        whole += state.col_of[i] < 0
        quarter += state.col_of[i] < 0 and i < some
    fewest, found = whole, n + 1
    minima, means, centres = np.empty(width), np.empty(width), np.empty(width)
    row_of, col_of = np.empty(m, np.int64), np.empty(n, np.int64)
    least, seconds, columns, none = np.empty(n), np.empty(n), np.empty(n, np.int64), new_best(np.int64(0))
    _minima_and_means(costs, minima, means)
    _column_centres(costs, centres)
    counts[READS] += n
    for kind in range(3):
        duals = minima if kind == 0 else (means if kind == 1 else centres)
        share = better_minima if kind == 0 else better_centres
        if n < m:
            _cut_off(duals, m, m - n)
        row_of[:] = -1
        col_of[:] = -1
        tried = State(duals, row_of, col_of, least, seconds, columns, state.stack, counts, none)
        survey(costs, tried, np.int64(0), some, np.bool_(True))
        match_surveyed(costs, tried, np.int64(0), some)
        counts[READS] += some
        free = 0
        for i in range(some):
            free += col_of[i] < 0
        if free > share * quarter:
            continue
        survey(costs, tried, some, n, np.bool_(True))
        match_surveyed(costs, tried, some, n)
        counts[READS] += n - some
        for i in range(some, n):
            free += col_of[i] < 0
        if free > share * whole or free >= fewest:
            continue
        if kind == 0 and free > n // 16 and _lower_tail(duals, m) > tail:
            continue
        fewest = free - free // 4 if kind == 0 else free
        found = free
        keep(room, at, tried)
        if free == 0:
            break
    return found
