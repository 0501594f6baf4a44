"""What a solve returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["Assignment"]


@dataclass(frozen=True)
class Assignment:
    """A solution of a linear assignment problem with the proof of its quality.

    For a minimisation over an (n, m) cost, duals satisfy ``u_i + v_j <= c_ij`` (with the duals of unmatched
    columns or rows at zero, the others at most zero), so ``sum(u) + sum(v)`` bounds every assignment from below.
    For a maximisation the signs of cost and duals are turned: ``u_i + v_j >= c_ij``.

    Attributes:
        row_ind, col_ind: (min(n, m),) int64, matched pairs, rows ascending.
        u, v: (n,) and (m,) float64, duals of rows and columns.
        objective: sum of the matched costs, float64.
        gap: certified distance from the optimum, 0 at least up to rounding: the objective and the dual
            bound, compared.
        gap_bound: a bound on what rounding alone can do to ``gap``; the solution is optimal for the
            matrix as stored when ``gap <= gap_bound``.
        stats: counts of the work done (rows read again, bids, columns popped, searches) and ``"method"``.
    """

    row_ind: np.ndarray
    col_ind: np.ndarray
    u: np.ndarray
    v: np.ndarray
    objective: float
    gap: float
    gap_bound: float
    stats: dict[str, int | float | str] = field(default_factory=dict)
