"""PLeaS' assignment solver (Nasery et al. 2024), for its arguments ``lsa_solver=``."""

from __future__ import annotations

import torch

from fastmatch.assignment import solve

__all__ = ["lsa_solver"]


def lsa_solver(A: torch.Tensor, maximize: bool = True) -> torch.Tensor:
    """The column of each row, int64 on the CPU: ``weight_matching(..., lsa_solver=pleas.lsa_solver)``."""
    return torch.from_numpy(solve(A, maximize=maximize).col_ind)
