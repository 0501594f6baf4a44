"""lap.lapjv, of the packages lap and lapx."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from fastmatch.assignment import solve
from fastmatch.backends.patch_target import REFUSED, Seam, is_small

__all__ = ["SEAMS", "replacement"]


def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    """lap's contract: (cost, x, y), or (x, y) without ``return_cost``; int32, -1 where unmatched.

    x holds the column of each row, y the row of each column. The original answers for fewer than 200 rows
    or columns, a finite ``cost_limit``, rectangles without ``extend_cost`` (its error), and whatever
    ours refuses.
    """

    @functools.wraps(original)
    def lapjv(
        cost: Any, extend_cost: bool = False, cost_limit: float = np.inf, return_cost: bool = True
    ) -> Any:
        def ask_original() -> Any:
            return original(cost, extend_cost=extend_cost, cost_limit=cost_limit, return_cost=return_cost)

        if not isinstance(cost, np.ndarray) or cost.ndim != 2 or is_small(cost) or cost_limit != np.inf:
            return ask_original()
        n, m = cost.shape
        if n != m and not extend_cost:
            return ask_original()
        try:
            found = solve(cost)
        except REFUSED:
            return ask_original()
        x, y = np.full(n, -1, np.int32), np.full(m, -1, np.int32)
        x[found.row_ind], y[found.col_ind] = found.col_ind, found.row_ind
        return (found.objective, x, y) if return_cost else (x, y)

    return lapjv


SEAMS = (Seam("lap", "lap", "lapjv", replacement),)
