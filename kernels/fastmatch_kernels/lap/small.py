"""Assignment over whole rows, in one compiled call on one core and without the interpreter's lock.

The steps: rows take their best columns; if too many want the same ones, other first duals are tried; augmenting row
reduction (Jonker and Volgenant 1987); a short auction (Bertsekas 1988), which is undone if it does not pay; shortest
augmenting paths finish exactly.

The auction and the reduction are not those of the candidate lists, because at these sizes a row is a few vectors. A
solve by lists takes 3 to 7 times as long at n = 64, and 2 to 4 times at n = 256.

The costs of one problem are ``sign * c``. ``c`` is flat, and row i begins at ``start + i * m``. Differences to the column
duals v are float64, and so are the column and row numbers that travel with values in vectors. ``v`` has whole vectors of
columns; beyond the m columns it is 0 and costs count as forbidden.
"""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels._numba.llvm import flat
from fastmatch_kernels._numba.simd import WIDTH
from fastmatch_kernels.lap.copying import copy_to
from fastmatch_kernels.lap.duals import better_duals, typical_gap
from fastmatch_kernels.lap.match import (
    free_rows,
    match_surveyed,
    reduce_surveyed,
    survey,
    two_least,
)
from fastmatch_kernels.lap.paths import level_columns, new_search, path, shuffle, sort_by
from fastmatch_kernels.lap.proof import EPS, gap_of, least_of_row, prove
from fastmatch_kernels.lap.scale import fitting_scale
from fastmatch_kernels.lap.state import (
    ACCEPTED,
    AUCTIONED,
    BIDS,
    CROWDED,
    CROWDED_SHARE,
    DOUBTFUL,
    FEW_PATHS,
    FEW_ROWS,
    FEWER_PATHS,
    GROWING,
    GROWN,
    HUGE,
    INFEASIBLE,
    KEPT,
    LAST,
    LISTED,
    LISTS_AHEAD,
    LONG,
    OPEN,
    POPS,
    READS,
    RECTANGLE,
    RECTANGLE_AHEAD,
    RESUMED,
    SEARCHES,
    SLICES,
    SOLVED,
    SQUARE,
    TOO_LARGE,
    TURNS,
    WARM,
    WARM_AHEAD,
    WIDE,
    WORST_SHARE,
    WRONG,
    SmallSchedule,
    is_nearly_square,
)

__all__ = ["bid_rows", "crowded_duals", "solve_matrix", "solve_one", "solve_stack"]

LARGE_DUALS = 2.0**26
"""Largest dual, in typical costs, beyond which small costs may have been lost in its rounding."""

SENTINEL = 2.0**20
"""Typical gap, in ranges of the rows' minima and in smallest gaps, beyond which it is one to entries that stand for "never"."""

SCHEDULE = tuple(SmallSchedule())
"""The default schedule, a constant of the compiled code."""


_is_nearly_square = njit(nogil=True, cache=True, inner=True)(is_nearly_square)


@njit(nogil=True, cache=True, inner=True)
def _bid(
    c, start, sign, m, v, seconds, columns, row_of, col_of, stack, top, eps, most, limit, counts
):  # pragma: no cover - compiled
    """Let the rows on ``stack[:top]`` bid until the stack is empty or ``limit`` bids are spent; return what is left.

    A row takes its best column and lowers its dual until the column is ``eps`` worse than the row's second best. With
    eps = 0 this is augmenting row reduction: a row whose two best tie is left free. No dual falls by more than ``most``
    and eps: the pair stays its row's best. ``columns`` and ``seconds`` tell of its last bid what ``survey`` told of the row: a
    column, and a bound on all others. So its row dual needs no other read in the end.
    """
    bids = 0
    while top > 0 and bids < limit:
        top -= 1
        bids += 1
        i = stack[top]
        first, j, second, tied = two_least(c, start + i * m, sign, m, v)
        if not second < np.inf:
            continue  # one allowed column or none: the paths decide
        if second == first and row_of[j] >= 0:
            j = tied
        old = row_of[j]
        if old < 0 or eps > 0.0 or second > first:
            v[j] -= min(second - first, most) + eps
            row_of[j] = i
            col_of[i] = j
            seconds[i], columns[i] = second, j
            if old >= 0:
                col_of[old] = -1
                stack[top] = old
                top += 1
    counts[BIDS] += bids
    return top


