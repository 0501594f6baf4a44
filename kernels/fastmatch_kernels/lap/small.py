"""Assignment over whole rows, in one compiled call on one core and without the interpreter's lock.

The steps: rows take their best columns; if too many want the same ones, other first duals are tried (``first``); augmenting
row reduction and a short auction, which is undone if it does not pay (``bids``); shortest augmenting paths finish exactly
(``finish``).

Differences to the column duals are float64, and so are the column and row numbers that travel with values in vectors. Duals
have whole vectors of columns; beyond the m columns they are 0 and costs count as forbidden.
"""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels._numba.llvm import flat
from fastmatch_kernels.lap.best import new_best
from fastmatch_kernels.lap.finish import Other, finish
from fastmatch_kernels.lap.first import is_square, new_state, other_duals, start
from fastmatch_kernels.lap.kept import keep, room_to_keep, take
from fastmatch_kernels.lap.proof import gap_of
from fastmatch_kernels.lap.schedule import SmallSchedule
from fastmatch_kernels.lap.state import (
    AUCTIONED,
    CROWDED,
    DOUBTFUL,
    INFEASIBLE,
    LAST,
    LISTED,
    LISTS_AHEAD,
    LONG,
    OPEN,
    RECTANGLE,
    RESUMED,
    SOLVED,
    SQUARE,
    TOO_LARGE,
    WARM,
    WARM_AHEAD,
    WIDE,
    Costs,
    State,
)

__all__ = ["crowded_duals", "solve_matrix", "solve_one", "solve_stack"]

SCHEDULE = SmallSchedule()
"""The default schedule, a constant of the compiled code."""

LEFT, SCALE, EXPECTED = 4, 5, 6
"""Places, after those of the counts, in the last seven numbers in which a crowded problem waits: the rows that other first duals
leave free, the factor of the costs, and the scans that paths from zeros are expected to take."""


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def _allowed(itemsize, n, m, listed):  # pragma: no cover - compiled
    """Return how many scans paths may be expected to take, and whether auctions may run, if ``listed`` lists may take over."""
    if not listed or n * m < LISTED:
        return np.inf, True
    return LISTS_AHEAD * np.float64(n) / m, n * m * itemsize <= AUCTIONED


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def _scaled_back(outcome, sign, scale, state):  # pragma: no cover - compiled
    """Divide the duals of scaled costs by their factor; return (the outcome, ``sign`` over the factor).

    A solution that is doubtful, or impossible because large entries were forbidden, says nothing of the costs as they are.
    """
    factor = sign / scale
    if factor != 1.0:
        if outcome == INFEASIBLE or (outcome == DOUBTFUL and factor > 1.0):
            return TOO_LARGE, factor
        v, least = state.v, state.least
        for j in range(v.shape[0]):
            v[j] *= factor
        for i in range(least.shape[0]):
            least[i] *= factor
    return outcome, factor


@njit(nogil=True, cache=True, inner=True)
def _solve_from(costs, state, warm, listed, schedule):  # pragma: no cover - compiled
    """Solve one problem; return what became of it, as :func:`solve_one`."""
    n, m = costs.n, costs.m
    limit, auctions = _allowed(costs.c.itemsize, n, m, listed)
    kind = SQUARE if is_square(n, m) else RECTANGLE
    while True:
        outcome, scale, expected = start(costs, state, kind == SQUARE, warm, auctions, schedule)
        scaled = Costs(costs.c, costs.start, n, m, scale)
        if outcome in (OPEN, CROWDED):
            left, half, room = n + 1, room_to_keep(state), state.seconds
            if outcome == CROWDED:
                room = np.empty(2 * half)
                left = other_duals(scaled, state, schedule, room, half)
            other = Other(left, expected, room, half)
            outcome = finish(scaled, state, kind, other, limit, auctions, schedule)
        if outcome == WIDE:
            kind = SQUARE
        elif outcome == LONG and limit == np.inf:
            kind = LAST
        else:
            break
    outcome, _ = _scaled_back(outcome, costs.sign, scale, state)
    return outcome


@njit(nogil=True, cache=True)
def solve_one(
    c, n, m, sign, schedule, warm, listed, v, least, row_of, col_of, counts
):  # pragma: no cover - compiled
    """Solve one problem by a schedule that is not the default one.

    Args:
        c: flat costs; row i is ``c[i * m : (i + 1) * m]``, n <= m.
        sign: 1 or -1; costs are ``sign * c``.
        schedule: a ``SmallSchedule``.
        warm: whether ``v`` holds first duals; they are used if n = m.
        listed: whether candidate lists may take over.
        v: (m in whole vectors,) column duals, written. Unmatched columns have the largest one.
        least: (n,) row duals, the least c - v of every row, written.
        row_of, col_of: (m,), (n,) the matching, written.
        counts: as in ``state``, added to.

    Returns:
        SOLVED, WRONG, INFEASIBLE, TOO_LARGE, LONG if ``listed``, or DOUBTFUL, which is solved, but rounding may have hidden a better
        solution.
    """
    columns, stack = np.empty(n, np.int64), np.empty(n, np.int64)
    none = new_best(np.int64(0))
    state = State(v, row_of, col_of, least, np.empty(n), columns, stack, counts, none)
    return _solve_from(Costs(c, np.int64(0), n, m, sign), state, warm, listed, schedule)


