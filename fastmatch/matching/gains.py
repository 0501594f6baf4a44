"""Gain matrices that follow their neighbours: rebuilt by GEMM, or updated by the units that moved.

A group's gain is the sum over its tensors of ``A_rows @ B_rows.T``, where the columns of B are ordered by the
groups on the tensor's other axes. When m of those units have moved since, the sum changes by
``A[:, moved] @ (B[:, now] - B[:, then]).T``: 2 n^2 m operations instead of 2 n^2 d.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fastmatch._internal.states import State, headers_of
from fastmatch.permutations.apply import dimension_indices, moved_positions, permute_tensor
from fastmatch.spec import Axis, Group, Permutations, PermutationSpec

__all__ = ["Gains", "unit_rows"]

WORTHWHILE = 0.9
"""Share of a gain's operations above which it is built anew."""

UPDATES = 64
"""Updates in a row before a gain is built anew, so that their float32 rounding does not pile up: it grows like the
root of their number, and is that of a build twice over after some 16 (MLP and VGG16, measured)."""

BLOCK = 1 << 23
"""Numbers of a tensor that enter a gain in one piece: copies in the gain's dtype stay small beside it."""


def unit_rows(
    tensor: torch.Tensor, axis: Axis, size: int, dtype: torch.dtype, units: torch.Tensor | None = None
) -> torch.Tensor:
    """The (units, features) matrix of one axis: everything that belongs to a unit, in its row; all units for None."""
    front = axis.slice_of(tensor).movedim(axis.dim, 0)
    if axis.is_whole(size, front.shape[0]):
        front = front if units is None else front[units.to(tensor.device)]
        return front.to(dtype).reshape(len(front), -1)
    positions = axis.positions(size) if units is None else axis.positions(size)[:, units]
    picked = front[positions.to(tensor.device)].to(dtype)  # (outer, units, inner, rest...)
    return picked.movedim(1, 0).reshape(picked.shape[1], -1)


