"""Bids over whole rows: augmenting row reduction (Jonker and Volgenant 1987) and a short auction (Bertsekas 1988).

They are not those of the candidate lists, because in small matrices a row is a few vectors. A solve by lists takes 3 to 7
times as long at n = 64, and 2 to 4 times at n = 256.
"""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels.lap.best import best_two, bound_of
from fastmatch_kernels.lap.duals import typical_gap
from fastmatch_kernels.lap.kept import keep, room_to_keep, take
from fastmatch_kernels.lap.match import MISSES, free_rows, free_tie, two_least
from fastmatch_kernels.lap.order import shuffle
from fastmatch_kernels.lap.state import BIDS, READS, SLICES

__all__ = ["bid_rows", "bids", "largest_fall", "lower_best", "reduce"]

ASKED = 64
"""Bids whose row has to be read again, beyond those for which the columns that were kept do, before all rows are read at once."""

SENTINEL = 2.0**20
"""Typical gap, in ranges of the rows' minima and in smallest gaps, beyond which it is one to entries that stand for "never"."""


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def _take(costs, state, i, first, j, second, tied, eps, most, ties, ahead):  # pragma: no cover - compiled
    """Let row i bid for its best column j, or for one that ties with it.

    Returns:
        (the row that it displaces or -1; the column that it takes or -1; 1 if it has sought a free column that ties, -1 if it has
        in vain, else 0). Where ``ahead`` is 0 none is sought.
    """
    c, start, _, m, sign = costs
    v, row_of, col_of, _, seconds, columns, _, _, _ = state
    displaced, taken, sought = np.int64(-1), np.int64(-1), 0
    if second < np.inf:  # else one column is allowed or none: the paths decide
        if second == first and row_of[j] >= 0:
            unknown = tied == j  # the column that ties is not kept
            j = tied
            if (ties or unknown) and ahead > 0 and row_of[j] >= 0:
                j = free_tie(c, start + i * m, sign, m, v, row_of, first, np.int64(0), j)
                sought = 1 if row_of[j] < 0 else -1
        old = row_of[j]
        if old < 0 or eps > 0.0 or second > first:
            v[j] -= min(second - first, most) + eps
            row_of[j] = i
            col_of[i] = j
            seconds[i], columns[i] = second, j
            taken = j
            if old >= 0:
                col_of[old] = -1
                displaced = old
    return displaced, taken, sought


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def _bid_by_reads(costs, state, top, eps, most, limit, ties):  # pragma: no cover - compiled
    """Let rows bid as in :func:`_bid`, each after a read; return (what is left of the stack, the bids)."""
    c, start, _, m, sign = costs
    stack = state.stack
    made, i, ahead = 0, np.int64(-1), MISSES
    while made < limit:
        if i < 0:
            if top == 0:
                break
            top -= 1
            i = stack[top]
        made += 1
        first, j, second, tied = two_least(c, start + i * m, sign, m, state.v)
        i, _, sought = _take(costs, state, i, first, j, second, tied, eps, most, ties, ahead)
        ahead += sought
    if i >= 0:
        stack[top] = i
        top += 1
    return top, made


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def _bid_by_kept(costs, state, top, eps, most, limit, ties):  # pragma: no cover - compiled
    """The same by the best columns that are kept, while these tell enough; return the rows that were read too.

    Two rows bid in turn, because each bid waits for the one before, and a processor can look up the columns of both at once. So
    there may be one bid more than ``limit``.
    """
    v, stack, best = state.v, state.stack, state.best
    made, read, told, ahead = 0, 0, ASKED, MISSES
    i = k = np.int64(-1)
    while made < limit and told > 0:
        if i < 0:
            if top > 0:
                top -= 1
                i = stack[top]
            elif k < 0:
                break
            else:
                i, k = k, i
        if k < 0 and top > 0:
            top -= 1
            k = stack[top]
        known = bound_of(best, i) > -np.inf
        first, j, second, tied, again = best_two(costs, v, best, i)
        made += 1
        read += again
        told += known * (1 - 2 * again)
        first_k, j_k, second_k, tied_k = np.inf, np.int64(-2), np.inf, np.int64(-2)
        if k >= 0:
            known = bound_of(best, k) > -np.inf
            first_k, j_k, second_k, tied_k, again = best_two(costs, v, best, k)
            made += 1
            read += again
            told += known * (1 - 2 * again)
        i, taken, sought = _take(costs, state, i, first, j, second, tied, eps, most, ties, ahead)
        ahead += sought
        if k >= 0:
            # If it was another second best, a bound on that is known still.
            if (taken == j_k) | (taken == tied_k):
                first_k, j_k, second_k, tied_k, again = best_two(costs, v, best, k)
                read += again
                told -= 2 * again
            k, _, sought = _take(costs, state, k, first_k, j_k, second_k, tied_k, eps, most, ties, ahead)
            ahead += sought
    if k >= 0:
        stack[top] = k
        top += 1
    if i >= 0:
        stack[top] = i
        top += 1
    return top, made, read


