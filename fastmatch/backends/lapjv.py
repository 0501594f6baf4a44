"""lapjv.lapjv, published by the package lapjv."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from fastmatch.assignment import solve
from fastmatch.backends.patch_target import UNSUPPORTED, PatchTarget, is_small

__all__ = ["TARGETS", "replacement"]


def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with lapjv's contract: (column of each row, row of each column, (cost, u, v)).

    The indices are int32. u and v are float32, or float64 with ``force_doubles`` and a matrix that is not float32, as in
    lapjv. lapjv solves float64 matrices in float32 unless ``force_doubles`` is set. We solve every matrix in its own
    type, so the objective can only be better. The original keeps problems with fewer than 200 rows, ``verbose``, shapes
    that are not square, and every input that our solver does not support.
    """

    @functools.wraps(original)
    def lapjv(cost_matrix: Any, verbose: bool = False, force_doubles: bool = False) -> Any:
        cost = np.asarray(cost_matrix)
        if verbose or cost.ndim != 2 or cost.shape[0] != cost.shape[1] or is_small(cost):
            return original(cost_matrix, verbose=verbose, force_doubles=force_doubles)
        try:
            found = solve(cost)
        except UNSUPPORTED:
            return original(cost_matrix, verbose=verbose, force_doubles=force_doubles)
        dtype = np.float64 if force_doubles and cost.dtype != np.float32 else np.float32
        rows = np.empty(len(found.col_ind), np.int32)
        rows[found.col_ind] = found.row_ind
        duals = found.u.astype(dtype), found.v.astype(dtype)
        return found.col_ind.astype(np.int32), rows, (found.objective, *duals)

    return lapjv


TARGETS = (PatchTarget("lapjv", "lapjv", "lapjv", replacement),)
