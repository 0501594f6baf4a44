"""What a solver gets and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from fastmatch.assignment.cost import Cost
from fastmatch.assignment.dense_cost import DenseCost
from fastmatch.assignment.device_cost import DeviceCost
from fastmatch.assignment.factor_cost import FactorCost

__all__ = ["Infeasible", "LapProblem", "LapSolution", "Solver", "TooLarge", "check_entries"]

BATCH_ENTRIES = 1 << 22
"""Entries that are checked at once."""


class Infeasible(ValueError):
    """Forbidden entries leave no assignment."""


class TooLarge(ValueError):
    """Sums of entries leave float64. :func:`fastmatch.assignment.solve` then solves a problem that is scaled down."""


@dataclass(frozen=True, eq=False)
class LapProblem:
    """The minimisation of ``sign * cost`` over n rows and m >= n columns.

    Attributes:
        cost: (n, m); +inf in ``sign * cost`` forbids an entry.
        sign: 1, or -1 for a maximisation.
        start: (m,) column duals to start from, or None. Solvers use them only if n = m and they are finite.
    """

    cost: Cost
    sign: float
    start: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.cost.shape

    @property
    def finite_start(self) -> np.ndarray | None:
        """A float64 copy of ``start`` if the solver may use it, else None."""
        usable = self.shape[0] == self.shape[1] and self.start is not None and np.isfinite(self.start).all()
        return np.array(self.start, np.float64) if usable else None

    def entries(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return the costs of pairs in float64, without another product if the matrix of a factor cost was computed."""
        if "_of_factors" in self.__dict__:
            return self._of_factors[rows, columns]
        return self.cost.entries(rows, columns)

    @cached_property
    def _of_factors(self) -> np.ndarray:
        assert isinstance(self.cost, FactorCost)
        return self.cost.dense()

    def matrix(self, solver: object) -> np.ndarray:
        """Return the cost as a matrix on the host, rows contiguous, float32 or float64; that of a factor cost is computed once.

        Args:
            solver: who asks; an error names it.

        Raises:
            ValueError: the cost is neither a matrix nor given by factors.
        """
        cost, name = self.cost, type(solver).__name__
        if isinstance(cost, FactorCost):
            return self._of_factors
        if isinstance(cost, DeviceCost):
            cost = DenseCost(cost.matrix)
        if not isinstance(cost, DenseCost):
            raise ValueError(f"cost: {name} takes a matrix, not a {type(cost).__name__}")
        return np.ascontiguousarray(cost.matrix)


class LapSolution(NamedTuple):
    """The solution of a :class:`LapProblem`."""

    col_of: np.ndarray
    """(n,) int64: each row's column."""
    u: np.ndarray
    """(n,) float64: row duals."""
    v: np.ndarray
    """(m,) float64: column duals; those of unmatched columns are the largest."""
    counts: np.ndarray | None = None
    """(4,) int64: rows read again, bids, columns popped, path searches; None if the solver does not count."""


@runtime_checkable
class Solver(Protocol):
    """A solver is a frozen dataclass that holds its options. Any object with this method is one."""

    def solve(self, problem: LapProblem) -> LapSolution | None:
        """Solve the problem exactly, or return None to let `solve` choose another solver.

        None is for matrices, and for factor costs that :class:`CandidateLists` or :class:`SmallDense` gives up:
        :class:`DenseShortlists` then solves them. For other costs it is an error.

        Raises:
            ValueError: the solver does not take this kind of cost, NaN, or an infinity of the wrong sign.
            Infeasible: forbidden entries leave no assignment.
        """
        ...


def check_entries(matrix: np.ndarray, sign: float) -> None:
    """Raise ValueError for NaN and for infinities of the wrong sign."""
    step = max(1, BATCH_ENTRIES // max(matrix.shape[1], 1))
    wrong, right = ("+", "-") if sign < 0 else ("-", "+")
    for lo in range(0, matrix.shape[0], step):
        block = matrix[lo : lo + step]
        if np.isnan(block).any():
            raise ValueError("cost: holds NaN")
        if (np.isposinf(block) if sign < 0 else np.isneginf(block)).any():
            raise ValueError(f"cost: holds {wrong}inf; only {right}inf may forbid an entry")
