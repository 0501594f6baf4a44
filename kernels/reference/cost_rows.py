"""The k smallest of ``c_ij - v_j`` per row and the next one as bound: the whole matrix in float64, sorted."""

from __future__ import annotations

import torch

__all__ = ["cost", "row_min", "row_topk"]


def cost(factors: list[tuple[torch.Tensor, torch.Tensor]], metric: str = "dot") -> torch.Tensor:
    """(n, m) float64: ``sum_k A_k B_k^T``, or the sum of squared L2 or of L1 distances between rows."""
    total = torch.zeros(len(factors[0][0]), len(factors[0][1]), dtype=torch.float64)
    for a, b in factors:
        a, b = a.double(), b.double()
        if metric == "dot":
            total += a @ b.T
        elif metric == "l2":
            total += (a[:, None] - b[None]).square().sum(-1)
        else:
            total += (a[:, None] - b[None]).abs().sum(-1)
    return total


def row_topk(c: torch.Tensor, v: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(indices (n, k) int64, costs (n, k), bound (n,)) of the stored cost ``c``, by rising ``c - v``."""
    n, m = c.shape
    values, index = (c.double() - v.double()).sort(dim=1, stable=True)
    k = min(k, m)
    bound = values[:, k] if k < m else torch.full((n,), torch.inf, dtype=torch.float64)
    return index[:, :k], c.double().gather(1, index[:, :k]), bound


def row_min(c: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """(n,) least ``c_ij - v_j`` of each row."""
    return (c.double() - v.double()).amin(1)
