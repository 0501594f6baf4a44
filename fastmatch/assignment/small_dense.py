"""The solver for small matrices: whole rows, which stay in a core's cache, are quicker to read than lists are to keep."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fastmatch._internal.checks import check_type
from fastmatch.assignment._compile import prepared
from fastmatch.assignment.problem import Infeasible, LapProblem, LapSolution, check_entries
from fastmatch.assignment.reading import for_kernels
from fastmatch.assignment.schedule import check_fields
from fastmatch_kernels.lap.state import SmallSchedule

__all__ = ["SmallDense"]


@dataclass(frozen=True)
class SmallDense:
    """Solve a matrix over whole rows on one core: the choice up to 2^20 entries, where rows stay in the core's cache.

    +inf (-inf for a maximisation) forbids an entry.

    Example:
        >>> fm.solve(np.random.rand(50, 50), solver=fm.assignment.SmallDense()).is_certified
        True

    Args:
        schedule: when its phases run, a :class:`SmallSchedule`. Its numbers are checked here.
    """

    schedule: SmallSchedule = field(default_factory=SmallSchedule)

    def __post_init__(self) -> None:
        check_type("schedule", self.schedule, SmallSchedule)
        check_fields("schedule", self.schedule._asdict(), SmallSchedule._field_defaults)

    def solve(self, problem: LapProblem) -> LapSolution:
        """Solve the problem: see :meth:`Solver.solve`."""
        from fastmatch_kernels.lap.small import INFEASIBLE, SOLVED, row_minima, solve_stack

        matrix = for_kernels(problem.matrix(self))

        def run(
            costs: np.ndarray, duals: np.ndarray | None
        ) -> tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
            n, m = costs.shape
            out, bad, v, u = np.zeros((1, n), np.int64), np.zeros(1, np.int8), np.zeros((1, m)), np.empty(n)
            if duals is not None:
                v[0] = duals
            counts = np.zeros(4, np.int64)
            solve_stack(costs[None], problem.sign, tuple(self.schedule), 0, 1, out, bad, v, counts)
            row_minima(costs, problem.sign, v[0], u)
            return int(bad[0]), out[0], u, v[0], counts

        prepared(
            f"the kernels for small matrices of {matrix.dtype}",
            ("small", matrix.dtype.char),
            lambda: run(np.ones((2, 2), matrix.dtype), None),
        )
        state, col_of, u, v, counts = run(matrix, problem.finite_start)
        if state == INFEASIBLE:
            raise Infeasible("cost: no assignment avoids the forbidden entries")
        if state != SOLVED:
            check_entries(matrix, problem.sign)
        return LapSolution(col_of, u, v, counts)
