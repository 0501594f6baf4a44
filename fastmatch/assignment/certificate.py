"""Proof of optimality, recomputed from scratch: plain numpy, nothing shared with the solver."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["certificate"]

BLOCK_ENTRIES = 1 << 22


def certificate(cost, assignment, *, maximize: bool = False) -> tuple[float, float]:
    """(gap, gap_bound) of an assignment, from its pairs and column duals alone, in float64.

    With ``c = cost`` (negated under ``maximize``, transposed if it has more rows than columns) and column
    duals ``v <= 0`` up to a constant that unmatched columns share, ``u_i = min_j (c_ij - v_j)`` makes the
    duals feasible whatever ``v`` is, so ``sum(u) + sum(v)`` bounds every assignment from below and
    ``gap = sum_i c_i,p(i) - sum(u) - sum(v)`` is at least the distance from the optimum.

    Args:
        cost: (n, m) matrix, numpy or torch, or a factor cost.
        assignment: an :class:`fastmatch.assignment.Assignment`; only its indices and duals are used.
        maximize: as it was solved.

    Returns:
        ``gap``: the certified distance. ``gap_bound``: what rounding in this computation may amount to; the
        assignment is optimal for the matrix as stored if ``gap <= gap_bound``.

    Raises:
        ValueError: the indices are no complete matching.
    """
    matrix: Any
    if hasattr(cost, "pairs"):
        return _check(_Products(cost.pairs, cost.metric), assignment, maximize)
    cost = getattr(cost, "matrix", cost)
    matrix = cost.detach().cpu() if hasattr(cost, "detach") else np.asarray(cost)
    if not isinstance(matrix, np.ndarray):
        matrix = matrix.double().numpy() if "bfloat16" in str(matrix.dtype) else matrix.numpy()
    return _check(matrix, assignment, maximize)


class _Products:
    """Rows of a factor cost in float64, by the obvious expressions, and the rounding they may carry."""

    def __init__(self, pairs, metric: str) -> None:
        self.pairs = [(_host(a), _host(b)) for a, b in pairs]
        self.metric = metric
        self.shape = (len(self.pairs[0][0]), len(self.pairs[0][1]))

    @property
    def T(self) -> _Products:
        return _Products([(b, a) for a, b in self.pairs], self.metric)

    def __getitem__(self, rows: slice) -> np.ndarray:
        total = 0.0
        for a, b in self.pairs:
            a, b = a[rows].astype(np.float64), b.astype(np.float64)
            if self.metric == "dot":
                total = total + a @ b.T
            elif self.metric == "l2":
                total = total + (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * (a @ b.T)
            else:
                total = total + np.stack([np.abs(row - b).sum(1) for row in a])
        return np.asarray(total)

    def rounding(self) -> float:
        """A bound on the sum over rows of an entry's rounding, ``gamma_d`` times the size of its terms."""
        total, depth = 0.0, 8
        for a, b in self.pairs:
            order = 1 if self.metric == "l1" else 2
            left, right = (np.linalg.norm(x.astype(np.float64), order, axis=1) for x in (a, b))
            top = right.max(initial=0.0)
            terms = {"dot": left * top, "l2": (left + top) ** 2, "l1": left + top}[self.metric]
            total += float(terms.sum())
            depth += a.shape[1]
        return 2 * depth * np.finfo(np.float64).eps * total


def _host(x) -> np.ndarray:
    """A factor as numpy has it; half precision, which numpy partly lacks, widened."""
    if not hasattr(x, "detach"):
        return np.asarray(x)
    x = x.detach().cpu()
    return (x if x.element_size() > 2 else x.float()).numpy()


def _check(matrix, assignment, maximize: bool) -> tuple[float, float]:
    rows, cols, v = assignment.row_ind, assignment.col_ind, assignment.v
    if matrix.shape[0] > matrix.shape[1]:
        matrix, rows, cols, v = matrix.T, cols, rows, assignment.u
        order = np.argsort(rows)
        rows, cols = rows[order], cols[order]
    n, m = matrix.shape
    sign = -1.0 if maximize else 1.0
    v = sign * np.asarray(v, np.float64)
    whole = np.array_equal(np.asarray(rows), np.arange(n)) and len(np.unique(cols)) == n
    if not whole or (n and not (cols.min() >= 0 and cols.max() < m)):
        raise ValueError("assignment: its indices are no complete matching of the smaller side")
    slack = np.empty(n)
    size = np.empty(n)
    step = max(1, BLOCK_ENTRIES // max(m, 1))
    for lo in range(0, n, step):
        block = sign * matrix[lo : lo + step].astype(np.float64)
        part = np.arange(lo, min(lo + step, n))
        matched = block[part - lo, cols[part]]
        slack[part] = (matched - v[cols[part]]) - (block - v).min(axis=1)
        size[part] = np.abs(matched) + 2 * np.abs(v[cols[part]])
    gap = float(slack.sum())
    unmatched = np.ones(m, bool)
    unmatched[cols] = False
    if unmatched.any():
        # Duals of unmatched columns must be the largest; the constant they share is moved into u.
        top = float(v.max())
        gap += float((top - v[unmatched]).sum())
    eps = np.finfo(np.float64).eps
    bound = float(4 * eps * (size.sum() + 1e-300) + 4 * eps * n * (np.abs(v).max(initial=0.0)))
    return gap, bound + (matrix.rounding() if isinstance(matrix, _Products) else 0.0)
