"""Gains on a GPU: of one tensor's axis, as views that the kernel reads without copies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from fastmatch.spec import Axis

__all__ = ["FactorViews", "factor_views"]

MOST_VIEWS = 32
"""Views of one tensor up to which it is multiplied where it is."""


class FactorViews(NamedTuple):
    """Products that are part of a gain: the sum of ``a @ b[:, order].T``."""

    pairs: list[tuple[torch.Tensor, torch.Tensor]]
    """(units, d) of A and of B each, any strides."""
    order: torch.Tensor | None = None
    """(d,) int64 on the CPU."""


def factor_views(
    a: torch.Tensor, b: torch.Tensor, axis: Axis, size: int, order: Mapping[int, torch.Tensor]
) -> FactorViews | None:
    """Return products whose sum is the gain of an axis, or None if views cannot express it in a few.

    Of the positions beside the units, the longest run of dimensions with one stride is contracted. There is one product
    for each position of the other dimensions: 9 for the input channels of a 3 x 3 convolution.

    Args:
        a: the tensor of A.
        b: that of B, of the same shape.
        axis: where the units are; the group has ``size`` of them.
        size: number of units.
        order: dimension -> positions of B along it, for dimensions other than the axis's.
    """
    if axis.dim in order:  # other groups move the units' own dimension
        return None
    a, b = (_split(axis.slice_of(x), axis, size) for x in (a, b))
    # The axis has become three dimensions: repeats, units, positions in a unit.
    orders = {dim + 2 * (dim > axis.dim): index for dim, index in order.items()}
    unit = axis.dim + 1
    others = [d for d in range(a.ndim) if d != unit and a.shape[d] > 1]
    if not others:
        return FactorViews([(a.reshape(size, 1), b.reshape(size, 1))])
    run = max(_runs(a, b, others), key=lambda dims: math.prod(a.shape[d] for d in dims))
    singles = [d for d in others if d not in run]
    if math.prod(a.shape[d] for d in singles) > MOST_VIEWS:
        return None
    index = None
    if any(d in orders for d in run):
        index = torch.zeros(1, dtype=torch.long, device="cpu")
        for d in run:
            part = orders[d] if d in orders else torch.arange(a.shape[d], device="cpu")
            index = (index[:, None] * a.shape[d] + part).flatten()
    pairs = []
    for position in itertools.product(*(range(a.shape[d]) for d in singles)):
        at = dict(zip(singles, position, strict=True))
        there = {d: int(orders[d][i]) if d in orders else i for d, i in at.items()}
        pairs.append((_matrix(a, unit, run, at), _matrix(b, unit, run, there)))
    return FactorViews(pairs, index)


def _split(tensor: torch.Tensor, axis: Axis, size: int) -> torch.Tensor:
    """A view with the axis's dimension as (repeats, units, positions in a unit)."""
    step = tensor.stride(axis.dim)
    shape = (*tensor.shape[: axis.dim], axis.outer, size, axis.inner, *tensor.shape[axis.dim + 1 :])
    inside = (axis.stride * step, axis.inner * step, step)
    strides = (*tensor.stride()[: axis.dim], *inside, *tensor.stride()[axis.dim + 1 :])
    return tensor.as_strided(shape, strides, tensor.storage_offset() + axis.start * step)


def _runs(a: torch.Tensor, b: torch.Tensor, dims: list[int]) -> list[list[int]]:
    """``dims`` as runs that are one dimension of one stride in both tensors."""
    runs = [[dims[0]]]
    for before, dim in itertools.pairwise(dims):
        if all(x.stride(before) == x.shape[dim] * x.stride(dim) for x in (a, b)):
            runs[-1].append(dim)
        else:
            runs.append([dim])
    return runs


def _matrix(tensor: torch.Tensor, unit: int, run: list[int], at: Mapping[int, int]) -> torch.Tensor:
    """The (units, run) view at one position of the other dimensions."""
    length = math.prod(tensor.shape[d] for d in run)
    offset = tensor.storage_offset() + sum(i * tensor.stride(d) for d, i in at.items())
    return tensor.as_strided(
        (tensor.shape[unit], length), (tensor.stride(unit), tensor.stride(run[-1])), offset
    )
