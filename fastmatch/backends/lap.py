"""lap.lapjv, published by the packages lap and lapx."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from fastmatch.assignment import solve
from fastmatch.backends.patch_target import UNSUPPORTED, PatchTarget, is_small

__all__ = ["TARGETS", "replacement"]


def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with lap's contract: (cost, x, y), or (x, y) without ``return_cost``.

    x holds the column of each row and y the row of each column, int32, -1 where unmatched. The original keeps problems
    with fewer than 200 rows or columns, a finite ``cost_limit``, rectangles without ``extend_cost`` (it raises an
    error), and every input that our solver does not support.
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
        except UNSUPPORTED:
            return ask_original()
        x, y = np.full(n, -1, np.int32), np.full(m, -1, np.int32)
        x[found.row_ind], y[found.col_ind] = found.col_ind, found.row_ind
        return (found.objective, x, y) if return_cost else (x, y)

    return lapjv


TARGETS = (PatchTarget("lap", "lap", "lapjv", replacement),)
