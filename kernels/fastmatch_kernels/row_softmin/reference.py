"""Soft minima of the rows of ``c - v`` in plain torch: whole rows in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmatch_kernels._factors import result_dtype
from fastmatch_kernels.row_topk.reference import value_rows

__all__ = ["SoftminArguments", "row_softmin", "soft_minimum"]


class SoftminArguments(NamedTuple):
    """Checked arguments of :func:`fastmatch_kernels.ops.row_softmin`."""

    a: Sequence[Tensor]  # per pair (n, d), all of one dtype
    b: Sequence[Tensor]  # per pair (m, d)
    v: Tensor  # (m,)
    temperature: float  # in the unit of the costs
    precision: str


def soft_minimum(values: Tensor, temperature: float) -> Tensor:
    """Return ``-t log sum_j exp(-x_ij / t)`` over the last axis; +inf for an empty or an infinite row.

    The minimum is subtracted first, so that nothing overflows.
    """
    if values.shape[-1] == 0:
        return values.new_full(values.shape[:-1], torch.inf)
    least = values.amin(-1, keepdim=True)
    least = torch.where(least.isfinite(), least, 0)
    return least[..., 0] - temperature * ((least - values) / temperature).exp().sum(-1).log()


def row_softmin(arguments: SoftminArguments) -> Tensor:
    """Form whole rows of float64."""
    a, b, v, temperature, _ = arguments
    dtype = result_dtype(a[0])
    out = torch.full((len(a[0]),), torch.inf, dtype=dtype, device=v.device)
    for rows, values in value_rows(list(zip(a, b, strict=True)), v):
        out[rows] = soft_minimum(values, temperature).to(dtype)
    return out