@njit(nogil=True, cache=True)
def bid_rows(
    c, sign, m, v, seconds, columns, row_of, col_of, stack, top, eps, limit, counts
):  # pragma: no cover - compiled
    """Let rows bid as in :func:`_bid`, for the solver of larger matrices where candidate lists do not pay."""
    before = counts[BIDS]
    top = _bid(
        c, np.int64(0), sign, m, v, seconds, columns, row_of, col_of, stack, top, eps, np.inf, limit, counts
    )
    counts[READS] += counts[BIDS] - before
    return top


@njit(nogil=True, cache=True, inner=True)
def _phase(
    c,
    start,
    sign,
    m,
    v,
    seconds,
    columns,
    row_of,
    col_of,
    stack,
    top,
    eps,
    most,
    rounds,
    war_above,
    few,
    counts,
):  # pragma: no cover
    """Run a phase of the auction; return whether it was a price war.

    In a price war, a bid per row leaves nearly as many rows free as before.
    """
    n = col_of.shape[0]
    for _ in range(rounds):
        if top == 0:
            return False
        before = top
        top = _bid(c, start, sign, m, v, seconds, columns, row_of, col_of, stack, top, eps, most, n, counts)
        if top > war_above * before and top > few * n:
            return True
    return top > 0


@njit(nogil=True, cache=True, inner=True)
def _reduce(
    c, start, sign, m, v, seconds, columns, row_of, col_of, stack, top, most, bids, counts
):  # pragma: no cover - compiled
    """Run a round of augmenting row reduction; return how many rows are free, on ``stack``."""
    _bid(c, start, sign, m, v, seconds, columns, row_of, col_of, stack, top, 0.0, most, bids, counts)
    return free_rows(col_of, stack)


@njit(nogil=True, cache=True, inner=True)
def _copy(v, row_of, col_of, from_v, from_row_of, from_col_of):  # pragma: no cover - compiled
    """Copy duals and a matching."""
    copy_to(v, from_v)
    copy_to(row_of, from_row_of)
    copy_to(col_of, from_col_of)


@njit(nogil=True, cache=True, inner=True)
def _largest_fall(least, seconds, gap):  # pragma: no cover - compiled
    """Return how far a bid may lower a dual: more than good assignments need, and less than a sentinel for "never".

    A dual as large as such an entry would hide small costs in its rounding, and the problem would be solved again. The typical
    gap does not count if it is far beyond the range of the rows' minima and the smallest gap: then it is one to a sentinel. Among
    other costs some row has a small gap.
    """
    n = least.shape[0]
    low, high = np.inf, -np.inf
    smallest = np.inf
    for i in range(n):
        low, high = min(low, least[i]), max(high, least[i])
        x = seconds[i] - least[i]
        if x > 0.0:
            smallest = min(smallest, x)
    spread = high - low
    most = 4.0 * n * (spread if 0.0 < max(spread, smallest) * SENTINEL < gap else spread + gap)
    return most if most > 0.0 else np.inf


@njit(nogil=True, cache=True, inner=True)
def _lower_best(c, start, sign, m, v, seconds, columns, col_of, most):  # pragma: no cover - compiled
    """Lower the duals of columns whose rows like them best, down to the bounds on the others: these bids need no read."""
    for i in range(col_of.shape[0]):
        j = columns[i]
        if col_of[i] == j and seconds[i] < np.inf:
            x = sign * np.float64(c[start + i * m + j]) - v[j]
            v[j] -= max(0.0, min(seconds[i] - x, most))