@njit(nogil=True, cache=True, inner=True, borrows=True)
def _bid(costs, state, top, eps, most, limit, ties):  # pragma: no cover - compiled
    """Let the rows on ``stack[:top]`` bid until the stack is empty or ``limit`` bids are spent; return (what is left, the rows read).

    A row takes its best column and lowers its dual until the column is ``eps`` worse than the row's second best. With
    eps = 0 this is augmenting row reduction: a row whose two best tie is left free, unless another best one is found free. Such
    ones are looked for with ``ties``, or if only one column is known, while that is not in vain.
    No dual falls by more than ``most`` and eps: the pair stays its row's best. ``columns`` and ``seconds`` tell of its last bid what
    ``survey`` told of the row: a column, and a bound on all others. So its row dual needs no other read in the end.
    """
    made = read = 0
    if state.best.items.shape[0] > 0:
        top, made, read = _bid_by_kept(costs, state, top, eps, most, limit, ties)
    if top > 0 and made < limit:
        top, more = _bid_by_reads(costs, state, top, eps, most, limit - made, ties)
        made, read = made + more, read + more
    state.counts[BIDS] += made
    return top, read


@njit(nogil=True, cache=True)
def bid_rows(costs, state, top, eps, limit, ties):  # pragma: no cover - compiled
    """Let rows bid as in :func:`_bid`, for the solver of larger matrices where candidate lists do not pay."""
    top, read = _bid(costs, state, top, eps, np.inf, limit, ties)
    state.counts[READS] += read
    return top


@njit(nogil=True, cache=True, inner=True, borrows=True)
def reduce(costs, state, top, most, limit, ties):  # pragma: no cover - compiled
    """Run a round of augmenting row reduction, of ``limit`` bids; return how many rows are free, on the stack."""
    _bid(costs, state, top, 0.0, most, limit, ties)
    return free_rows(state)


@njit(nogil=True, cache=True, inner=True, borrows=True)
def _match_at_once(costs, state, top):  # pragma: no cover - compiled
    """Match rows on the stack to a free column among their best; return how many are left.

    A path would end there too, but takes as long as ten reads to begin.
    """
    c, start, _, m, sign = costs
    v, row_of, col_of, _, seconds, columns, stack, _, _ = state
    hits, misses, none = 0, 0, np.int64(-1)
    shuffle(stack, top)
    for e in range(top):
        if misses >= hits + MISSES:
            break
        i = stack[e]
        first, j, second, tied = two_least(c, start + i * m, sign, m, v)
        if not first < np.inf:
            continue
        if row_of[j] >= 0 and second == first:
            j = (
                tied
                if row_of[tied] < 0
                else free_tie(c, start + i * m, sign, m, v, row_of, first, np.int64(0), none)
            )
        if j < 0 or row_of[j] >= 0:
            misses += 1
            continue
        hits += 1
        row_of[j] = i
        col_of[i] = j
        seconds[i], columns[i] = second, j
    return free_rows(state)


@njit(nogil=True, cache=True, inner=True, borrows=True)
def largest_fall(least, seconds, gap):  # pragma: no cover - compiled
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


