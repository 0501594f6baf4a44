"""Tensors of many models that one map each moves along one dimension: products of pairs of models are made once.

The units of model p in a group are the rows of a matrix X_p, with all weights of such tensors in columns, and its map is M_p. The
gradient by the map is

    S_p = sum_{q != p} (M_q X_q) X_p' = sum_{q != p} M_q (X_q X_p').

It is linear in the maps. After a step of length t towards permutations P it is ``(1 - t) S_p + t R_p``, where
``R_p = sum_{q != p} P_q (X_q X_p')`` is a sum of reordered products. The objective on the way is

    (1 - t)^2 a + t (1 - t) sum_p <S_p, P_p> + t^2 / 2 sum_p <R_p, P_p>,

with the objective ``a`` at its start.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch

from fastmatch.matching.gains import unit_rows
from fastmatch.spec import Axis
from fastmatch_kernels.matrix_product import addmm_nt

__all__ = ["PairProducts", "can_pair", "pairs_pay"]

FEATURES_A_PAIR = 30
"""Weights of a unit, for each other model, from which reordering the products of all pairs is faster than making products anew.

A CPU multiplies at 100 to 200 GFLOP/s a core, and reorders and adds a number in about half a nanosecond."""

SPACE = 2.0
"""Numbers that are kept at most, in those that :class:`~fastmatch.matching.mixtures.Mixtures` would keep."""


def can_pair(axes: Sequence[Axis], sizes: Sequence[int], shape: Sequence[int]) -> bool:
    """Return whether a tensor has one axis, which holds its whole dimension."""
    return len(axes) == 1 and not axes[0].at and axes[0].positions(sizes[0]).numel() == shape[axes[0].dim]


def pairs_pay(size: int, weights: int, models: int) -> bool:
    """Return whether products of pairs of models are kept.

    Args:
        size: the units of the group.
        weights: the weights of a unit in tensors that move along no other dimension.
        models: how many models there are.
    """
    kept = (models * (models - 1) / 2 + 2 * models) * size * size
    return weights >= FEATURES_A_PAIR * (models - 1) and kept <= SPACE * 3 * models * size * weights


class PairProducts:
    """Gradient and objective of the tensors of one group, as they change in steps towards permutations.

    They are in float32, unless a tensor is in float64. The interface is that of
    :class:`~fastmatch.matching.mixtures.Mixtures`.

    Args:
        tensors: one list per model, in the order of ``axes``; not kept. There are two models at least.
        axes: the axis of each tensor; see :func:`can_pair`.
        group: the number of the group.
        size: its units. The maps begin at the identity.
    """

    def __init__(
        self, tensors: Sequence[Sequence[torch.Tensor]], axes: Sequence[Axis], group: int, size: int
    ) -> None:
        wide = any(t.dtype == torch.float64 for model in tensors for t in model)
        dtype = torch.float64 if wide else torch.float32
        rows = [
            torch.cat([unit_rows(t, axis, size, dtype) for t, axis in zip(model, axes, strict=True)], 1)
            for model in tensors
        ]
        self.group = group
        self.products = {
            (q, p): addmm_nt(rows[0].new_empty(size, size), rows[q], rows[p], beta=0)
            for q, p in combinations(range(len(rows)), 2)
        }
        self.gradients = self._gradients([torch.arange(size, device=rows[0].device)] * len(rows))
        self.objective = sum(float(g.diagonal().double().sum()) for g in self.gradients) / 2
        self._at_vertex: list[torch.Tensor] = []
        self._gram = torch.zeros(2, 2, dtype=torch.float64, device="cpu")

    def add_gradients(self, gradients: Sequence[Sequence[torch.Tensor]]) -> None:
        """Add the gradient of the pairwise objective by the maps to (size, size) matrices, per model and group."""
        for gradient, out in zip(self.gradients, gradients, strict=True):
            out[self.group].add_(gradient)

    def look(self, permutations: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        """Return the matrix Q of the objective ``w' Q w`` on the way to permutations, ``w = (t, 1 - t)``.

        Args:
            permutations: per model and group, (size,) int64.

        Returns:
            (2, 2) float64.
        """
        device = self.gradients[0].device
        orders = [model[self.group].to(device) for model in permutations]
        self._at_vertex = self._gradients(orders)
        cross = _sum_at(self.gradients, orders) / 2
        end = _sum_at(self._at_vertex, orders) / 2
        self._gram = torch.tensor([[end, cross], [cross, self.objective]], dtype=torch.float64, device="cpu")
        return self._gram

    def go(self, t: float) -> None:
        """Move all maps by the fraction ``t`` towards the permutations last looked at."""
        weights = torch.tensor([t, 1 - t], dtype=torch.float64, device="cpu")
        self.objective = float(weights @ self._gram @ weights)
        for gradient, end in zip(self.gradients, self._at_vertex, strict=True):
            gradient.lerp_(end, t)
        self._at_vertex = []

    def _gradients(self, orders: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The gradient by each map where all maps are permutations."""
        first = self.products[0, 1]
        found = [torch.zeros_like(first) for _ in orders]
        for (q, p), product in self.products.items():
            found[p] += product.index_select(0, orders[q])
            found[q] += product.index_select(1, orders[p]).T
        return found


def _sum_at(matrices: Sequence[torch.Tensor], orders: Sequence[torch.Tensor]) -> float:
    """The sum over models of the entries that a permutation picks of each row, in float64."""
    picked = [m.gather(1, order[:, None]).double().sum() for m, order in zip(matrices, orders, strict=True)]
    return float(torch.stack(picked).sum())
