"""What a solve has found, put aside: an auction or other duals that do not pay are undone."""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels.lap.best import forget
from fastmatch_kernels.lap.state import KEPT

__all__ = ["keep", "room_to_keep", "take"]


@njit(nogil=True, cache=True, inner=True, borrows=True)
def room_to_keep(state):  # pragma: no cover - compiled
    """Return how many numbers :func:`keep` writes."""
    return KEPT * state.row_of.shape[0] + state.v.shape[0]


@njit(nogil=True, cache=True, borrows=True)
def keep(room, at, state):  # pragma: no cover - compiled
    """Write duals, a matching and what is known of the rows to ``room[at:]``. Numbers of rows and columns are exact."""
    v, row_of, col_of, least, seconds, columns, _, _, _ = state
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


@njit(nogil=True, cache=True, borrows=True)
def take(room, at, state):  # pragma: no cover - compiled
    """Read what :func:`keep` wrote. Duals may rise, so that the best columns of rows are forgotten."""
    forget(state.best)
    v, row_of, col_of, least, seconds, columns, _, _, _ = state
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
