"""Paths over whole rows that are given up once they are expected to be long."""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels.lap.match import free_rows
from fastmatch_kernels.lap.order import shuffle, sort_by
from fastmatch_kernels.lap.paths import new_search, path
from fastmatch_kernels.lap.state import CROWDED_SHARE, FEW_PATHS, FEWER_PATHS, GROWING, GROWN, POPS, SEARCHES

__all__ = ["paths_within"]


@njit(nogil=True, cache=True, inner=True)
def paths_within(costs, state, top, square, limit, sunk):  # pragma: no cover - compiled
    """Augment from the rows ``stack[:top]`` while this is expected to scan no more than ``limit`` rows: see :func:`_paths_within`."""
    return _paths_within(costs, state, new_search(state), top, square, limit, sunk)


@njit(nogil=True, cache=True, inner=True, borrows=True)
def _paths_within(costs, state, search, top, square, limit, sunk):  # pragma: no cover - compiled
    """Augment from the rows ``stack[:top]`` while this is expected to scan no more than ``limit`` rows.

    If ``square``, all scans count, unless what was spent is ``sunk``: the limit is then what another way takes from there on.
    Otherwise it always is. Each path takes a free column of few, so later paths are expected to be longer; and where all rows want
    the same columns, each scans all that were matched before.

    Returns:
        (-1 if a row has no path, else 0; the number of free rows, which are then on the stack; the scans that are expected
        for these, of which later ones are longer).
    """
    n, stack, counts = costs.n, state.stack, state.counts
    before = last = counts[POPS] + counts[SEARCHES]
    tied, done, begin, rest, spent = top < 0, 0, 0, 0.0, 0.0
    spare, few = np.float64(costs.m - n), FEW_PATHS if square else FEWER_PATHS
    shuffle(stack, top)
    sort_by(
        stack, few, top, state.least
    )  # the first ones, which the estimate comes from, remain a random sample
    while done < top:
        found, tied = path(costs, state, stack[done], search, tied)
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
    return 0, free_rows(state), 2.0 * rest
