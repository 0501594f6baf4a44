"""Small matrices: whole rows, which stay in a core's cache, are quicker to read than lists are to keep."""

from __future__ import annotations

import numpy as np

from fastmatch.assignment._compile import prepared
from fastmatch.assignment.dense import Infeasible, check_entries

__all__ = ["SMALL", "solve_small"]

SMALL = 1 << 20
"""Entries up to which a matrix is solved by whole rows on one core; beyond, rows leave its cache, and lists win."""


def solve_small(
    matrix: np.ndarray, sign: float, start: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Solves the minimisation of ``sign * matrix``, n <= m; arguments and result as the dense solver's.

    Raises:
        ValueError: NaN, or an infinity that forbids nothing.
        Infeasible: forbidden entries leave no assignment.
    """
    from fastmatch_kernels.lap.stack import INFEASIBLE, SOLVED, row_minima, solve_stack

    def solve(
        costs: np.ndarray, duals: np.ndarray | None
    ) -> tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        n, m = costs.shape
        out, bad, v, u = np.zeros((1, n), np.int64), np.zeros(1, np.int8), np.zeros((1, m)), np.empty(n)
        if duals is not None and np.isfinite(duals).all():
            v[0] = duals
        counts = np.zeros(4, np.int64)
        solve_stack(costs[None], sign, 0, 1, out, bad, v, counts)
        row_minima(costs, sign, v[0], u)
        return int(bad[0]), out[0], u, v[0], counts

    prepared(
        f"the kernels for small matrices of {matrix.dtype}",
        ("small", matrix.dtype.char),
        lambda: solve(np.ones((2, 2), matrix.dtype), None),
    )
    state, col_of, u, v, counts = solve(matrix, start)
    if state == INFEASIBLE:
        raise Infeasible("cost: no assignment avoids the forbidden entries")
    if state != SOLVED:
        check_entries(matrix, sign < 0)
    return col_of, u, v, counts