@njit(nogil=True, cache=True, inner=True, borrows=True)
def lower_best(costs, state, most):  # pragma: no cover - compiled
    """Lower the duals of columns whose rows like them best, down to the bounds on the others: these bids need no read."""
    c, start, n, m, sign = costs
    v, _, col_of, _, seconds, columns, _, _, _ = state
    for i in range(n):
        j = columns[i]
        if col_of[i] == j and seconds[i] < np.inf:
            x = sign * np.float64(c[start + i * m + j]) - v[j]
            v[j] -= max(0.0, min(seconds[i] - x, most))


@njit(nogil=True, cache=True, inner=True, borrows=True)
def _phase(costs, state, top, eps, most, schedule):  # pragma: no cover - compiled
    """Run a phase of the auction; return whether it was a price war.

    In a price war, a bid per row leaves nearly as many rows free as before.
    """
    n = costs.n
    for _ in range(schedule.bids):
        if top == 0:
            return False
        before = top
        top, _ = _bid(costs, state, top, eps, most, n, np.bool_(False))
        if top > schedule.war_above * before and top > schedule.war_few * n:
            return True
    return top > 0


@njit(nogil=True, cache=True, inner=True)
def _auction(costs, state, top, eps, most, schedule):  # pragma: no cover - compiled
    """Run a short auction; return how many rows are left, and whether it paid. One that leaves more rows free is undone."""
    extra = int(schedule.extra_steps * costs.n)
    held = np.empty(room_to_keep(state))
    keep(held, np.int64(0), state)
    before = top
    for phase in range(schedule.phases):
        war = _phase(costs, state, top, eps, most, schedule)
        state.row_of[:] = -1
        state.col_of[:] = -1
        top = free_rows(state)
        for _ in range(2):
            top = reduce(costs, state, top, most, top + extra, np.bool_(False))
        if top >= before and (war or phase == 0 or phase == schedule.phases - 1):
            take(held, np.int64(0), state)  # bounds too: those read under lower duals would be false
            return free_rows(state), False
        if war:
            return top, False
        if top <= schedule.repeat_above * costs.n:
            break
        eps *= schedule.eps_factor
    return top, True


@njit(nogil=True, cache=True, inner=True, borrows=True)
def bids(costs, state, top, square, lower, auctions, schedule):  # pragma: no cover - compiled
    """Match free rows by row reduction and a short auction; return how many are left, on the stack, and whether it paid.

    Without ``auctions``, one that is wanted counts as one that does not pay. With ``lower``, row reduction begins with the bids
    of matched rows. A crowded matrix has found its duals in another way, and these bids would make its paths longer.
    """
    n, counts = costs.n, state.counts
    extra = int(schedule.extra_steps * n)
    gap = typical_gap(state.least, state.seconds)
    most = largest_fall(state.least, state.seconds, gap)
    if lower:
        lower_best(costs, state, most)
    large, ties = n >= schedule.reduce_from, not square
    for turn in range(schedule.reductions):
        if large and (turn == 0 or top <= schedule.auction_above * n):
            top = reduce(costs, state, top, most, top + extra, ties)
    calm = top <= schedule.auction_above * n
    eps = schedule.first_eps * gap if auctions and square and n >= schedule.auction_from and not calm else 0.0
    rounds = 0 if large else schedule.reductions
    if 0.0 < eps < np.inf:
        top, calm = _auction(costs, state, top, eps, most, schedule)
        rounds = 1 if large else schedule.reductions
    for _ in range(rounds):
        top = reduce(costs, state, top, most, top + extra, ties)
    # No auction follows in a rectangle: row reduction goes on until a path takes less time than a row's bids.
    settled, made = top, np.int64(0)
    while not square and top > 0 and settled * schedule.dear_bids > made:
        before, made = top, -counts[BIDS]
        top = reduce(costs, state, top, most, n // SLICES + 1, ties)
        settled = before - top
        made += counts[BIDS]
    if square and top > 0:
        top = _match_at_once(costs, state, top)
    return top, calm