@njit(nogil=True, cache=True, inner=True)
def _bids(
    c,
    start,
    sign,
    m,
    v,
    least,
    seconds,
    columns,
    row_of,
    col_of,
    stack,
    top,
    square,
    lower,
    auctions,
    schedule,
    counts,
):  # pragma: no cover - compiled
    """Match free rows by row reduction and a short auction; return how many are left, on ``stack``, and whether it paid.

    Without ``auctions``, one that is wanted counts as one that does not pay. An auction that leaves more rows free than there were
    is undone. With ``lower``, row reduction begins with the bids of matched
    rows. A crowded matrix has found its duals in another way, and these bids would make its paths longer.
    """
    (
        auction_above, war_above, war_few, repeat_above, phases, first_eps, eps_factor, bids, reductions, extra_steps,
        reduce_from, auction_from, dear_bids,
    ) = schedule[:13]  # fmt: skip
    n = col_of.shape[0]
    extra = int(extra_steps * n)
    gap = typical_gap(least, seconds)
    most = _largest_fall(least, seconds, gap)
    if lower:
        _lower_best(c, start, sign, m, v, seconds, columns, col_of, most)
    for turn in range(reductions):
        if n >= reduce_from and (turn == 0 or top <= auction_above * n):
            top = _reduce(
                c, start, sign, m, v, seconds, columns, row_of, col_of, stack, top, most, top + extra, counts
            )
    calm = top <= auction_above * n
    eps = first_eps * gap if auctions and square and n >= auction_from and not calm else 0.0
    if 0.0 < eps < np.inf:
        v_before, row_before, col_before = np.empty(v.shape[0]), np.empty(m, np.int64), np.empty(n, np.int64)
        seconds_before, columns_before = np.empty(n), np.empty(n, np.int64)
        copy_to(seconds_before, seconds)
        copy_to(columns_before, columns)
        _copy(v_before, row_before, col_before, v, row_of, col_of)
        before = top
        calm = True
        for phase in range(phases):
            war = _phase(
                c, start, sign, m, v, seconds, columns, row_of, col_of, stack, top, eps, most, bids, war_above,
                war_few, counts,
            )  # fmt: skip
            row_of[:] = -1
            col_of[:] = -1
            top = free_rows(col_of, stack)
            for _ in range(2):
                top = _reduce(
                    c, start, sign, m, v, seconds, columns, row_of, col_of, stack, top, most, top + extra,
                    counts,
                )  # fmt: skip
            if top >= before and (war or phase == 0 or phase == phases - 1):
                _copy(v, row_of, col_of, v_before, row_before, col_before)
                copy_to(seconds, seconds_before)  # bounds read under lower duals would be false
                copy_to(columns, columns_before)
                top = free_rows(col_of, stack)
                calm = False
                break
            if war:
                calm = False
                break
            if top <= repeat_above * n:
                break
            eps *= eps_factor
        for _ in range(1 if n >= reduce_from else reductions):
            top = _reduce(
                c, start, sign, m, v, seconds, columns, row_of, col_of, stack, top, most, top + extra, counts
            )
    elif n < reduce_from:
        for _ in range(reductions):
            top = _reduce(
                c, start, sign, m, v, seconds, columns, row_of, col_of, stack, top, most, top + extra, counts
            )
    # No auction follows in a rectangle: row reduction goes on until a path takes less time than a row's bids.
    settled, made = top, np.int64(0)
    while not square and top > 0 and settled * dear_bids > made:
        before, made = top, -counts[BIDS]
        top = _reduce(
            c, start, sign, m, v, seconds, columns, row_of, col_of, stack, top, most, n // SLICES + 1, counts
        )
        settled = before - top
        made += counts[BIDS]
    return top, calm


