"""The lapjv package (Jonker and Volgenant 1987) as a solver: the reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastmatch.assignment.dense_cost import DenseCost
from fastmatch.assignment.problem import LapProblem, LapSolution, check_entries

__all__ = ["LapJV"]


@dataclass(frozen=True)
class LapJV:
    """Solve with the package lapjv: square matrices without forbidden entries.

    Example:
        >>> fm.solve(np.random.rand(50, 50), solver=fm.assignment.LapJV()).stats["solver"]
        'LapJV'
    """

    def solve(self, problem: LapProblem) -> LapSolution:
        """Solve the problem: see :meth:`Solver.solve`. A warm start has no effect.

        Raises:
            ImportError: the package lapjv is not installed (the extra ``lapjv``).
        """
        try:
            import lapjv
        except ImportError as error:
            raise ImportError("LapJV needs the package lapjv: pip install 'fastmatch[lapjv]'") from error
        matrix = problem.matrix(self)
        n, m = matrix.shape
        if n != m:
            raise ValueError(f"cost: LapJV takes square matrices, got {n} x {m}")
        check_entries(matrix, problem.sign)
        if not np.isfinite(matrix).all():
            raise ValueError("cost: LapJV takes no forbidden entries")
        if n < 2:
            cols, v = np.zeros(n, np.int64), np.zeros(n)
        else:
            # In float32 it adds in float32, and may miss the optimum.
            given = (np.negative(matrix) if problem.sign < 0 else matrix).astype(np.float64, copy=False)
            reference = getattr(
                lapjv.lapjv, "__wrapped__", lapjv.lapjv
            )  # fastmatch.backends may have replaced it
            cols, _, (_, _, v) = reference(given, force_doubles=True)
            cols, v = cols.astype(np.int64), v.astype(np.float64)
        return LapSolution(cols, DenseCost(matrix).row_min(v, problem.sign), v)
