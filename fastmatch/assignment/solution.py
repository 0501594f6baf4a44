"""What a solve returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["Assignment"]


@dataclass(frozen=True, eq=False)
class Assignment:
    """A solution of a linear assignment problem with the proof of its quality.

    For a minimisation over an (n, m) cost, the duals satisfy ``u_i + v_j <= c_ij``; on the longer side they are at most
    zero, and zero for unmatched rows or columns. So ``sum(u) + sum(v)`` bounds every assignment from below. For a maximisation
    all signs are reversed: ``u_i + v_j >= c_ij``.

    Example:
        >>> found = fm.solve(np.array([[1.0, 2.0], [2.0, 4.0]]))
        >>> found.col_ind.tolist(), found.objective, found.is_certified
        ([1, 0], 4.0, True)

    Attributes:
        row_ind: (min(n, m),) int64, rows of the matched pairs, ascending.
        col_ind: (min(n, m),) int64, their columns.
        u: (n,) float64, row duals.
        v: (m,) float64, column duals.
        objective: sum of the matched costs, in float64.
        gap: objective minus the dual bound: the certified distance from the optimum, at least 0 up to rounding.
        gap_bound: a bound on what rounding alone can do to ``gap``.
        stats: ``"solver"``, the solver's name, and counts of its work: ``"reads"`` (rows read again), ``"bids"``,
            ``"pops"`` (columns popped) and ``"searches"`` (shortest paths).
    """

    row_ind: np.ndarray
    col_ind: np.ndarray
    u: np.ndarray
    v: np.ndarray
    objective: float
    gap: float
    gap_bound: float
    stats: dict[str, int | float | str] = field(default_factory=dict)

    @property
    def is_certified(self) -> bool:
        """Whether ``|gap| <= gap_bound``: the assignment is optimal for exactly the entries as stored.

        A gap further below 0 would say that the duals are none, so it proves nothing.
        """
        return bool(abs(self.gap) <= self.gap_bound)

    @property
    def dual_objective(self) -> float:
        """``sum(u) + sum(v)``: no assignment has a smaller (for a maximisation: larger) total."""
        return float(self.u.sum() + self.v.sum())

    def __repr__(self) -> str:
        relation, verdict = ("<=", "certified") if self.is_certified else (">", "not certified")
        solver = f", by {self.stats['solver']}" if "solver" in self.stats else ""
        return (
            f"Assignment({len(self.row_ind)} pairs of {len(self.u)} x {len(self.v)}, objective={self.objective:.9g}, "
            f"gap={self.gap:.2g} {relation} {self.gap_bound:.2g}, {verdict}{solver})"
        )
