"""Permute and merge in plain torch: ``out = sum_k alpha_k W_k``, each W_k with up to two of its axes reordered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MergeArguments", "expand_blocks", "permute_merge", "work_dtype"]


class MergeArguments(NamedTuple):
    """Checked arguments of :func:`fastmatch_kernels.ops.permute_merge`, whose backends write ``out``."""

    weights: Sequence[Tensor]  # of one shape and dtype
    alphas: Sequence[float]  # per weight
    first: Sequence[Tensor | None]  # per weight, int64 over the blocks of axis dims[0]
    second: Sequence[Tensor | None]  # per weight, the same for dims[1]
    dims: Sequence[int]  # two, rising
    blocks: Sequence[int]  # neighbouring elements that move together along each
    out: Tensor  # like a weight; may be one that has no index


def expand_blocks(index: Tensor, block: int) -> Tensor:
    """Return the element index of an index over blocks of ``block`` neighbouring elements."""
    if block == 1:
        return index
    return (index[:, None] * block + torch.arange(block, device=index.device)).flatten()


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def permute_merge(arguments: MergeArguments) -> None:
    """Copy each weight once for every axis that moves."""
    weights, alphas, first, second, dims, blocks, out = arguments
    work = work_dtype(out.dtype)
    total = torch.zeros(out.shape, dtype=work, device=out.device)
    for weight, alpha, *indices in zip(weights, alphas, first, second, strict=True):
        for dim, block, index in zip(dims, blocks, indices, strict=True):
            if index is not None:
                weight = weight.index_select(dim, expand_blocks(index, block))
        total.add_(weight.to(work), alpha=alpha)
    out.copy_(total)
