"""Tensors of many models under doubly stochastic maps that step towards permutations, without a product of matrices.

A tensor X whose two dimensions are mixed by maps M and N is ``C = M X N'``. After a step of length t towards the permutations P
and Q it is

    (1 - t)^2 C + t (1 - t) (P X N' + M X Q') + t^2 P X Q'.

If ``M X`` and ``X N'`` are kept, all of these are reordered copies, and so are the new ``M X`` and ``X N'``. The objective is a
polynomial in t, whose coefficients are inner products of the terms. Only the gradient needs products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fastmatch.matching.gains import unit_rows
from fastmatch.spec import Axis
from fastmatch_kernels.matrix_product import addmm_nt

__all__ = ["Mixtures", "can_mix"]

SPLIT = 1 << 15
"""Numbers of each term that a CPU multiplies at a time."""

Order = Mapping[int, torch.Tensor]
"""Dimension -> the positions of a tensor that a permutation selects along it."""


def can_mix(axes: Sequence[Axis], sizes: Sequence[int]) -> bool:
    """Return whether the maps of a tensor's axes act on whole dimensions, two at most, and on each position once."""
    dims = {axis.dim for axis in axes}
    if len(dims) > 2 or any(axis.at for axis in axes):
        return False
    for dim in dims:
        places = [x.positions(n).flatten() for x, n in zip(axes, sizes, strict=True) if x.dim == dim]
        every = torch.cat(places)
        if len(every.unique()) != len(every):
            return False
    return True


class Mixtures:
    """One tensor of every model, under the maps of all of its dimensions and under those of each alone.

    They are kept in float32, unless a tensor is in float64: the way to the permutations needs no more. Products of terms are summed in
    float64.

    Args:
        tensors: one per model, of one shape; not changed.
        axes: (axis, number of its group) of every axis that is mixed; see :func:`can_mix`. The maps begin at the identity.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], axes: Sequence[tuple[Axis, int]]) -> None:
        self.axes = axes
        self.dims: tuple[int, ...] = tuple(sorted({axis.dim for axis, _ in axes}))
        alone = [(dim,) for dim in self.dims] if len(self.dims) > 1 else []
        subsets: list[tuple[int, ...]] = [(), *alone, self.dims]
        wide = any(t.dtype == torch.float64 for t in tensors)
        self.dtype = torch.float64 if wide else torch.float32
        self.mixed = [{dims: t.to(self.dtype) if dims else t for dims in subsets} for t in tensors]
        """Per model, the tensor under the maps of some dimensions."""
        self._orders: list[Order] = []
        self._terms: list[torch.Tensor] = []

    def add_gradients(self, gradients: Sequence[Sequence[torch.Tensor]]) -> None:
        """Add the gradient of the pairwise objective by the maps to (size, size) matrices, per model and group."""
        total = torch.stack([mixed[self.dims] for mixed in self.mixed]).sum(0)
        for mixed, out in zip(self.mixed, gradients, strict=True):
            rest = total - mixed[self.dims]
            for axis, group in self.axes:
                gradient = out[group]
                others = mixed[tuple(dim for dim in self.dims if dim != axis.dim)]
                rows = (unit_rows(x, axis, len(gradient), gradient.dtype) for x in (rest, others))
                addmm_nt(gradient, *rows)

    def look(self, permutations: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        """Return the matrix Q of the objective ``w' Q w`` on the way to permutations, ``w_j = (1 - t)^j t^(q - j)``.

        Args:
            permutations: per model and group, (size,) int64.

        Returns:
            (q + 1, q + 1) float64 for q mixed dimensions.
        """
        self._orders = [self._order(model) for model in permutations]
        self._terms = []
        count = len(self.dims)
        gram = torch.zeros(count + 1, count + 1, dtype=torch.float64, device="cpu")
        total: torch.Tensor | None = None
        for mixed, order in zip(self.mixed, self._orders, strict=True):
            terms = torch.zeros(count + 1, *mixed[()].shape, dtype=self.dtype, device=mixed[()].device)
            for dims, part in mixed.items():
                terms[len(dims)] += _reordered(part, order, [d for d in self.dims if d not in dims])
            self._terms.append(terms)
            gram -= _gram(terms)
            total = terms.clone() if total is None else total.add_(terms)
        assert total is not None
        return (gram + _gram(total)) / 2

    def go(self, t: float) -> None:
        """Move all maps by the fraction ``t`` towards the permutations last looked at."""
        count = len(self.dims)
        weights = [(1 - t) ** k * t ** (count - k) for k in range(count + 1)]
        for mixed, order, terms in zip(self.mixed, self._orders, self._terms, strict=True):
            for dims, part in mixed.items():
                if len(dims) == 1 and count > 1:
                    mixed[dims] = torch.lerp(part, _reordered(mixed[()], order, dims).to(part), t)
            mixed[self.dims] = torch.einsum(
                "k,k...->...", torch.tensor(weights, device="cpu").to(terms), terms
            )
        self._terms = []

    def _order(self, permutations: Sequence[torch.Tensor]) -> Order:
        """The positions that the permutations of all groups select along each dimension."""
        shape, device = self.mixed[0][()].shape, self.mixed[0][()].device
        order = {dim: torch.arange(shape[dim], device="cpu") for dim in self.dims}
        for axis, group in self.axes:
            positions = axis.positions(len(permutations[group]))
            order[axis.dim][positions] = positions[:, permutations[group]]
        return {dim: index.to(device) for dim, index in order.items()}


def _reordered(tensor: torch.Tensor, order: Order, dims: Sequence[int]) -> torch.Tensor:
    for dim in dims:
        tensor = tensor.index_select(dim, order[dim])
    return tensor


def _gram(terms: torch.Tensor) -> torch.Tensor:
    """The inner products of all terms, in float64; a CPU widens parts while they are in a cache."""
    total = torch.zeros(len(terms), len(terms), dtype=torch.float64, device=terms.device)
    flat = terms.flatten(1)
    for part in flat.split(SPLIT, dim=1) if flat.device.type == "cpu" else (flat,):
        wide = part.double()
        total.addmm_(wide, wide.T)
    return total.cpu()
