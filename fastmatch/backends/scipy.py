"""scipy.optimize.linear_sum_assignment."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from fastmatch.assignment import linear_sum_assignment as solve
from fastmatch.backends.patch_target import REFUSED, Seam, is_small

__all__ = ["SEAMS", "replacement"]


def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    """scipy's contract: (row_ind, col_ind), rows ascending, a minimum unless ``maximize``.

    The original answers for fewer than 200 rows or columns, and for whatever ours refuses: sparse
    and object arrays, complex numbers, NaN, problems without a solution. So its errors stay what they were.
    """

    @functools.wraps(original)
    def linear_sum_assignment(cost_matrix: Any, maximize: bool = False) -> tuple[np.ndarray, np.ndarray]:
        cost = np.asarray(cost_matrix)
        if is_small(cost):
            return original(cost_matrix, maximize)
        try:
            return solve(cost, maximize=bool(maximize))
        except REFUSED:
            return original(cost_matrix, maximize)

    return linear_sum_assignment


SEAMS = (Seam("scipy", "scipy.optimize", "linear_sum_assignment", replacement),)
