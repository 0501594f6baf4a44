"""The distance of an assignment from the bound that its duals prove."""

from __future__ import annotations

import numpy as np

__all__ = ["duality_gap", "settled"]


def duality_gap(matched: np.ndarray, u: np.ndarray, v: np.ndarray, col_of: np.ndarray) -> tuple[float, float]:
    """Return (gap, gap_bound) of a minimisation with n <= m.

    The gap is ``sum_i c_i,p(i) - sum(u) - sum(v)``, summed by row. Duals of unmatched columns must be the largest; the
    constant that they share counts towards u.

    Args:
        matched: (n,) costs of the matched pairs.
        u: (n,) row duals, feasible with ``v``.
        v: (m,) column duals.
        col_of: (n,) each row's column.

    Returns:
        The gap and a bound on what rounding in float64 can do to it.
    """
    gap = float(((matched - v[col_of]) - u).sum())
    if len(v) > len(u):
        unmatched = np.ones(len(v), bool)
        unmatched[col_of] = False
        gap += float((v.max() - v[unmatched]).sum())
    eps = float(np.finfo(np.float64).eps)
    largest = float(np.abs(v).max(initial=0.0))
    size = float((np.abs(matched) + 2 * np.abs(v[col_of])).sum())
    return gap, 4 * eps * (size + len(u) * largest + 1e-300)


def settled(u: np.ndarray, v: np.ndarray, col_of: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the duals of a minimisation with n < m, moved so that unmatched columns have 0 and the others at most 0.

    That is what a certificate takes them for. A square problem moves all of them by a constant, and rounding may leave a
    matched column's above those of a thousand unmatched ones. Row duals stay feasible when column duals fall.

    Returns:
        The duals of rows and columns, and a bound on what rounding in moving them can do to the gap.
    """
    unmatched = np.ones(len(v), bool)
    unmatched[col_of] = False
    level = v[unmatched].min()
    rounding = 4 * float(np.finfo(np.float64).eps) * len(u) * abs(float(level))
    return u + level, np.minimum(v, level) - level, rounding
