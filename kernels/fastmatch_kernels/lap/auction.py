"""The auction over candidate lists (Bertsekas 1988)."""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels.lap.lists import best_two
from fastmatch_kernels.lap.rows import list_row, workspace
from fastmatch_kernels.lap.state import BIDS, READS

__all__ = ["auction"]


@njit(nogil=True, cache=True)
def auction(
    C, sign, v, lists, matching, stack, top, eps, limit, refills, waits, counts
):  # pragma: no cover - compiled
    """Let the rows on ``stack[:top]`` bid until the stack is empty or ``limit`` bids are spent; return (top, waits).

    A row takes its best column and lowers its dual until the column is ``eps`` worse than the row's second best
    (Gauss-Seidel). With ``eps`` = 0 this is augmenting row reduction (Jonker and Volgenant 1987): a row whose two best tie
    over a taken column is left free, because otherwise it need not end. ``waits`` is the number of rows in
    ``refills.pending``, always 0 with a matrix. Rows that are left free have ``col_of`` FREE and are not on the stack.
    """
    start, length, cols, costs, bound = lists
    row_of, col_of, cost_of = matching
    pending, _ = refills
    room = workspace(v.shape[0])
    bids = 0
    while top > 0 and bids < limit:
        top -= 1
        i = stack[top]
        bids += 1
        first, place, second = best_two(C, v, start, length, cols, costs, i)
        if second > bound[i]:
            if C is None:
                pending[waits] = i
                waits += 1
                continue
            list_row(C, sign, i, v, room, start, cols, costs, bound)
            counts[READS] += 1
            first, place, second = best_two(C, v, start, length, cols, costs, i)
            second = min(second, bound[i])
        if not second < np.inf:
            continue  # one allowed column or none: the shortest paths decide
        j = cols[place]
        old = row_of[j]
        if eps == 0.0 and old >= 0 and first == second:
            continue
        lower = v[j] - ((second - first) + eps)
        if C is None and old >= 0 and not lower < v[j]:
            continue  # a step below the dual's rounding is a price war without end; with a matrix, bids run out sooner
        v[j] = lower
        row_of[j] = i
        col_of[i] = j
        cost_of[i] = costs[place]
        if old >= 0:
            col_of[old] = -1
            stack[top] = old
            top += 1
    counts[BIDS] += bids
    return top, waits
