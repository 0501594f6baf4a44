"""How the units of N models become merged units, and how merged units are read by each model again.

A merge keeps a group's size n. Model k's part of it is a linear map R_k (n, n) into the merged units, and a
map U_k (n, n) back, with ``sum_k weights[k] R_k U_k = I``: a merged activation is ``sum_k weights[k] R_k z_k``, what
model k reads of it is ``U_k z``, and a weight becomes ``sum_k weights[k] R_k W_k U_k``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fastmatch.matching.activations import best_permutation
from fastmatch.matching.cca import roots
from fastmatch.merging.zip import zip_units
from fastmatch.spec import Axis
from fastmatch.statistics.moments import CrossMoments

__all__ = ["RULES", "UnitMaps", "identity_maps", "maps_by", "on_axis"]

RULES = ("identity", "permute", "zip", "cca")
"""Unit k with unit k; a permutation of each model to the first; ZipIt's greedy pairs; canonical correlations."""


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
    """A linear map of units; a parameter, since it is one more layer."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix, requires_grad=False)

    def forward(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        front = values.movedim(dim, 0)
        mapped = self.matrix.to(values.dtype) @ front.reshape(len(front), -1)
        return mapped.view(front.shape).movedim(0, dim)


@dataclass(frozen=True)
class UnitMaps:
    """The maps of one group, one a model; each is called as ``map(tensor, dim)``.

    Attributes:
        leave: R_k, for values, and for parameters at the side where units leave.
        enter: the transpose of U_k, for parameters at the side where units enter.
        read: U_k, for values.
        spread: R_k for standard deviations: None where the rule mixes units, whose covariances would be needed.
        variance: R_k for variances.
    """

    leave: tuple[nn.Module, ...]
    enter: tuple[nn.Module, ...]
    read: tuple[nn.Module, ...]
    variance: tuple[nn.Module, ...]
    spread: tuple[nn.Module, ...] | None

    def to(self, device: torch.device, dtype: torch.dtype) -> UnitMaps:
        """Moves the maps there; matrices and scales take the type."""
        for unit_map in (*self.leave, *self.enter, *self.read, *self.variance):
            unit_map.to(device, dtype)
        return self


def on_axis(unit_map: nn.Module, tensor: torch.Tensor, axis: Axis, size: int) -> torch.Tensor:
    """``tensor`` with the map applied to the group of ``size`` units that lies at ``axis``."""
    if axis.is_whole(size, tensor.shape[axis.dim]):
        return unit_map(tensor, axis.dim)
    front = tensor.movedim(axis.dim, 0)
    positions = axis.positions(size).to(tensor.device)
    return front.index_put((positions,), unit_map(front[positions], 1)).movedim(0, axis.dim)


def identity_maps(size: int, weights: Sequence[float]) -> UnitMaps:
    """Unit k with unit k."""
    return _clusters([torch.arange(size)] * len(weights), weights)


def maps_by(
    rule: str,
    moments: Sequence[CrossMoments],
    weights: Sequence[float],
    *,
    a: float,
    b: float,
    gamma: float,
) -> UnitMaps:
    """The maps of one group by a rule of :data:`RULES` that looks at activations.

    Args:
        rule: its name.
        moments: to permute, those of the first model's activations with each other's; else one, of all
            models' side by side, (samples, N n), with themselves.
        weights: one a model, positive, of sum one.
        a, b: of ``"zip"``, see :func:`fastmatch.merging.zip.zip_units`.
        gamma: of ``"cca"``: added to the covariances' diagonals, as a share of their mean.
    """
    if rule == "permute":
        found = [best_permutation(m.similarity("correlation")) for m in moments]
        return _clusters([torch.arange(len(found[0])), *(perm.argsort() for perm in found)], weights)
    (joint,) = moments
    if rule == "cca":
        return _canonical(joint.similarity("covariance"), len(weights), gamma)
    similarity = _without_ties(joint.similarity("correlation"), len(weights)).cpu().numpy().astype(np.float32)
    columns = torch.from_numpy(zip_units(similarity, len(weights), len(similarity) // len(weights), a, b)[0])
    # Each its own memory: torch.export saves whole tensors.
    return _clusters([part.clone() for part in columns.long().chunk(len(weights))], weights)


def _without_ties(similarity: torch.Tensor, count: int) -> torch.Tensor:
    """The similarity with ties decided as they must be where a model meets itself.

    Units that never vary are alike across models: at zero they would join units that do vary. Of units equally
    alike, those of the same index are a little more so.
    """
    index = torch.arange(len(similarity), device=similarity.device)
    model, unit = index // (len(index) // count), index % (len(index) // count)
    other = model[:, None] != model
    constant = similarity.diagonal() == 0
    alike = similarity.masked_fill(constant[:, None] & constant & other, 1.0)
    return alike + 1e-6 * ((unit[:, None] == unit) & other)


def _clusters(columns: Sequence[torch.Tensor], weights: Sequence[float]) -> UnitMaps:
    """Unit j of model k joins merged unit ``columns[k][j]``, which is the weighted mean of its members."""
    total = torch.zeros(len(columns[0]), dtype=torch.float64)
    for column, weight in zip(columns, weights, strict=True):
        total.index_add_(0, column, torch.full((len(column),), weight, dtype=torch.float64))
    # Where every unit has one member a model the total is one, up to the rounding of the weights' sum.
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


def _canonical(covariance: torch.Tensor, count: int, gamma: float) -> UnitMaps:
    """Each model into the first's units along canonical directions (CCA-Merge, Horoi et al. 2024).

    With whitening S and the orthogonal factor Q of ``S_a^-1/2 S_ab S_b^-1/2``, ``R_b = S_a^1/2 Q S_b^-1/2``, U_b
    is its inverse, and both are the identity for the first model.
    """
    n = len(covariance) // count
    root_a, inverse_a = roots(covariance[:n, :n], gamma)
    merge, unmerge = [torch.eye(n, dtype=torch.float64)], [torch.eye(n, dtype=torch.float64)]
    for k in range(1, count):
        root_b, inverse_b = roots(covariance[k * n : (k + 1) * n, k * n : (k + 1) * n], gamma)
        turn = _orthogonal(inverse_a @ covariance[:n, k * n : (k + 1) * n] @ inverse_b)
        merge.append((root_a @ turn @ inverse_b).cpu())
        unmerge.append((root_b @ turn.T @ inverse_a).cpu())
    return UnitMaps(
        leave=tuple(_Matrix(m) for m in merge),
        enter=tuple(_Matrix(u.T.contiguous()) for u in unmerge),
        read=tuple(_Matrix(u) for u in unmerge),
        variance=tuple(_Matrix(m.square()) for m in merge),
        spread=None,
    )


def _orthogonal(cross: torch.Tensor) -> torch.Tensor:
    """The orthogonal matrix nearest to ``cross``; where that says nothing (singular values of zero), to the identity."""
    left, values, right = torch.linalg.svd(cross)
    known = int((values > 1e-6 * values[:1].clamp(min=1e-300)).sum())
    u, _, v = torch.linalg.svd(left[:, known:].T @ right[known:].T)
    return left[:, :known] @ right[:known] + left[:, known:] @ u @ v @ right[known:]
