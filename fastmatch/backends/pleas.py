"""PLeaS' assignment solver (Nasery et al. 2024)."""

from __future__ import annotations

import torch

from fastmatch.assignment import solve

__all__ = ["lsa_solver"]


def lsa_solver(A: torch.Tensor, maximize: bool = True) -> torch.Tensor:
    """Return the column of each row as an int64 tensor (n,) on the CPU.

    Pass this function as PLeaS' ``lsa_solver`` argument: ``weight_matching(..., lsa_solver=pleas.lsa_solver)``.
    """
    return torch.from_numpy(solve(A, maximize=maximize).col_ind)