def _pieces(a: torch.Tensor, b: torch.Tensor, axis: Axis) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both tensors cut alike across their longest dimension but the axis's own."""
    others = [d for d in range(a.ndim) if d != axis.dim]
    if not others or a.numel() <= BLOCK:
        yield a, b
        return
    dim = max(others, key=lambda d: a.shape[d])
    step = max(1, BLOCK * a.shape[dim] // a.numel())
    yield from zip(a.split(step, dim), b.split(step, dim), strict=True)


Order = Mapping[int, torch.Tensor]
"""Dimension -> which of B's positions stand along it; dimensions left out stay as they are."""


@dataclass(frozen=True)
class _Change:
    """The share of a tensor that moved, along which dimension, and which positions; an infinite share has to be built anew."""

    share: float
    dim: int
    units: torch.Tensor


@dataclass
class _Kept:
    """A gain, how B's columns were ordered along each axis when it was computed, and the updates since it was built."""

    gain: torch.Tensor
    orders: Mapping[Axis, Order]
    updates: int = 0


class Gains:
    """The gains of a weight matching; those that fit into ``budget`` bytes are kept from solve to solve.

    Args:
        a, b: state dicts; rows of a gain are units of A, columns units of B in their own order.
        spec: which axes move together.
        budget: bytes of gains to keep; 0 where the states lie on disk and only one gain may be held.
    """

    def __init__(self, a: State, b: State, spec: PermutationSpec, budget: int) -> None:
        self.a, self.b, self.spec, self.budget = a, b, spec, budget
        self.kept: dict[str, _Kept] = {}

    def of(self, group: Group, axes: Sequence[Axis], permutations: Permutations) -> torch.Tensor:
        """The (n, n) gain of a group over ``axes`` under the others' permutations; not to be written to."""
        if any(self.spec.has_slices(axis.parameter) for axis in axes):
            # What moves in slices only has no one order of columns that an update could follow.
            return self._build(group, axes, permutations, None)
        orders = {
            axis: dimension_indices(axis.parameter, self.spec, permutations, skip=axis) for axis in axes
        }
        kept = self.kept.get(group.name)
        if kept is not None and kept.updates < UPDATES and kept.orders.keys() <= orders.keys():
            changes = {axis: self._change(axis, then, orders[axis]) for axis, then in kept.orders.items()}
            sizes = {axis: math.prod(self.spec.shapes[axis.parameter]) for axis in changes}
            if sum(n * changes[axis].share for axis, n in sizes.items()) < WORTHWHILE * sum(sizes.values()):
                moves = [
                    (axis, change, kept.orders[axis], orders[axis])
                    for axis, change in changes.items()
                    if change.share
                ]
                self._update(kept, group, moves)
                self._add(kept.gain, group, [x for x in axes if x not in kept.orders], permutations)
                kept.orders = orders
                return kept.gain
        gain = self._build(group, axes, permutations, None if kept is None else kept.gain)
        size = gain.numel() * gain.element_size()
        if kept is not None:
            self.kept[group.name] = _Kept(gain, orders)
        elif size <= self.budget:
            self.budget -= size
            self.kept[group.name] = _Kept(gain, orders)
        return gain

    def _build(
        self, group: Group, axes: Sequence[Axis], permutations: Permutations, out: torch.Tensor | None
    ) -> torch.Tensor:
        """The gain from nothing."""
        for k, (rows_a, rows_b) in enumerate(self._pairs(group, axes, permutations)):
            if out is None:
                out = torch.empty(group.size, group.size, dtype=rows_a.dtype, device=rows_a.device)
            out.addmm_(rows_a, rows_b.T, beta=min(k, 1))
        assert out is not None, f"group {group.name!r} was given no axes"
        return out

    def _add(
        self, gain: torch.Tensor, group: Group, axes: Sequence[Axis], permutations: Permutations
    ) -> None:
        """Adds the share of axes that are new to a gain."""
        for rows_a, rows_b in self._pairs(group, axes, permutations):
            gain.addmm_(rows_a.to(gain.dtype), rows_b.T.to(gain.dtype))

    def _pairs(
        self, group: Group, axes: Sequence[Axis], permutations: Permutations
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The (n, features) matrices of A and B, B's other axes permuted; vectors (biases, norms) joined to one.

        Every tensor is asked for once and let go before the next: a state may read them from disk.
        """
        a, b = headers_of(self.a), headers_of(self.b)
        wide = any(a[x.parameter].dtype == b[x.parameter].dtype == torch.float64 for x in axes)
        dtype = torch.float64 if wide else torch.float32
        vectors: list[tuple[torch.Tensor, torch.Tensor]] = []
        for axis in axes:
            whole_a = axis.slice_of(self.a[axis.parameter])
            whole_b = axis.slice_of(
                permute_tensor(self.b[axis.parameter], axis.parameter, self.spec, permutations, skip=axis)
            )
            within = replace(axis, at=())
            for part_a, part_b in _pieces(whole_a, whole_b, axis):
                rows_a = unit_rows(part_a, within, group.size, dtype)
                rows_b = unit_rows(part_b, within, group.size, dtype).to(rows_a.device)
                if rows_a.shape[1] == 1:
                    vectors.append((rows_a, rows_b))
                else:
                    yield rows_a, rows_b
        if vectors:
            yield torch.cat([x for x, _ in vectors], 1), torch.cat([y for _, y in vectors], 1)

    def _change(self, axis: Axis, then: Order, now: Order) -> _Change:
        """What has moved in B; along more than one other dimension it is no change, and the gain is built anew."""
        moved = moved_positions(now, then, self.spec.shapes[axis.parameter])
        if not moved:
            return _Change(0.0, -1, torch.zeros(0, dtype=torch.long))
        dim, units = moved.popitem()
        whole = bool(moved) or dim == axis.dim
        return _Change(math.inf if whole else len(units) / self.spec.shapes[axis.parameter][dim], dim, units)

    def _update(self, kept: _Kept, group: Group, moves: Sequence[tuple[Axis, _Change, Order, Order]]) -> None:
        """Adds ``A[:, moved] @ (B[:, now] - B[:, then]).T`` of all axes in one product: the gain is read and written once."""
        factors = [self._moved_rows(group, kept.gain, *move) for move in moves]
        if factors:
            rows_a, rows_b = factors[0]
            if len(factors) > 1:
                rows_a, rows_b = (torch.cat([factor[side] for factor in factors], 1) for side in range(2))
            kept.gain.addmm_(rows_a, rows_b.T)
            kept.updates += 1

    def _moved_rows(
        self, group: Group, gain: torch.Tensor, axis: Axis, change: _Change, then: Order, now: Order
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(A's columns that moved, B's as they are less B's as they were), (n, features) each."""
        a, b, dim, units = self.a[axis.parameter], self.b[axis.parameter], change.dim, change.units
        parts = []
        for order in (now, then):
            picked = order[dim][units] if dim in order else units
            part = b.index_select(dim, picked.to(b.device)).to(gain.dtype)
            for other, index in order.items():
                if other != dim:
                    part = part.index_select(other, index.to(part.device))
            parts.append(part)
        a = a.index_select(dim, units.to(a.device))
        rows_a, rows_b = (unit_rows(x, axis, group.size, gain.dtype) for x in (a, parts[0] - parts[1]))
        return rows_a, rows_b.to(gain.device)
