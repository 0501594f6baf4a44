"""The first steps over whole rows: rows take their best columns, and a few short paths if they are crowded."""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels._numba.simd import WIDTH
from fastmatch_kernels.lap.best import new_best, with_best
from fastmatch_kernels.lap.bids import bids, largest_fall, lower_best, reduce
from fastmatch_kernels.lap.bounded_paths import paths_within
from fastmatch_kernels.lap.duals import better_duals, typical_gap
from fastmatch_kernels.lap.kept import keep, room_to_keep, take
from fastmatch_kernels.lap.match import free_rows, match_surveyed, reduce_surveyed, survey
from fastmatch_kernels.lap.scale import fitting_scale
from fastmatch_kernels.lap.state import (
    CROWDED,
    FEW_ROWS,
    HUGE,
    INFEASIBLE,
    LONG,
    OPEN,
    READS,
    RECTANGLE_AHEAD,
    SOLVED,
    TOO_LARGE,
    WRONG,
    Costs,
    State,
    is_nearly_square,
)

__all__ = ["is_square", "new_state", "other_duals", "start"]

is_square = njit(nogil=True, cache=True, inner=True)(is_nearly_square)


@njit(nogil=True, cache=True, forceinline=True)
def new_state(n, m):  # pragma: no cover - compiled
    """Return room for what a solve finds; only duals beyond the columns and counts have values."""
    v = np.empty((m + WIDTH - 1) // WIDTH * WIDTH)
    for j in range(m, v.shape[0]):
        v[j] = 0.0
    row_of, col_of, columns, stack = (
        np.empty(m, np.int64),
        np.empty(n, np.int64),
        np.empty(n, np.int64),
        np.empty(n, np.int64),
    )
    none = new_best(np.int64(0))
    return State(v, row_of, col_of, np.empty(n), np.empty(n), columns, stack, np.zeros(4, np.int64), none)


@njit(nogil=True, cache=True, inner=True)
def other_duals(costs, state, schedule, room, at):  # pragma: no cover - compiled
    """Look for other first duals, write them to ``room[at:]``, and return how many rows they leave free, else n + 1."""
    numbers = (schedule.better_minima, schedule.better_centres, schedule.tail)
    return better_duals(costs, state, numbers, room, at)


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def _read(costs, state):  # pragma: no cover - compiled
    """Read all rows once; return (OPEN, WRONG or TOO_LARGE; the sign, times a power of two if sums of costs would leave float64)."""
    n, m, sign, v, counts = costs.n, costs.m, costs.sign, state.v, state.counts
    scaled, lo, total, fits = costs, np.int64(0), 0.0, np.bool_(False)
    while lo < n:
        hi = np.int64(FEW_ROWS) if lo == 0 and n > FEW_ROWS else n
        total += survey(scaled, state, lo, hi, fits)
        counts[READS] += hi - lo
        lo = hi
        if not total < HUGE and not fits:
            fits = np.bool_(True)
            scale = fitting_scale(costs.c, costs.start, costs.start + n * m, sign)
            counts[READS] += n
            if scale == 0.0:
                return WRONG, sign
            if scale == np.inf:
                return TOO_LARGE, sign
            if scale != sign:
                v[:] = 0.0  # given duals are not scaled, but no other ones are looked for
                lo = np.int64(0)
                scaled = Costs(costs.c, costs.start, n, m, scale)
    return OPEN, scaled.sign


@njit(nogil=True, cache=True, inner=True)
def _as_rectangle(costs, state, top, schedule):  # pragma: no cover - compiled
    """Try to match crowded rows as those of a rectangle, whose paths may end at any free column; return OPEN, with none free,
    INFEASIBLE, or CROWDED, with the matching and the duals as they were.

    Other first duals are for columns that all rows need, and take longer if most of them are needed by few.
    """
    held = np.empty(room_to_keep(state))
    keep(held, np.int64(0), state)
    most = largest_fall(state.least, state.seconds, typical_gap(state.least, state.seconds))
    lower_best(costs, state, most)
    left = reduce(costs, state, top, most, top, np.bool_(False))
    found = 0
    if left <= top // 2:
        no = np.bool_(False)  # for a plain False, numba would compile all that is called once more
        kept = with_best(state)
        left, _ = bids(costs, kept, left, no, no, no, schedule)
        found, left, _ = paths_within(costs, state, left, no, np.float64(RECTANGLE_AHEAD * costs.n), no)
    if found < 0:
        return INFEASIBLE
    if left == 0:
        return OPEN
    take(held, np.int64(0), state)
    return CROWDED


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def start(costs, state, square, warm, auctions, schedule):  # pragma: no cover - compiled
    """Match rows from zeros, or from the duals of ``state`` if ``warm``, and along short paths if they are crowded.

    Returns:
        (SOLVED, OPEN, or CROWDED, which is LONG without ``auctions``; WRONG, INFEASIBLE or TOO_LARGE; the sign of the costs, perhaps
        times a power of two; the scans that paths are expected to take, if CROWDED).
    """
    n, m = costs.n, costs.m
    if not (warm and n == m):
        state.v[:] = 0.0
        warm = False
    state.row_of[:] = -1
    state.col_of[:] = -1
    outcome, scale = _read(costs, state)
    if outcome != OPEN:
        return outcome, scale, 0.0
    costs = Costs(costs.c, costs.start, n, m, scale)
    match_surveyed(costs, state, np.int64(0), n)
    top = free_rows(state)
    if top == 0:
        return SOLVED, scale, 0.0
    crowded = schedule.crowded_above * n
    if warm or n < schedule.crowded_from or top <= crowded:
        return OPEN, scale, 0.0
    top = reduce_surveyed(costs, state, top)
    if not square or top <= crowded:
        return OPEN, scale, 0.0
    if n < m and is_square(n, m):  # a wider one has been tried as a rectangle before
        outcome = _as_rectangle(costs, state, top, schedule)
        if outcome != CROWDED:
            return outcome, scale, 0.0
        top = free_rows(state)
    # If half of the rows have ties for their best column, neither other duals nor auctions help much.
    tied = typical_gap(state.least, state.seconds) == 0.0
    scans = (schedule.short_tied_scans if tied else schedule.short_scans) * n
    found, top, rest = paths_within(costs, state, top, square, scans, np.bool_(False))
    if found < 0:
        return INFEASIBLE, scale, 0.0
    if top > crowded:
        return CROWDED if auctions else LONG, scale, rest
    return OPEN, scale, rest
