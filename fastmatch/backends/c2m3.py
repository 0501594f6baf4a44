"""C2M3's ``solve_linear_assignment_problem`` (Crisostomi et al. 2024)."""

from __future__ import annotations

import numpy as np
import torch

from fastmatch.assignment import solve

__all__ = ["solve_linear_assignment_problem"]


def solve_linear_assignment_problem(
    sim_matrix: torch.Tensor | np.ndarray, return_matrix: bool = False
) -> torch.Tensor:
    """Return the permutation that maximizes the summed similarity of matched rows and columns.

    Args:
        sim_matrix: (n, n) similarities.
        return_matrix: return a permutation matrix instead of indices.

    Returns:
        The column of each row as an int64 tensor (n,), or a float32 matrix (n, n) with a one at (i, column of row i).
        Both are on the CPU, as in C2M3.
    """
    columns = torch.from_numpy(solve(sim_matrix, maximize=True).col_ind)
    if return_matrix:
        return torch.nn.functional.one_hot(columns, len(columns)).float()
    return columns
