"""Proof of optimality, recomputed from scratch: plain numpy, nothing shared with the solver."""

from __future__ import annotations

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
        cost: (n, m) matrix, numpy or torch.
        assignment: an :class:`fastmatch.assignment.Assignment`; only its indices and duals are used.
        maximize: as it was solved.

    Returns:
        ``gap``: the certified distance. ``gap_bound``: what rounding in this computation may amount to; the
        assignment is optimal for the matrix as stored if ``gap <= gap_bound``.

    Raises:
        ValueError: the indices are no complete matching.
    """
    matrix = cost.detach().cpu() if hasattr(cost, "detach") else np.asarray(cost)
    if not isinstance(matrix, np.ndarray):
        matrix = matrix.double().numpy() if "bfloat16" in str(matrix.dtype) else matrix.numpy()
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
    return gap, float(4 * eps * (size.sum() + 1e-300) + 4 * eps * n * (np.abs(v).max(initial=0.0)))
