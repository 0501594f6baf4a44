"""Gain matrices that follow their neighbours: rebuilt by GEMM, or updated by the units that moved.

A group's gain is the sum over its tensors of ``A_rows @ B_rows.T``, where the columns of B are ordered by the
groups on the tensor's other axes. When m of those units have moved since, the sum changes by
``A[:, moved] @ (B[:, now] - B[:, then]).T``: 2 n^2 m operations instead of 2 n^2 d.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fastmatch.permute import dimension_indices, permute_tensor
from fastmatch.spec import Axis, Group, Permutations, PermutationSpec
from fastmatch.states import State, headers_of

__all__ = ["Gains", "unit_rows"]

WORTHWHILE = 0.5
"""Share of a gain's operations above which it is built anew."""

UPDATES = 16
"""Updates in a row before a gain is built anew, so that their float32 rounding does not pile up."""

BLOCK = 1 << 23
"""Numbers of a tensor that enter a gain in one piece: copies in the gain's dtype stay small beside it."""


def unit_rows(
    tensor: torch.Tensor, axis: Axis, size: int, dtype: torch.dtype, units: torch.Tensor | None = None
) -> torch.Tensor:
    """The (units, features) matrix of one axis: everything that belongs to a unit, in its row; all units for None."""
    front = tensor.movedim(axis.dim, 0)
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


@dataclass
class _Kept:
    """A gain, the permutations it was computed under, and the updates since it was built."""

    gain: torch.Tensor
    permutations: Permutations
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
        kept = self.kept.get(group.name)
        if kept is not None and kept.updates < UPDATES:
            changes = [self._change(axis, kept.permutations, permutations) for axis in axes]
            operations = sum(
                self.a[x.parameter].numel() * share for x, (share, _, _) in zip(axes, changes, strict=True)
            )
            if operations < WORTHWHILE * sum(self.a[x.parameter].numel() for x in axes):
                for axis, (share, dim, moved) in zip(axes, changes, strict=True):
                    if share:
                        self._update(kept.gain, group, axis, dim, moved, kept.permutations, permutations)
                        kept.updates += 1
                kept.permutations = dict(permutations)
                return kept.gain
        gain = self._build(group, axes, permutations, None if kept is None else kept.gain)
        size = gain.numel() * gain.element_size()
        if kept is not None:
            self.kept[group.name] = _Kept(gain, dict(permutations))
        elif size <= self.budget:
            self.budget -= size
            self.kept[group.name] = _Kept(gain, dict(permutations))
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
            whole_a = self.a[axis.parameter]
            whole_b = permute_tensor(
                self.b[axis.parameter], axis.parameter, self.spec, permutations, skip=axis
            )
            for part_a, part_b in _pieces(whole_a, whole_b, axis):
                rows_a = unit_rows(part_a, axis, group.size, dtype)
                rows_b = unit_rows(part_b, axis, group.size, dtype).to(rows_a.device)
                if rows_a.shape[1] == 1:
                    vectors.append((rows_a, rows_b))
                else:
                    yield rows_a, rows_b
        if vectors:
            yield torch.cat([x for x, _ in vectors], 1), torch.cat([y for _, y in vectors], 1)

    def _change(self, axis: Axis, then: Permutations, now: Permutations) -> tuple[float, int, torch.Tensor]:
        """(share of the tensor that moved, along which dimension, which positions).

        What is no change along one other dimension has an infinite share: the gain is built anew.
        """
        before = dimension_indices(axis.parameter, self.spec, then, skip=axis)
        after = dimension_indices(axis.parameter, self.spec, now, skip=axis)
        share, along, moved = 0.0, -1, torch.zeros(0, dtype=torch.long)
        for dim in before.keys() | after.keys():
            length = self.spec.shapes[axis.parameter][dim]
            positions = torch.arange(length)
            changed = torch.nonzero(before.get(dim, positions) != after.get(dim, positions)).flatten()
            if len(changed):
                several = along >= 0 or dim == axis.dim
                share, along, moved = math.inf if several else len(changed) / length, dim, changed
        return share, along, moved

    def _update(
        self,
        gain: torch.Tensor,
        group: Group,
        axis: Axis,
        dim: int,
        moved: torch.Tensor,
        then: Permutations,
        now: Permutations,
    ) -> None:
        """Adds ``A[:, moved] @ (B[:, now] - B[:, then]).T`` along ``dim``."""
        a, b = self.a[axis.parameter], self.b[axis.parameter]
        positions = torch.arange(self.spec.shapes[axis.parameter][dim])
        parts = []
        for permutations in (now, then):
            indices = dimension_indices(axis.parameter, self.spec, permutations, skip=axis)
            part = b.index_select(dim, indices.pop(dim, positions)[moved].to(b.device)).to(gain.dtype)
            for other, index in indices.items():
                part = part.index_select(other, index.to(part.device))
            parts.append(part)
        step = parts[0].sub_(parts[1]) if parts[0].dtype != b.dtype else parts[0] - parts[1]
        a = a.index_select(dim, moved.to(a.device))
        rows_a, rows_b = (unit_rows(x, axis, group.size, gain.dtype) for x in (a, step))
        gain.addmm_(rows_a, rows_b.T.to(gain.device))
