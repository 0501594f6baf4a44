"""The last steps over whole rows: bids, paths, from two kinds of first duals if need be, and the certificate."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels.lap.best import least_of, with_best
from fastmatch_kernels.lap.bids import bids
from fastmatch_kernels.lap.bounded_paths import paths_within
from fastmatch_kernels.lap.duals import typical_gap
from fastmatch_kernels.lap.first import is_square
from fastmatch_kernels.lap.kept import keep, take
from fastmatch_kernels.lap.match import free_rows
from fastmatch_kernels.lap.paths import level_columns
from fastmatch_kernels.lap.proof import EPS, least_of_row, prove
from fastmatch_kernels.lap.state import (
    ACCEPTED,
    DOUBTFUL,
    INFEASIBLE,
    LAST,
    LONG,
    OPEN,
    READS,
    RECTANGLE,
    SOLVED,
    SQUARE,
    TURNS,
    WIDE,
    WORST_SHARE,
)

__all__ = ["Other", "finish"]

LARGE_DUALS = 2.0**26
"""Largest dual, in typical costs, beyond which small costs may have been lost in its rounding."""


class Other(NamedTuple):
    """Other first duals that a crowded problem may go on from."""

    left: int  # the rows that they leave free; n + 1 without any
    expected: float  # scans that paths from zeros are expected to take; 0 if the problem is not crowded
    room: (
        np.ndarray
    )  # the duals and all that belongs to them, as ``keep`` writes it, after room for as much again
    at: int  # where in the room they begin


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def _begin_at(state, other):  # pragma: no cover - compiled
    """Go on from the other duals, and keep what was found from zeros; return how many rows are free."""
    keep(other.room, np.int64(0), state)
    take(other.room, other.at, state)
    return free_rows(state)


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def _match_by_bids(costs, state, square, other, limit, auctions, schedule):  # pragma: no cover - compiled
    """Match free rows by bids. Other duals that leave few rows free are taken at once, others only after a price war from zeros.

    Before these are taken, paths from zeros go on while they take half of the scans that were expected.

    Returns:
        (OPEN; INFEASIBLE; or LONG, if an auction is wanted and may not run, or if paths are too long; how many rows are free; the
        scans that paths from zeros are expected to take; how many times as many paths from these duals may take, 0 if these are the
        only ones).
    """
    n, expected = costs.n, other.expected
    typical = typical_gap(state.least, state.seconds)
    listed = square and not auctions and typical > 0.0
    accepted = other.left <= schedule.accepted_below * n
    top, ahead, calm = free_rows(state), 0.0, False
    if accepted:
        top, ahead = _begin_at(state, other), ACCEPTED
    if top > 0:
        top, calm = bids(costs, state, top, square, other.expected == 0.0, auctions, schedule)
        if not calm and listed:
            return LONG, top, expected, ahead
    if top == 0 or calm or accepted or other.left > n:
        return OPEN, top, expected, ahead
    if 0.5 * expected > limit:
        return LONG, top, expected, ahead
    found, top, expected = paths_within(costs, state, top, square, 0.5 * expected, np.bool_(False))
    if found < 0:
        return INFEASIBLE, top, expected, ahead
    if top > 0:
        top, ahead = _begin_at(state, other), 1.0
    if top > 0:
        top, calm = bids(costs, state, top, square, other.expected == 0.0, auctions, schedule)
        if calm:
            ahead = 0.0
        elif listed:
            return LONG, top, expected, ahead
    return OPEN, top, expected, ahead


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def _take_turns(costs, state, top, square, other, expected, ahead, limit):  # pragma: no cover - compiled
    """Augment from these duals and from those that were kept in turns, until one is expected to end sooner than the other.

    Returns:
        (-1 if a row has no path, else 0; the number of free rows).
    """
    here, there = other.at, np.int64(0)
    for _ in range(TURNS):
        if top == 0:
            break
        found, top, rest = paths_within(
            costs, state, top, square, min(ahead * expected, limit), np.bool_(False)
        )
        if found < 0:
            return -1, top
        if top == 0 or rest <= ahead * expected:
            break
        keep(other.room, here, state)
        take(other.room, there, state)
        here, there, expected, ahead, top = there, here, rest, 1.0, free_rows(state)
    return 0, top


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def _certify(costs, state, level, typical):  # pragma: no cover - compiled
    """Find the row duals, and column duals that close the gap; return SOLVED or DOUBTFUL.

    Args:
        level: the dual of unmatched columns.
        typical: the sum of typical costs of the pairs, if all matched costs are 0.
    """
    c, start, n, m, sign = costs
    v, _, col_of, least, seconds, columns, _, counts, best = state
    total, kept = 0.0, best.items.shape[0] > 0
    for i in range(n):
        at_row = start + i * m
        x, dual = sign * np.float64(c[at_row + col_of[i]]), v[col_of[i]]
        total += abs(x)
        # All columns but one are bounded by what was last read of the row. A bid brings its column to that bound, but for rounding.
        low = min(x - dual, sign * np.float64(c[at_row + columns[i]]) - v[columns[i]])
        if low - seconds[i] > EPS * (abs(x) + abs(dual)) and kept:
            known = least_of(v, best, i)
            if known > -np.inf:
                low = seconds[i] = known
        if low - seconds[i] > EPS * (abs(x) + abs(dual)):
            low = least_of_row(c, at_row, m, sign, v)
            counts[READS] += 1
            seconds[i] = low
        least[i] = min(low, seconds[i])
    _, gap, bound = prove(costs, v, least, col_of, level)
    top_dual = 0.0
    for j in range(m):
        top_dual = max(top_dual, abs(v[j]))
    if total == 0.0:
        total = typical
    doubtful = gap > bound or (total > 0.0 and n * top_dual > LARGE_DUALS * total)
    return DOUBTFUL if doubtful else SOLVED


@njit(nogil=True, cache=True, forceinline=True)
def finish(costs, state, kind, other, limit, auctions, schedule):  # pragma: no cover - compiled
    """Match the rows that ``start`` has left; return SOLVED, INFEASIBLE, DOUBTFUL, LONG or WIDE.

    Args:
        costs, state: as ``start`` has left them.
        kind: RECTANGLE, SQUARE or LAST.
        other: other first duals.
        limit: scans that paths may be expected to take; LONG if they take more.
        auctions: whether an auction may run; LONG if one is wanted and may not.
        schedule: a ``SmallSchedule``.
    """
    n, m = costs.n, costs.m
    square, worst, typical = kind == SQUARE, np.inf, n * typical_gap(state.least, state.seconds)
    if kind != LAST and n >= schedule.crowded_from and not is_square(n, m):
        worst = np.float64(n * (n // WORST_SHARE))
    limit = min(limit, worst)
    state = with_best(state)
    outcome, top, expected, ahead = _match_by_bids(costs, state, square, other, limit, auctions, schedule)
    if outcome != OPEN:
        return outcome
    if ahead > 0.0:
        found, top = _take_turns(costs, state, top, square, other, expected, ahead, limit)
        if found < 0:
            return INFEASIBLE
    if top > 0:
        found, top, rest = paths_within(costs, state, top, square, limit, np.bool_(True))
        if found < 0:
            return INFEASIBLE
        if top > 0:
            return WIDE if kind == RECTANGLE and rest > 2.0 * worst else LONG  # it is twice what was expected
    level = np.inf
    if n < m:
        level = level_columns(costs, state, worst)
        if level == np.inf:
            return LONG
    return _certify(costs, state, level, typical)
