"""Proof of optimality, recomputed from scratch in plain numpy, without the solvers' code."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastmatch.assignment.cost import Cost
from fastmatch.assignment.dense_cost import DenseCost
from fastmatch.assignment.device_cost import DeviceCost
from fastmatch.assignment.factor_cost import FactorCost
from fastmatch.assignment.gap import duality_gap
from fastmatch.assignment.integers import as_minimisation, integer_gap, wide_integers
from fastmatch.assignment.reading import EXACT, as_array, as_real
from fastmatch.assignment.solution import Assignment

__all__ = ["certificate"]

BATCH_ENTRIES = 1 << 22
"""Entries that are read at once."""


def certificate(
    cost: np.ndarray | torch.Tensor | Cost, assignment: Assignment, *, maximize: bool = False
) -> tuple[float, float]:
    """Return (gap, gap_bound) of an assignment, recomputed in float64 from its pairs and its duals.

    Only the duals of the longer side are used, say ``v`` of the columns. The row duals ``u_i = min_j c_ij - v_j`` make them
    feasible whatever they are, so ``sum(u) + sum(v)`` bounds every assignment from below, and
    ``gap = sum_i c_i,p(i) - sum(u) - sum(v)`` is at least the distance from the optimum. (Duals of unmatched columns are
    compared with the largest one. A maximisation is the minimisation of the negated cost.)

    Example:
        >>> cost = np.random.rand(50, 50)
        >>> gap, gap_bound = fm.assignment.certificate(cost, fm.solve(cost))
        >>> gap <= gap_bound
        True

    Args:
        cost: (n, m) matrix, numpy or torch, or a cost object. A factor cost's rows are computed again by the obvious
            expressions; a cost of your own is asked for its entries and row minima.
        assignment: its indices and duals are used, nothing else.
        maximize: the sense in which it was solved.

    Returns:
        gap: a bound on the distance from the optimum.
        gap_bound: what rounding in this computation can amount to. The assignment is optimal for exactly the entries as
            stored if ``gap <= gap_bound``. For integers beyond 2^32, which are added in integers, 0 unless they are spread
            over more than 2^53, where float64 cannot hold their duals.

    Raises:
        ValueError: the indices are not a complete matching.

    Cost: one read of the cost.
    """
    sign = -1.0 if maximize else 1.0
    if not isinstance(cost, (np.ndarray, torch.Tensor, Cost)):
        cost = as_array(cost)
    integers = wide_integers(cost, maximize)
    if integers is not None:
        turned = as_minimisation(assignment, integers)
        _check_matching(turned.row_ind, turned.col_ind, integers.distance.shape)
        # float64 rounds the duals of integers that are spread over more than 2^53.
        largest = max(float(integers.distance.max(initial=0)), float(np.abs(turned.v).max(initial=0.0)))
        rounding = 2.0 * len(turned.col_ind) * float(np.spacing(largest)) if largest > EXACT else 0.0
        return float(integer_gap(integers.distance, turned.col_ind, turned.v)[0]), rounding
    rows, cols, v = np.asarray(assignment.row_ind), np.asarray(assignment.col_ind), assignment.v
    matrix = _rows_of(cost)
    if matrix.shape[0] > matrix.shape[1]:
        matrix, v = matrix.T, assignment.u
        order = np.argsort(cols)
        rows, cols = cols[order], rows[order]
    n, m = matrix.shape
    v = sign * np.asarray(v, np.float64)
    _check_matching(rows, cols, (n, m))
    if isinstance(matrix, (np.ndarray, _Products)):
        matched, u = np.empty(n), np.empty(n)
        step = max(1, BATCH_ENTRIES // max(m, 1))
        for lo in range(0, n, step):
            block = sign * matrix[lo : lo + step].astype(np.float64)
            part = np.arange(lo, min(lo + step, n))
            matched[part] = block[part - lo, cols[part]]
            u[part] = (block - v).min(axis=1)
        rounding = matrix.rounding() if isinstance(matrix, _Products) else 0.0
    else:
        matched, u = sign * matrix.entries(np.arange(n), cols), matrix.row_min(v, sign)
        rounding = 3 * float(matrix.entry_error().sum())
    gap, gap_bound = duality_gap(matched, u, v, cols)
    return gap, gap_bound + rounding


def _check_matching(rows: np.ndarray, cols: np.ndarray, shape: tuple[int, int]) -> None:
    n, m = shape
    complete = np.array_equal(rows, np.arange(n)) and len(np.unique(cols)) == n
    if not complete or (n and not (cols.min() >= 0 and cols.max() < m)):
        raise ValueError("assignment: its indices are not a complete matching of the shorter side")


def _rows_of(cost: Any) -> np.ndarray | _Products | Cost:
    """Return something whose rows can be read in float64."""
    if isinstance(cost, FactorCost):
        return _Products(cost.pairs, cost.metric)
    if isinstance(cost, (DenseCost, DeviceCost)):
        cost = cost.matrix
    if not isinstance(cost, (np.ndarray, torch.Tensor)) and isinstance(cost, Cost):
        return cost
    return as_real(cost)


class _Products:
    """Rows of a factor cost in float64, by the obvious expressions, and a bound on their rounding."""

    def __init__(self, pairs: Any, metric: str) -> None:
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
        """Return a bound on the sum over rows of an entry's rounding: ``gamma_d`` times the size of its terms."""
        total, depth = 0.0, 8
        for a, b in self.pairs:
            order = 1 if self.metric == "l1" else 2
            left, right = (np.linalg.norm(x.astype(np.float64), order, axis=1) for x in (a, b))
            top = right.max(initial=0.0)
            terms = {"dot": left * top, "l2": (left + top) ** 2, "l1": left + top}[self.metric]
            total += float(terms.sum())
            depth += a.shape[1]
        return 2 * depth * np.finfo(np.float64).eps * total


def _host(x: Any) -> np.ndarray:
    """Return a factor as a numpy array; half precision, which numpy lacks in part, is widened."""
    if not hasattr(x, "detach"):
        return np.asarray(x)
    x = x.detach().cpu()
    return (x if x.element_size() > 2 else x.float()).numpy()
