"""What a placement of groups gathers while tensors are in memory, so that they need not be read again.

Once the last group of a tensor is placed, the tensor's order is settled. Its inner product is noted for the objective. Groups that
were placed before by some of their tensors are solved again by all of them: the products of their gains, as far as bounds
require, are gathered from each tensor as it is settled, with the entries of the pairs that the placement has chosen.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from fastmatch.assignment.bounded_gain import LARGEST_SHARE, BoundedGain, PrefixProducts
from fastmatch.matching.gains import FactorsOf, Gains, Order
from fastmatch.matching.held import HeldState
from fastmatch.matching.objective import WeightObjective
from fastmatch.permutations.apply import dimension_indices
from fastmatch.spec import Axis, Group, Permutations, PermutationSpec
from fastmatch_kernels.inner_product import moved_positions

__all__ = ["Placement"]

GATHERED_BYTES = 1 << 28
"""Bytes of gains that are gathered at once."""


class Placement:
    """The groups that are placed one after the other, on disk.

    What it gathers depends on the order of placing alone. If groups are repeated from a journal, their tensors are read when the
    next group is placed, or when a gain is asked for; so a run that goes on has the same bits as one that was not interrupted.

    Args:
        problem: the objective.
        gains: reads the factors of gains.
        names: the groups that are placed.
        incomplete: those that are solved again.
        states: A and B.
    """

    def __init__(
        self,
        problem: WeightObjective,
        gains: Gains,
        names: Collection[str],
        incomplete: Collection[str],
        states: Sequence[HeldState],
    ) -> None:
        self.problem, self.gains, self.states = problem, gains, states
        self.waiting = {name: self._movers(name) & set(names) for name in problem.names()}
        self.gathered: dict[str, _Gathered] = {}
        self.later: list[tuple[str, Permutations]] = []
        left = GATHERED_BYTES
        for name in incomplete:
            group = problem.spec.groups[name]
            axes = problem.axes(group)
            is_plain = len(problem.grouping[name]) == 1 and name not in problem.bonus
            is_plain = is_plain and not any(problem.spec.has_slices(axis.parameter) for axis in axes)
            if is_plain and 4 * group.size**2 <= left and gains.suits_bounds(group, axes):
                left -= 4 * group.size**2
                self.gathered[name] = _Gathered(group)

    def _movers(self, parameter: str) -> set[str]:
        return {self.problem.top_level(name) for _, name in self.problem.spec.axes_of(parameter)}

    def placed(self, name: str, permutations: Permutations, *, is_at_hand: bool) -> None:
        """Take in that a group has been placed.

        Args:
            name: the group.
            permutations: of all groups.
            is_at_hand: whether its tensors are in memory, and this is the only process that places groups. Otherwise they are
                read when they are needed.
        """
        settled = [parameter for parameter, groups in self.waiting.items() if groups == {name}]
        for groups in self.waiting.values():
            groups.discard(name)
        self.later += [(parameter, permutations) for parameter in settled]
        for parameter in settled:
            if all(state.holds(parameter) for state in self.states):
                self.problem.note(parameter, permutations)
        if is_at_hand:
            self._catch_up()

    def gain_of(self, group: Group, axes: Sequence[Axis], permutations: Permutations) -> BoundedGain | None:
        """Return the gain of a group, if it has been gathered for this order of the others and bounds pay."""
        if group.name not in self.gathered or any(self.waiting.values()):
            return None
        self._catch_up()
        found = self.gathered.pop(group.name)
        if found.orders.keys() != set(axes) or not found.is_of(permutations, self.problem.spec):
            return None
        return found.finish(self.gains, permutations)

    def _catch_up(self) -> None:
        for parameter, permutations in self.later:
            for axis, name in self.problem.spec.axes_of(parameter):
                if name in self.gathered:
                    self.gathered[name].add(axis, self.gains, permutations)
        self.later = []


class _Gathered:
    """The products of one group's gain, from the tensors that are settled.

    Attributes:
        orders: axis -> the order of B's other axes, in the order in which tensors were settled.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.orders: dict[Axis, Order] = {}
        self.products: PrefixProducts | None = None
        self._vectors: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, axis: Axis, gains: Gains, permutations: Permutations) -> None:
        """Add the factors of an axis, unless bounds do not pay."""
        if self.products is None:
            cols = permutations[self.group.name]
            self.products = PrefixProducts(LARGEST_SHARE, cols, bounds_only=True)
        self.orders[axis] = dimension_indices(axis.parameter, gains.spec, permutations, skip=axis)
        if not self.products.pays:
            return
        for views in gains.pairs(self.group, [axis], permutations):
            for a, b in views.pairs:
                if a.shape[1] == 1:
                    self._vectors.append((a, b))
                else:
                    self.products.add(a, b)

    def is_of(self, permutations: Permutations, spec: PermutationSpec) -> bool:
        """Return whether the others are in the order of these permutations."""
        return all(
            not moved_positions(
                dimension_indices(axis.parameter, spec, permutations, skip=axis),
                then,
                spec.shapes[axis.parameter],
            )
            for axis, then in self.orders.items()
        )

    def finish(self, gains: Gains, permutations: Permutations) -> BoundedGain | None:
        """Return the gain; None if bounds do not pay."""
        if self.products is None or not self.products.pays:
            return None
        if self._vectors:
            self.products.add(*(torch.cat([pair[side] for pair in self._vectors], 1) for side in (0, 1)))
        found = self.products.finish(FactorsOf(gains, self.group, list(self.orders), permutations))
        return found if isinstance(found, BoundedGain) and not found.is_whole else None
