"""Permute and merge: ``out = sum_k alpha_k W_k``, each W_k with up to two of its axes reordered; plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["expand_blocks", "permute_merge", "work_dtype"]


def expand_blocks(index: torch.Tensor, block: int) -> torch.Tensor:
    """The element index of an index over blocks of ``block`` neighbouring elements."""
    if block == 1:
        return index
    return (index[:, None] * block + torch.arange(block, device=index.device)).flatten()


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums run in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def permute_merge(
    weights: Sequence[torch.Tensor],
    alphas: Sequence[float],
    first: Sequence[torch.Tensor | None],
    second: Sequence[torch.Tensor | None],
    dims: Sequence[int],
    blocks: Sequence[int],
    out: torch.Tensor,
) -> None:
    """Writes ``sum_k alphas[k] * weights[k][first[k] on dims[0], second[k] on dims[1]]`` to ``out``.

    Args:
        weights: tensors of one shape and dtype.
        alphas: one a weight.
        first, second: per weight the index of an axis over its blocks, or None.
        dims: the two axes, in rising order.
        blocks: neighbouring elements that move together on each.
        out: like a weight; may be a weight that has no index.
    """
    work = work_dtype(out.dtype)
    total = torch.zeros(out.shape, dtype=work, device=out.device)
    for weight, alpha, *indices in zip(weights, alphas, first, second, strict=True):
        for dim, block, index in zip(dims, blocks, indices, strict=True):
            if index is not None:
                weight = weight.index_select(dim, expand_blocks(index, block))
        total.add_(weight.to(work), alpha=alpha)
    out.copy_(total)
