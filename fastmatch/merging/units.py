"""Linear maps from the units of N models to merged units, and back.

A merge keeps a group's size n. Model k has a linear map R_k (n, n) into the merged units and a map U_k (n, n) back,
with ``sum_k weights[k] R_k U_k = I``. A merged activation is ``sum_k weights[k] R_k z_k``, model k reads ``U_k z``
from it, and a weight becomes ``sum_k weights[k] R_k W_k U_k``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastmatch.spec import Axis

__all__ = ["UnitMaps", "cluster_maps", "identity_maps", "matrix_maps", "on_axis"]


class _Gather(nn.Module):
    """Unit j is merged unit ``columns[j]``."""

    columns: torch.Tensor

    def __init__(self, columns: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("columns", columns)

    def forward(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        return values.index_select(dim, self.columns)


class _Gathered(nn.Module):
    """Merged unit i is the sum of the units j with ``columns[j] == i``, times ``scale[i]``."""

    columns: torch.Tensor
    scale: torch.Tensor | None

    def __init__(self, columns: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("columns", columns)
        self.register_buffer("scale", scale)

    def forward(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        total = torch.zeros_like(values).index_add(dim, self.columns, values)
        if self.scale is None:
            return total
        shape = [1] * values.ndim
        shape[dim] = -1
        return total * self.scale.to(values.dtype).view(shape)


class _Matrix(nn.Module):
    """A linear map of units. The matrix is a parameter, because the map is one more layer of the network."""

    is_unit_map = True

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix, requires_grad=False)

    def forward(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        front = values.movedim(dim, 0)
        mapped = self.matrix.to(values.dtype) @ front.reshape(len(front), -1)
        return mapped.view(front.shape).movedim(0, dim)


@dataclass(frozen=True, eq=False)
class UnitMaps:
    """The maps of one group, one per model. Each is called as ``map(tensor, dim)``.

    Attributes:
        leave: R_k, for values and for the output side of parameters.
        enter: the transpose of U_k, for the input side of parameters.
        read: U_k, for values.
        variance: R_k for variances.
        spread: R_k for standard deviations; None if the maps mix units, because that needs their covariances.
    """

    leave: tuple[nn.Module, ...]
    enter: tuple[nn.Module, ...]
    read: tuple[nn.Module, ...]
    variance: tuple[nn.Module, ...]
    spread: tuple[nn.Module, ...] | None

    def to(self, device: torch.device, dtype: torch.dtype) -> UnitMaps:
        """Move the maps to a device; matrices and scales also take the dtype."""
        for unit_map in (*self.leave, *self.enter, *self.read, *self.variance):
            unit_map.to(device, dtype)
        return self


def on_axis(unit_map: nn.Module, tensor: torch.Tensor, axis: Axis, size: int) -> torch.Tensor:
    """Return ``tensor`` with the map applied to the group of ``size`` units at ``axis``."""
    if axis.is_whole(size, tensor.shape[axis.dim]):
        return unit_map(tensor, axis.dim)
    front = tensor.movedim(axis.dim, 0)
    positions = axis.positions(size).to(tensor.device)
    return front.index_put((positions,), unit_map(front[positions], 1)).movedim(0, axis.dim)


def identity_maps(size: int, weights: Sequence[float]) -> UnitMaps:
    """Return the maps that merge unit j with unit j."""
    return cluster_maps([torch.arange(size, device="cpu")] * len(weights), weights)


def cluster_maps(columns: Sequence[torch.Tensor], weights: Sequence[float]) -> UnitMaps:
    """Return the maps that make merged units the weighted means of their members.

    Args:
        columns: per model, (n,) int64: unit j joins merged unit ``columns[k][j]``.
        weights: one per model.
    """
    total = torch.zeros(len(columns[0]), dtype=torch.float64, device="cpu")
    for column, weight in zip(columns, weights, strict=True):
        total.index_add_(0, column, torch.full((len(column),), weight, dtype=torch.float64, device="cpu"))
    # If every merged unit has one member per model, the total is one up to the rounding of the weights' sum.
    whole = torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-6)
    scale = None if whole else 1 / total
    leave = tuple(_Gathered(column, scale) for column in columns)
    return UnitMaps(
        leave=leave,
        enter=tuple(_Gathered(column) for column in columns),
        read=tuple(_Gather(column) for column in columns),
        variance=leave,
        spread=leave,
    )


def matrix_maps(merge: Sequence[torch.Tensor], unmerge: Sequence[torch.Tensor]) -> UnitMaps:
    """Return the maps of dense R_k (``merge``) and U_k (``unmerge``), (n, n) each."""
    return UnitMaps(
        leave=tuple(_Matrix(m) for m in merge),
        enter=tuple(_Matrix(u.T.contiguous()) for u in unmerge),
        read=tuple(_Matrix(u) for u in unmerge),
        variance=tuple(_Matrix(m.square()) for m in merge),
        spread=None,
    )
