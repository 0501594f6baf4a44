"""Inner products of a tensor with a reordered one, in float64: ``inner`` and ``change_of_inner``.

A reordering maps dimensions to int64 positions, ``{dim: index}``: ``b.index_select(dim, index)`` along each.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from fastmatch_kernels.inner_product import reference

__all__ = ["change_of_inner", "inner", "moved_positions"]

COMPILED = (torch.float32, torch.float64)
"""Dtypes that the CPU kernel reads; others go through the reference."""

Indices = Mapping[int, Tensor]
"""Dimension -> int64 positions to select."""


def inner(a: Tensor, b: Tensor, indices: Indices) -> float:
    """Return ``<a, b reordered by indices>``, summed in float64, without a reordered copy of ``b`` on CPU.

    Example:
        >>> from fastmatch_kernels.inner_product import inner
        >>> a, b = torch.randn(3, 4), torch.randn(3, 4)
        >>> rows = torch.tensor([2, 0, 1])
        >>> abs(inner(a, b, {0: rows}) - float((a.double() * b[rows].double()).sum())) < 1e-12
        True

    Args:
        a: floating point tensor.
        b: of a's shape; devices and dtypes may differ.
        indices: dimension -> int64 positions of ``b``.
    """
    if _has_kernel(a, b, indices):
        from fastmatch_kernels.inner_product import cpu

        return cpu.inner(a, b, {}, indices, None)
    return reference.inner(a, b, indices)


def change_of_inner(a: Tensor, b: Tensor, now: Indices, then: Indices) -> float:
    """Return ``inner(a, b, now) - inner(a, b, then)`` from the positions that differ alone.

    The error is float64's rounding of the difference, not of the two inner products.

    Example:
        >>> from fastmatch_kernels.inner_product import change_of_inner
        >>> a, b = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([3.0, 7.0, 5.0])
        >>> change_of_inner(a, b, {0: torch.tensor([1, 0, 2])}, {})
        -4.0

    Args:
        a: floating point tensor.
        b: of a's shape; devices and dtypes may differ.
        now: dimension -> int64 positions of ``b``.
        then: the same for the second inner product.
    """
    moved = moved_positions(now, then, a.shape)
    if not moved:
        return 0.0
    if len(moved) > 1:  # positions that differ along two dimensions are more than a few rows
        return inner(a, b, now) - inner(a, b, then)
    if _has_kernel(a, b, now.keys() | then.keys()):
        from fastmatch_kernels.inner_product import cpu

        return cpu.inner(a, b, moved, now, then)
    return reference.change_of_inner(a, b, moved, now, then)


def moved_positions(now: Indices, then: Indices, shape: Sequence[int]) -> dict[int, Tensor]:
    """Return, per dimension, the positions at which two reorderings differ; dimensions where they agree are omitted."""
    moved: dict[int, Tensor] = {}
    for dim in now.keys() | then.keys():
        after, before = now.get(dim), then.get(dim)
        if after is before:
            continue
        every = torch.arange(shape[dim]) if after is None or before is None else after
        positions = torch.nonzero(
            (every if after is None else after) != (every if before is None else before)
        )
        if len(positions):
            moved[dim] = positions.flatten()
    return moved


def _has_kernel(a: Tensor, b: Tensor, dims: Collection[int]) -> bool:
    is_compiled = a.dtype in COMPILED and b.dtype in COMPILED
    return is_compiled and a.device.type == b.device.type == "cpu" and len(dims) <= 2