@njit(nogil=True, cache=True)
def solve_stack(c, n, m, sign, lo, hi, out, bad):  # pragma: no cover - compiled
    """Solve problems lo..hi of a flat stack of (n, m) problems, n <= m; write row i's column to out[b, i].

    ``bad[b]`` is what :func:`solve_one` returns.
    """
    v, row_of, _, least, seconds, columns, stack, counts, best = new_state(n, m)
    for b in range(lo, hi):
        state = State(v, row_of, out[b], least, seconds, columns, stack, counts, best)
        bad[b] = _solve_from(Costs(c, b * n * m, n, m, sign), state, False, False, SCHEDULE)


@njit(nogil=True, cache=True)
def crowded_duals(C, room):  # pragma: no cover - compiled
    """Try other first duals for the problem that :func:`solve_matrix` left CROWDED, and write them to ``room``.

    This is a kernel of its own, because most problems do not need it and it takes as long to compile as half the others.
    """
    n, m = C.shape
    state = new_state(n, m)
    half = room_to_keep(state)
    take(room, np.int64(0), state)
    costs = Costs(flat(C), np.int64(0), n, m, room[2 * half + SCALE])
    room[2 * half + LEFT] = other_duals(costs, state, SCHEDULE, room, half)
    for k in range(4):
        room[2 * half + k] += state.counts[k]


@njit(nogil=True, cache=True)
def solve_matrix(C, sign, transposed, pairs, proof, room, begin, kind, listed):  # pragma: no cover - compiled
    """Solve one contiguous matrix (n, m), n <= m, and write all of the result: a small problem has no time for more calls.

    Results are written and not returned, because numba takes a microsecond to return an array.

    Args:
        transposed: ``C`` is the transpose of what was asked for; so are the results.
        pairs: (2, n) int64, the rows and columns of the matched pairs, rows ascending.
        proof: (n + m + 7,) float64, the row duals, the column duals, the objective, the gap, its bound, and the four counts;
            (0,) if no certificate is wanted.
        room: float64. (m,) column duals to start from, if WARM. Else (room_for(m),) if SQUARE and the schedule may find rows
            crowded, and otherwise it may be (0,).
        begin: ZEROS, or RESUMED if the problem was left CROWDED and :func:`crowded_duals` has looked for other first
            duals, or WARM. These are numbers of one compiled kernel: a kernel for warm starts would take as long again.
        kind: RECTANGLE, SQUARE or LAST.
        listed: whether candidate lists may take over.

    Returns:
        What became of it, as :func:`solve_one`, or CROWDED or WIDE; also LONG if given duals do not help.
    """
    n, m = C.shape
    state = new_state(n, m)
    v, row_of, _, least, seconds, columns, stack, counts, best = state
    state = State(v, row_of, pairs[1], least, seconds, columns, stack, counts, best)
    # A plain 0 has a type of its own, for which all that is called would be compiled once more.
    costs = Costs(flat(C), np.int64(0), n, m, sign)
    limit, auctions = _allowed(C.itemsize, n, m, listed)
    half, left = room_to_keep(state), n + 1
    if begin == WARM:
        limit = min(limit, np.float64(WARM_AHEAD * n))
        for j in range(m):
            v[j] = room[j]
    if begin == RESUMED:
        take(room, np.int64(0), state)
        for k in range(4):
            counts[k] = np.int64(room[2 * half + k])
        left, expected, outcome = int(room[2 * half + LEFT]), room[2 * half + EXPECTED], OPEN
        scale = room[2 * half + SCALE]
    else:
        outcome, scale, expected = start(costs, state, kind == SQUARE, begin == WARM, auctions, SCHEDULE)
        if outcome == CROWDED:
            room[2 * half + SCALE], room[2 * half + EXPECTED] = scale, expected
            keep(room, np.int64(0), state)
            for k in range(4):
                room[2 * half + k] = counts[k]
    costs = Costs(costs.c, costs.start, n, m, scale)
    if outcome == OPEN:
        outcome = finish(costs, state, kind, Other(left, expected, room, half), limit, auctions, SCHEDULE)
    at = n + m
    if proof.shape[0] > 0 and outcome in (SOLVED, DOUBTFUL):
        total, gap, bound = gap_of(costs, v, least, pairs[1])
        proof[at], proof[at + 1], proof[at + 2] = total / scale, gap, bound
    outcome, factor = _scaled_back(outcome, sign, scale, state)
    if outcome != SOLVED and outcome != DOUBTFUL:
        return outcome
    if proof.shape[0] > 0:
        proof[at + 1] *= factor
        proof[at + 2] *= factor
        for k in range(4):
            proof[at + 3 + k] = counts[k]
        _write_duals(state, sign, transposed, proof)
    _write_pairs(state, transposed, pairs)
    return outcome


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def _write_duals(state, sign, transposed, proof):  # pragma: no cover - compiled
    """Write the duals of rows and columns. Those of unmatched columns, the largest, become 0."""
    v, least = state.v, state.least
    n, m = least.shape[0], state.row_of.shape[0]
    first, second = (m, 0) if transposed else (0, n)
    level = 0.0
    for j in range(m if n < m else 0):
        level = v[j] if j == 0 else max(level, v[j])
    for i in range(n):
        proof[first + i] = sign * (least[i] + level)
    for j in range(m):
        proof[second + j] = sign * (v[j] - level)


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def _write_pairs(state, transposed, pairs):  # pragma: no cover - compiled
    """Write the matched pairs of a state whose ``col_of`` is ``pairs[1]``."""
    row_of, rows, columns = state.row_of, pairs[0], pairs[1]
    if transposed:
        k = 0
        for j in range(row_of.shape[0]):
            if row_of[j] >= 0:
                rows[k] = j
                columns[k] = row_of[j]
                k += 1
    else:
        for i in range(rows.shape[0]):
            rows[i] = i
