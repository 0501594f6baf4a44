"""Soft minima of the rows of ``c - v``: whole rows in float64, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastmatch_kernels.row_topk.reference import value_rows

__all__ = ["row_softmin", "soft_minimum"]


def soft_minimum(values: torch.Tensor, temperature: float) -> torch.Tensor:
    """``-t log sum_j exp(-x_ij / t)`` over the last axis; +inf of an empty or an infinite row.

    The minimum is taken out first, so that nothing overflows.
    """
    if values.shape[-1] == 0:
        return values.new_full(values.shape[:-1], torch.inf)
    least = values.amin(-1, keepdim=True)
    least = torch.where(least.isfinite(), least, 0)
    return least[..., 0] - temperature * ((least - values) / temperature).exp().sum(-1).log()


def row_softmin(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]],
    v: torch.Tensor,
    temperature: float,
    *,
    precision: str = "ieee",
) -> torch.Tensor:
    """Per row ``-t log sum_j exp((v_j - c_ij) / t)``, ``c = -sum_k A_k B_k^T``; entries of NaN or +inf are left out.

    Args:
        factors: pairs (n, d), (m, d) of one dtype.
        v: (m,).
        temperature: t, above 0.
        precision: of the products; float64 is above them all.

    Returns:
        (n,) float32 (float64 for float64 factors).
    """
    dtype = torch.float64 if factors[0][0].dtype == torch.float64 else torch.float32
    out = torch.full((len(factors[0][0]),), torch.inf, dtype=dtype, device=v.device)
    for rows, values in value_rows(factors, v, None, None):
        out[rows] = soft_minimum(values, temperature).to(dtype)
    return out
