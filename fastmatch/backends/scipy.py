"""scipy.optimize.linear_sum_assignment."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from fastmatch.assignment import linear_sum_assignment as solve
from fastmatch.backends.patch_target import UNSUPPORTED, PatchTarget, is_small

__all__ = ["TARGETS", "replacement"]


def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with scipy's contract: (row_ind, col_ind), rows ascending, minimal unless ``maximize``.

    The original keeps problems with fewer than 200 rows or columns and every input that our solver does not support:
    sparse and object arrays, complex numbers, NaN, infeasible problems. Its error messages therefore stay the same.
    """

    @functools.wraps(original)
    def linear_sum_assignment(cost_matrix: Any, maximize: bool = False) -> tuple[np.ndarray, np.ndarray]:
        cost = np.asarray(cost_matrix)
        if is_small(cost):
            return original(cost_matrix, maximize)
        try:
            return solve(cost, maximize=bool(maximize))
        except UNSUPPORTED:
            return original(cost_matrix, maximize)

    return linear_sum_assignment


TARGETS = (PatchTarget("scipy", "scipy.optimize", "linear_sum_assignment", replacement),)
