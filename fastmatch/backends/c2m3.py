"""C2M3's ``solve_linear_assignment_problem`` (Crisostomi et al. 2024)."""

from __future__ import annotations

import numpy as np
import torch

from fastmatch.assignment import solve

__all__ = ["solve_linear_assignment_problem"]


def solve_linear_assignment_problem(
    sim_matrix: torch.Tensor | np.ndarray, return_matrix: bool = False
) -> torch.Tensor:
    """The columns (n,) that maximise the similarity, or the permutation matrix whose row i is one at column i's.

    int64 indices, or a float32 matrix with ``return_matrix``, on the CPU, as there.
    """
    columns = torch.from_numpy(solve(sim_matrix, maximize=True).col_ind)
    if return_matrix:
        return torch.nn.functional.one_hot(columns, len(columns)).float()
    return columns
