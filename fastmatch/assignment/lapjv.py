"""The reference method: the lapjv package (Jonker-Volgenant), on the host."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["linear_sum_assignment"]


def linear_sum_assignment(
    cost: np.ndarray | torch.Tensor, maximize: bool = False
) -> tuple[np.ndarray | torch.Tensor, np.ndarray | torch.Tensor]:
    """The assignment of rows to columns with the least (or largest) sum of a square matrix.

    Args:
        cost: (n, n), float32 or float64 solved as they come, other dtypes in float32; numpy or torch.
        maximize: look for the largest sum.

    Returns:
        (row_ind, col_ind): int64, ``row_ind`` = 0..n-1, of the kind and on the device of ``cost``.

    Raises:
        ValueError: not a square matrix, or it holds NaN or infinity.
    """
    import lapjv

    host = cost.detach().cpu() if isinstance(cost, torch.Tensor) else torch.as_tensor(np.asarray(cost))
    if host.ndim != 2 or host.shape[0] != host.shape[1]:
        raise ValueError(f"cost: expected a square matrix, got shape {tuple(host.shape)}")
    double = host.dtype in (torch.float64, torch.int64, torch.int32)
    matrix = host.to(torch.float64 if double else torch.float32).numpy()
    if not np.isfinite(matrix).all():
        raise ValueError("cost: holds NaN or infinite values")
    rows = np.arange(matrix.shape[0], dtype=np.int64)
    cols = rows.copy()
    if len(rows) > 1:
        matrix = np.negative(matrix) if maximize else matrix
        cols = lapjv.lapjv(np.ascontiguousarray(matrix), force_doubles=double)[0].astype(np.int64)
    if isinstance(cost, torch.Tensor):
        return torch.from_numpy(rows).to(cost.device), torch.from_numpy(cols).to(cost.device)
    return rows, cols