@njit(nogil=True, cache=True, inner=True)
def _try_paths(
    c, start, n, m, square, sign, v, least, row_of, col_of, stack, top, limit, sunk, counts
):  # pragma: no cover - compiled
    """Augment from the rows ``stack[:top]`` while this is expected to scan no more than ``limit`` rows.

    If ``square``, all scans count, unless what was spent is ``sunk``: the limit is then what another way takes from there on.
    Otherwise it always is. Each path takes a free column of few, so later paths are expected to be longer; and where all rows want
    the same columns, each scans all that were matched before.

    Returns:
        (-1 if a row has no path, else 0; the number of free rows, which are then on ``stack``; the scans that are expected
        for these, of which later ones are longer).
    """
    search = new_search(m, v, row_of)
    before = last = counts[POPS] + counts[SEARCHES]
    tied, done, begin, rest, spent = top < 0, 0, 0, 0.0, 0.0
    spare, few = np.float64(m - n), FEW_PATHS if square else FEWER_PATHS
    shuffle(stack, top)
    sort_by(stack, few, top, least)  # the first ones, which the estimate comes from, remain a random sample
    while done < top:
        found, tied = path(c, start, m, sign, v, row_of, col_of, stack[done], search, tied, counts)
        if not found:
            return -1, top, rest
        done += 1
        now = counts[POPS] + counts[SEARCHES]
        if done - begin >= few and now - last > n // 16:
            scans, taken = now - last, done - begin
            begin, last = done, now
            if square:
                rest, spent = (top - done) * (scans / taken), np.float64(now - before)
            else:
                left = spare + (top - done)
                rest = scans * np.log(left / spare) / np.log((left + taken) / left)
                slope = (now - before) / (0.5 * done * done)
                if top > CROWDED_SHARE * n and done < GROWN:
                    continue
                if top > CROWDED_SHARE * n and slope >= GROWING:
                    rest = max(rest, 0.5 * slope * (top * top - done * done))
            if (0.0 if sunk else spent) + rest > limit:
                break
    return 0, free_rows(col_of, stack), 2.0 * rest


@njit(nogil=True, cache=True, inner=True)
def _keep(room, at, v, least, seconds, columns, row_of, col_of):  # pragma: no cover - compiled
    """Write duals and all that belongs to them to ``room[at:]``. Numbers of rows and columns are exact."""
    m = row_of.shape[0]
    for k in range(m):
        room[at + k] = row_of[k]
    for k in range(col_of.shape[0]):
        room[at + m + k] = col_of[k]
        room[at + 2 * m + k] = least[k]
        room[at + 3 * m + k] = seconds[k]
        room[at + 4 * m + k] = columns[k]
    at += KEPT * m
    for k in range(v.shape[0]):
        room[at + k] = v[k]


@njit(nogil=True, cache=True, inner=True)
def _take(room, at, v, least, seconds, columns, row_of, col_of):  # pragma: no cover - compiled
    """Read what :func:`_keep` wrote."""
    m = row_of.shape[0]
    for k in range(m):
        row_of[k] = np.int64(room[at + k])
    for k in range(col_of.shape[0]):
        col_of[k] = np.int64(room[at + m + k])
        least[k] = room[at + 2 * m + k]
        seconds[k] = room[at + 3 * m + k]
        columns[k] = np.int64(room[at + 4 * m + k])
    at += KEPT * m
    for k in range(v.shape[0]):
        v[k] = room[at + k]


@njit(nogil=True, cache=True, inner=True)
def _other_duals(c, start, n, m, sign, schedule, col_of, room, at, counts):  # pragma: no cover - compiled
    """Look for other first duals, write them as :func:`_keep` does, and return how many rows they leave free, else n + 1."""
    v, least, seconds = np.empty((m + WIDTH - 1) // WIDTH * WIDTH), np.empty(n), np.empty(n)
    columns, row_of, col_of2 = np.empty(n, np.int64), np.empty(m, np.int64), np.empty(n, np.int64)
    found = better_duals(
        c, start, sign, n, m, col_of, schedule[-3:], v, row_of, col_of2, least, seconds, columns, counts
    )
    _keep(room, at, v, least, seconds, columns, row_of, col_of2)
    return found


@njit(nogil=True, cache=True, inner=True)
def _as_rectangle(
    c, start, n, m, sign, schedule, v, least, seconds, columns, row_of, col_of, stack, top, counts
):  # pragma: no cover - compiled
    """Try to match crowded rows as those of a rectangle, whose paths may end at any free column; return OPEN, with none free,
    INFEASIBLE, or CROWDED, with the matching and the duals as they were.

    Other first duals are for columns that all rows need, and take longer if most of them are needed by few.
    """
    before = np.empty(v.shape[0] + KEPT * row_of.shape[0])
    _keep(before, np.int64(0), v, least, seconds, columns, row_of, col_of)
    most = _largest_fall(least, seconds, typical_gap(least, seconds))
    _lower_best(c, start, sign, m, v, seconds, columns, col_of, most)
    left = _reduce(c, start, sign, m, v, seconds, columns, row_of, col_of, stack, top, most, top, counts)
    found = 0
    if left <= top // 2:
        left, _ = _bids(
            c, start, sign, m, v, least, seconds, columns, row_of, col_of, stack, left, False, False, False, schedule, counts,
        )  # fmt: skip
        found, left, _ = _try_paths(
            c, start, n, m, False, sign, v, least, row_of, col_of, stack, left, np.float64(RECTANGLE_AHEAD * n), False,
            counts,
        )  # fmt: skip
    if found < 0:
        return INFEASIBLE
    if left == 0:
        return OPEN
    _take(before, np.int64(0), v, least, seconds, columns, row_of, col_of)
    return CROWDED


@njit(nogil=True, cache=True, inner=True, inline="always")
def _start(
    c, start, n, m, square, sign, schedule, warm, auctions, v, least, seconds, columns, row_of, col_of, counts
):  # pragma: no cover - compiled
    """Match rows from zeros, and along short paths if they are crowded.

    Returns:
        (SOLVED, OPEN, or CROWDED, which is LONG without ``auctions``; WRONG, INFEASIBLE or TOO_LARGE; ``sign``, or what costs are multiplied by; the scans that
        paths are expected to take, if CROWDED).
    """
    crowded_from, crowded_above, _, short_scans, short_tied_scans = schedule[13:-3]
    if not (warm and n == m):
        v[:] = 0.0
        warm = False
    row_of[:] = -1
    col_of[:] = -1
    scale, lo, total = sign, np.int64(0), 0.0
    while lo < n:
        hi = np.int64(FEW_ROWS) if lo == 0 and n > FEW_ROWS else n
        total += survey(c, start, scale, m, v, lo, hi, least, seconds, columns)
        counts[READS] += hi - lo
        lo = hi
        if not total < HUGE and scale == sign:
            scale = fitting_scale(c, start, start + n * m, sign)
            counts[READS] += n
            if scale == 0.0:
                return WRONG, sign, 0.0
            if scale == np.inf:
                return TOO_LARGE, sign, 0.0
            if scale != sign:
                v[:] = 0.0  # given duals are not scaled, but no other ones are looked for
                lo = np.int64(0)
            total = -np.inf
    match_surveyed(c, start, scale, m, v, np.int64(0), n, least, seconds, columns, row_of, col_of)
    stack = np.empty(n, np.int64)
    top = free_rows(col_of, stack)
    if top == 0:
        return SOLVED, scale, 0.0
    if warm or n < crowded_from or top <= crowded_above * n:
        return OPEN, scale, 0.0
    top = reduce_surveyed(c, start, scale, m, v, seconds, columns, row_of, col_of, stack, top)
    if not square or top <= crowded_above * n:
        return OPEN, scale, 0.0
    if n < m and _is_nearly_square(n, m):  # a wider one has been tried as a rectangle before
        state = _as_rectangle(
            c, start, n, m, scale, schedule, v, least, seconds, columns, row_of, col_of, stack, top, counts
        )
        if state != CROWDED:
            return state, scale, 0.0
        top = free_rows(col_of, stack)
    # If half of the rows have ties for their best column, neither other duals nor auctions help much.
    most = short_tied_scans if typical_gap(least, seconds) == 0.0 else short_scans
    at, top, rest = _try_paths(
        c, start, n, m, square, scale, v, least, row_of, col_of, stack, top, most * n, False, counts
    )
    if at < 0:
        return INFEASIBLE, scale, 0.0
    if top > crowded_above * n:
        return CROWDED if auctions else LONG, scale, rest
    return OPEN, scale, rest


@njit(nogil=True, cache=True, inner=True, inline="always")
def _finish(
    c,
    start,
    n,
    m,
    kind,
    sign,
    schedule,
    v,
    least,
    seconds,
    columns,
    row_of,
    col_of,
    limit,
    auctions,
    other,
    expected,
    room,
    at,
    counts,
):  # pragma: no cover - compiled
    """Match the rows that :func:`_start` has left; return SOLVED, INFEASIBLE, DOUBTFUL, LONG or WIDE.

    Args:
        kind: RECTANGLE, SQUARE or LAST.
        limit: scans that paths may be expected to take; LONG if they take more.
        auctions: whether an auction may run; LONG if one is wanted and may not.
        other: how many rows other first duals leave free; n + 1 without any.
        expected: scans that paths from zeros are expected to take. After a price war they go on while they take half of that. Paths
            from other duals and they take turns, until one is expected to end sooner than the other.
        room: those duals and all that belongs to them, from ``room[at]`` on, as :func:`_keep` writes it, after room for as
            much again.
    """
    accepted_below, typical = schedule[15], n * typical_gap(least, seconds)
    stack = np.empty(n, np.int64)
    top = free_rows(col_of, stack)
    square, worst = kind == SQUARE, np.inf
    if kind != LAST and n >= schedule[13] and not _is_nearly_square(n, m):
        worst = np.float64(n * (n // WORST_SHARE))
    limit = min(limit, worst)
    kept, crowded, ahead = False, expected > 0.0, 1.0
    for attempt in range(2):
        # Duals that leave few rows free are taken at once; others only if bids from zeros are a price war.
        if other <= n and (attempt == 1 or other <= accepted_below * n):
            if attempt == 1:
                if 0.5 * expected > limit:
                    return LONG
                begun, top, expected = _try_paths(
                    c, start, n, m, square, sign, v, least, row_of, col_of, stack, top, 0.5 * expected,
                    False, counts,
                )  # fmt: skip
                if begun < 0:
                    return INFEASIBLE
                if top == 0:
                    break
            kept, ahead = True, 1.0 if attempt == 1 else ACCEPTED
            _keep(room, np.int64(0), v, least, seconds, columns, row_of, col_of)
            _take(room, at, v, least, seconds, columns, row_of, col_of)
            top, other = other, n + 1
            top = free_rows(col_of, stack)
        elif attempt == 1:
            break
        if top == 0:
            break
        top, calm = _bids(
            c, start, sign, m, v, least, seconds, columns, row_of, col_of, stack, top, square, not crowded,
            auctions, schedule, counts,
        )  # fmt: skip
        if calm:
            kept = kept and attempt == 0
            break
        if square and not auctions and typical > 0.0:
            return LONG
    here, there = at, np.int64(0)
    for _ in range(TURNS if kept else 0):
        if top == 0:
            break
        begun, top, rest = _try_paths(
            c, start, n, m, square, sign, v, least, row_of, col_of, stack, top, min(ahead * expected, limit), False,
            counts,
        )  # fmt: skip
        if begun < 0:
            return INFEASIBLE
        if top == 0 or rest <= ahead * expected:
            break
        _keep(room, here, v, least, seconds, columns, row_of, col_of)
        _take(room, there, v, least, seconds, columns, row_of, col_of)
        here, there, expected, ahead, top = there, here, rest, 1.0, free_rows(col_of, stack)
    if top > 0:
        begun, top, rest = _try_paths(
            c, start, n, m, square, sign, v, least, row_of, col_of, stack, top, limit,
            True, counts,
        )  # fmt: skip
        if begun < 0:
            return INFEASIBLE
        if top > 0:
            return WIDE if kind == RECTANGLE and rest > 2.0 * worst else LONG  # it is twice what was expected
    level = np.inf
    if n < m:
        level = level_columns(c, start, m, sign, v, row_of, col_of, worst, counts)
        if level == np.inf:
            return LONG
    total = 0.0
    for i in range(n):
        at_row = start + i * m
        x, dual = sign * np.float64(c[at_row + col_of[i]]), v[col_of[i]]
        total += abs(x)
        # All columns but one are bounded by what was last read of the row. A bid brings its column to that bound, but for rounding.
        low = min(x - dual, sign * np.float64(c[at_row + columns[i]]) - v[columns[i]])
        if low - seconds[i] > EPS * (abs(x) + abs(dual)):
            low = least_of_row(c, at_row, m, sign, v)
            counts[READS] += 1
            seconds[i] = low
        least[i] = min(low, seconds[i])
    _, gap, bound = prove(c, start, n, m, sign, v, level, least, col_of)
    top_dual = 0.0
    for j in range(m):
        top_dual = max(top_dual, abs(v[j]))
    if total == 0.0:
        total = typical
    doubtful = gap > bound or (total > 0.0 and n * top_dual > LARGE_DUALS * total)
    return DOUBTFUL if doubtful else SOLVED


@njit(nogil=True, cache=True, inner=True)
def _allowed(c, n, m, listed):  # pragma: no cover - compiled
    """Return how many scans paths may be expected to take, and whether auctions may run, if ``listed`` lists may take over."""
    if not listed or n * m < LISTED:
        return np.inf, True
    return LISTS_AHEAD * np.float64(n) / m, n * m * c.itemsize <= AUCTIONED


@njit(nogil=True, cache=True, inline="always")
def solve_one(
    c, start, n, m, sign, schedule, warm, listed, v, least, row_of, col_of, counts
):  # pragma: no cover - compiled
    """Solve one problem; return SOLVED, WRONG, INFEASIBLE, TOO_LARGE, LONG if ``listed``, or DOUBTFUL, which is solved,
    but rounding may have hidden a better solution.

    Args:
        c: flat costs; row i is ``c[start + i * m : start + (i + 1) * m]``, n <= m.
        sign: 1 or -1; costs are ``sign * c``.
        schedule: a ``SmallSchedule`` as a plain tuple.
        warm: whether ``v`` holds first duals; they are used if n = m.
        listed: whether candidate lists may take over.
        v: (m in whole vectors,) column duals, written. Unmatched columns have the largest one.
        least: (n,) row duals, the least c - v of every row, written.
        row_of, col_of: (m,), (n,) the matching, written.
        counts: as in ``state``, added to.
    """
    seconds, columns = np.empty(n), np.empty(n, np.int64)
    limit, auctions = _allowed(c, n, m, listed)
    state, scale, kind = WIDE, sign, SQUARE if _is_nearly_square(n, m) else RECTANGLE
    while True:
        state, scale, expected = _start(
            c, start, n, m, kind == SQUARE, sign, schedule, warm, auctions, v, least, seconds, columns, row_of, col_of,
            counts,
        )  # fmt: skip
        if state in (OPEN, CROWDED):
            other, room, half = n + 1, seconds, v.shape[0] + KEPT * m
            if state == CROWDED:
                room = np.empty(2 * half)
                other = _other_duals(c, start, n, m, scale, schedule, col_of, room, half, counts)
            state = _finish(
                c, start, n, m, kind, scale, schedule, v, least, seconds, columns, row_of, col_of, limit, auctions,
                other, expected, room, half, counts,
            )  # fmt: skip
        if state == WIDE:
            kind = SQUARE
        elif state == LONG and limit == np.inf:
            kind = LAST
        else:
            break
    state, _ = _scaled_back(state, sign, scale, v, least)
    return state


@njit(nogil=True, cache=True, inner=True)
def _scaled_back(state, sign, scale, v, least):  # pragma: no cover - compiled
    """Divide the duals of scaled costs by their factor; return (the state, ``sign`` over the factor).

    A solution that is doubtful, or impossible because large entries were forbidden, says nothing of the costs as they are.
    """
    factor = sign / scale
    if factor != 1.0:
        if state == INFEASIBLE or (state == DOUBTFUL and factor > 1.0):
            return TOO_LARGE, factor
        for j in range(v.shape[0]):
            v[j] *= factor
        for i in range(least.shape[0]):
            least[i] *= factor
    return state, factor


@njit(nogil=True, cache=True)
def crowded_duals(C, room):  # pragma: no cover - compiled
    """Try other first duals for the problem that :func:`solve_matrix` left CROWDED, and write them to ``room``.

    This is a kernel of its own, because most problems do not need it and it takes as long to compile as half the others.
    """
    n, m = C.shape
    counts, col_of = np.zeros(4, np.int64), np.empty(n, np.int64)
    for k in range(n):
        col_of[k] = np.int64(room[m + k])
    half = (m + WIDTH - 1) // WIDTH * WIDTH + KEPT * m
    scale = room[2 * half + 5]
    room[2 * half + 4] = _other_duals(flat(C), np.int64(0), n, m, scale, SCHEDULE, col_of, room, half, counts)
    for k in range(4):
        room[2 * half + k] += counts[k]


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
        The state, as :func:`solve_one`, or CROWDED or WIDE; also LONG if given duals do not help.
    """
    n, m = C.shape
    c = flat(C)
    # A plain 0 has a type of its own, for which all that is called would be compiled once more.
    start = np.int64(0)
    v, u, seconds = np.empty((m + WIDTH - 1) // WIDTH * WIDTH), np.empty(n), np.empty(n)
    columns, row_of, counts = np.empty(n, np.int64), np.empty(m, np.int64), np.zeros(4, np.int64)
    rows, col_of = pairs[0], pairs[1]
    half, other, state, scale, expected = v.shape[0] + KEPT * m, n + 1, OPEN, sign, 0.0
    limit, auctions = _allowed(c, n, m, listed)
    if begin == WARM:
        limit = min(limit, np.float64(WARM_AHEAD * n))
    if begin == RESUMED:
        _take(room, np.int64(0), v, u, seconds, columns, row_of, col_of)
        for k in range(4):
            counts[k] = np.int64(room[2 * half + k])
        other, scale, expected = np.int64(room[2 * half + 4]), room[2 * half + 5], room[2 * half + 6]
    else:
        if begin == WARM:
            v[:] = 0.0
            for j in range(m):
                v[j] = room[j]
        state, scale, expected = _start(
            c,
            start,
            n,
            m,
            kind == SQUARE,
            sign,
            SCHEDULE,
            begin == WARM,
            auctions,
            v,
            u,
            seconds,
            columns,
            row_of,
            col_of,
            counts,
        )
        if state == CROWDED:
            room[2 * half + 5], room[2 * half + 6] = scale, expected
            _keep(room, np.int64(0), v, u, seconds, columns, row_of, col_of)
            for k in range(4):
                room[2 * half + k] = counts[k]
    if state == OPEN:
        state = _finish(
            c, start, n, m, kind, scale, SCHEDULE, v, u, seconds, columns, row_of, col_of, limit, auctions, other, expected,
            room, half, counts,
        )  # fmt: skip
    if proof.shape[0] > 0 and state in (SOLVED, DOUBTFUL):
        numbers = n + m
        total, gap, bound = gap_of(c, start, n, m, scale, v, u, col_of)
        proof[numbers], proof[numbers + 1], proof[numbers + 2] = total / scale, gap, bound
    state, factor = _scaled_back(state, sign, scale, v, u)
    if state != SOLVED and state != DOUBTFUL:
        return state
    if proof.shape[0] > 0:
        numbers = n + m
        proof[numbers + 1] *= factor
        proof[numbers + 2] *= factor
        for k in range(4):
            proof[numbers + 3 + k] = counts[k]
        first, second = (m, 0) if transposed else (0, n)
        level = 0.0
        for j in range(m if n < m else 0):
            level = v[j] if j == 0 else max(level, v[j])  # unmatched columns have it; it is moved to the rows
        for i in range(n):
            proof[first + i] = sign * (u[i] + level)
        for j in range(m):
            proof[second + j] = sign * (v[j] - level)
    if transposed:
        k = 0
        for j in range(m):
            if row_of[j] >= 0:
                rows[k] = j
                col_of[k] = row_of[j]
                k += 1
    else:
        for i in range(n):
            rows[i] = i
    return state


@njit(nogil=True, cache=True)
def solve_stack(c, n, m, sign, schedule, lo, hi, out, bad):  # pragma: no cover - compiled
    """Solve problems lo..hi of a flat stack of (n, m) problems, n <= m; write row i's column to out[b, i].

    ``bad[b]`` is what :func:`solve_one` returns.
    """
    v = np.empty((m + WIDTH - 1) // WIDTH * WIDTH)
    least, row_of, counts = np.empty(n), np.empty(m, np.int64), np.zeros(4, np.int64)
    for b in range(lo, hi):
        bad[b] = solve_one(c, b * n * m, n, m, sign, schedule, False, False, v, least, row_of, out[b], counts)
