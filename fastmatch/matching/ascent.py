"""Coordinate ascent on the weight objective: one group is solved at a time, all others held.

For one group the objective is linear in the permutation. Its gain is the sum over the group's (tensor, axis) pairs of
``A_rows @ B_rows.T``, and the best permutation is the solution of a linear assignment problem.

The groups of a sweep are visited by the levels of its order (:mod:`fastmatch.matching.levels`), which changes no result.
If there are several ranks, they share each level.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch

from fastmatch._internal.progress import progress_bar
from fastmatch._internal.ranks import Ranks, current
from fastmatch.assignment import Assignment, solve
from fastmatch.assignment.bounded_gain import BoundedGain
from fastmatch.matching.gain_solves import GainSolver, plain_solver
from fastmatch.matching.gains import Gains, owners_of
from fastmatch.matching.greedy import greedy_order
from fastmatch.matching.held import HeldState, hold
from fastmatch.matching.levels import levels_of
from fastmatch.matching.nested import UnmovedGains, match_nested
from fastmatch.matching.objective import Survey, WeightObjective
from fastmatch.matching.placement import Placement
from fastmatch.matching.sharing import Sharing
from fastmatch.permutations.alignment import Matching
from fastmatch.spec import Axis, Group, Permutations

__all__ = ["Ascent", "Hooks", "Step"]

KEPT = 2
"""The gains kept between solves take at most this many times the bytes of one model: as much as both models."""


@dataclass(frozen=True)
class Step:
    """What one costly step of an ascent finds.

    Attributes:
        permutations: of the solved group and its subgroups; empty if nothing was solved.
        solution: the group's assignment, from which its next solve starts; None for groups with subgroups.
        value: the objective, or how much it rises with these permutations.
    """

    permutations: Permutations = field(default_factory=dict)
    solution: Assignment | None = None
    value: float = 0.0


@dataclass(frozen=True)
class Hooks:
    """What other algorithms add to an ascent, and what a run that may be interrupted needs.

    Attributes:
        bonus: group name -> (size, size) matrix, added to the group's gain and to the objective.
        orders: yields the order of groups of each sweep, in place of the seed; the ascent ends with it. There is no
            greedy initialization then: groups without an initial permutation begin at the identity.
        out_of_core: keep no gain between solves, for states that are on disk and do not fit into memory.
        in_blocks: add up large gains in blocks, and let all ranks multiply the blocks of a group that is alone. Every rank must
            be able to read any tensor by itself.
        stale: the groups to solve first, if all others are known to be at their best; all of them for None.
        remembered: called for every costly step with its name and the function that computes it. It returns the step:
            computed now, or by an interrupted run whose steps are repeated. A run whose steps are all given back as they
            were takes the same way, so it ends in the same permutations. On several ranks, all of them remember the
            same steps.
        ranks: the processes that share the work.
        survey: sums over tensors that are known already.
        gains: those that an earlier ascent has kept, of the same A, in float32 or float64, and B; new ones for None.
    """

    bonus: Mapping[str, torch.Tensor] = field(default_factory=dict)
    orders: Iterator[Sequence[int]] | None = None
    out_of_core: bool = False
    in_blocks: bool = False
    stale: Collection[str] | None = None
    remembered: Callable[[str, Callable[[], Step]], Step] = lambda name, compute: compute()
    ranks: Ranks = field(default_factory=current)
    survey: Survey | None = None
    gains: Gains | None = None


class Ascent:
    """The state of one coordinate ascent.

    A group is stale if it, or a group that shares a tensor with it, has moved since it was solved. Only stale groups
    are solved. A solution is kept only if the objective, recomputed in float64 over the rows that move, rises by more
    than the threshold. So the objective never falls and the ascent ends by itself.

    Args:
        problem: the objective.
        start: a permutation for every group.
        threshold: the least rise of the objective that counts as progress.
        hooks: see :class:`Hooks`.
        progress: show progress bars; None shows them on a terminal.
    """

    def __init__(
        self,
        problem: WeightObjective,
        start: Permutations,
        threshold: float,
        hooks: Hooks,
        progress: bool | None,
    ) -> None:
        self.problem, self.permutations, self.threshold = problem, start, threshold
        self.hooks, self.progress = hooks, progress
        self.names = problem.spec.top_level()
        self.costs = {name: problem.cost(name) for name in self.names}
        self.stale = set(self.names if hooks.stale is None else hooks.stale)
        self.sharing = Sharing(hooks.ranks, self.costs, is_bound=not hooks.out_of_core)
        budget = 0 if hooks.out_of_core else KEPT * problem.size()
        self.gains = hooks.gains or Gains(
            problem.a, problem.b, problem.spec, budget, in_blocks=hooks.in_blocks
        )
        self.unkept = Gains(problem.a, problem.b, problem.spec, 0, in_blocks=hooks.in_blocks)
        self.kept: set[str] | None = None
        self.unmoved = UnmovedGains()
        waits = not (hooks.ranks.is_group or hooks.out_of_core or hooks.in_blocks)
        self.solver = GainSolver(plain_solver(problem.spec), waits=waits)
        if hooks.ranks.is_group:  # which gains are kept must not depend on which groups this rank solves
            self.kept = problem.within(budget)
            self.gains.budget = sys.maxsize
        self.states = [x for x in (problem.a, problem.b) if isinstance(x, HeldState)]
        self.placement: Placement | None = None
        self.at_hand: str | None = None
        """The group whose tensors are in memory, if they are on disk otherwise."""
        self.solutions: dict[str, Assignment] = {}
        self.order: list[str] = []
        self.objective = [self._objective()]
        self.sweeps = self.solves = self.skipped = 0

    def initialize_greedily(self, names: Collection[str]) -> None:
        """Match ``names`` one after the other as the first sweep; undo it if the objective falls."""
        before = self.permutations
        first = {step.group.name: step for step in greedy_order(self.problem, names)}
        levels = levels_of(first, self.problem.coupled, self.costs.__getitem__)
        if self.states:
            placed = {name: step for name, step in first.items() if step.axes}
            again = [name for name, step in placed.items() if not step.is_complete]
            self.placement = Placement(self.problem, self.unkept, placed, again, self.states)
        whole: dict[str, list[torch.Tensor]] = {}
        for name, found in progress_bar(
            self._visits(levels, {name: step.axes for name, step in first.items()}),
            "weight matching, sweep 1",
            show=self.progress,
            total=len(first),
        ):
            if first[name].is_complete:
                self.stale.discard(name)
            elif len(first[name].axes) == len(self.problem.axes(first[name].group)):
                whole[name] = self._around(name)
            if found is not None:
                self.permutations = {**self.permutations, **found.permutations}
        # A group that took all of its axes is at its best if those around it have stayed where they were.
        self.stale -= {
            name for name, then in whole.items() if all(map(torch.equal, then, self._around(name)))
        }
        self._let_go()
        self.skipped += len(self.names) - self.solves
        value = self._objective()
        if value < self.objective[0]:
            self.placement = None
            self.permutations, value, self.stale = before, self.objective[0], set(self.names)
        self._end_sweep(value)

    def sweep(self, order: Sequence[str]) -> None:
        """Visit the groups in ``order``, by its levels, and solve those that are stale."""
        rises: dict[str, float] = {}
        steps = self._visits(levels_of(order, self.problem.coupled, self.costs.__getitem__), None)
        title = f"weight matching, sweep {self.sweeps + 1}"
        for name, found in progress_bar(steps, title, show=self.progress, total=len(order)):
            if found is not None and found.value > self.threshold:
                self.permutations = {**self.permutations, **found.permutations}
                rises[name] = found.value
                self.stale |= self.problem.coupled(name)
                if name in self.problem.self_coupled:
                    self.stale.add(name)
        self._let_go()
        self.placement = None
        value = self.objective[-1]
        for name in order:  # a sum in another order has other last bits
            value += rises.get(name, 0.0)
        self._end_sweep(value)

    def outcome(self, matcher: str) -> Matching:
        """Return the result under the name of the matcher."""
        return Matching(
            permutations=self.permutations,
            matcher=matcher,
            objective=tuple(self.objective),
            sweeps=self.sweeps,
            solves=self.solves,
            skipped=self.skipped,
            converged=not self.stale,
            gaps={name: (found.gap, found.gap_bound) for name, found in self.solutions.items()},
            order=tuple(self.order),
        )

    def _objective(self) -> float:
        return self.hooks.remembered("", lambda: Step(value=self.problem.value(self.permutations))).value

    def _visits(
        self, levels: Sequence[Sequence[str]], first: Mapping[str, Sequence[Axis]] | None
    ) -> Iterator[tuple[str, Step | None]]:
        """Yield every group with its step; None for groups that need none.

        The caller takes in a step before it asks for the next, so a level sees those before it.

        Args:
            levels: the groups to visit.
            first: group -> the axes of its first match, which is not measured; None to solve those that are stale.
        """
        for level in levels:
            due: dict[str, Sequence[Axis]] = {}
            for name in level:
                if first is not None:
                    axes = first[name]
                elif name in self.stale:
                    self.stale.discard(name)
                    axes = self.problem.axes(self.problem.spec.groups[name])
                else:
                    self.skipped += 1
                    axes = []
                if axes:
                    due[name] = axes
                else:  # it has not moved, or none of its tensors enters the gain
                    yield name, None
            yield from zip(due, self._steps(due, is_measured=first is None), strict=True)

    def _steps(self, due: Mapping[str, Sequence[Axis]], *, is_measured: bool) -> Iterator[Step]:
        """Yield the step of each of these groups, which share no tensor, with its rise if ``is_measured``."""

        def compute(name: str) -> Step:
            group = self.problem.spec.groups[name]
            if self.states:
                hold(self.states, [axis.parameter for axis in due[name]], group.size)
                self.at_hand = name
            return measured(self._solve(group, due[name]), None)

        def jointly(name: str) -> Step:
            return self._solve_jointly(self.problem.spec.groups[name], due[name], measured)

        def measured(found: Step, owners: Mapping[str, int] | None) -> Step:
            rise = self.problem.change(found.permutations, self.permutations, owners) if is_measured else 0.0
            return replace(found, value=rise)

        divided = {name: partial(jointly, name) for name in due if self._is_divisible(name, due[name])}
        for name, shared in self.sharing.of(list(due), compute, divided):
            found = self.hooks.remembered(name, shared)
            self.solves += 1
            self.order.append(name)
            if found.solution is not None:
                self.solutions[name] = found.solution
            yield found
            if self.placement is not None and not is_measured:
                is_at_hand = self.at_hand == name and not self.hooks.ranks.is_group
                self.placement.placed(name, self.permutations, is_at_hand=is_at_hand)

    def _is_divisible(self, name: str, axes: Sequence[Axis]) -> bool:
        """Return whether all ranks multiply this group's gain, if it is the only one that they have to solve."""
        group, gains = self.problem.spec.groups[name], self.unkept
        return (
            self.hooks.in_blocks
            and self.hooks.ranks.size > 1
            and len(self.problem.grouping[name]) == 1
            and name not in self.problem.bonus
            and gains.suits_bounds(group, axes)
            and len(gains.blocks(group, axes)) > 1
        )

    def _solve_jointly(
        self,
        group: Group,
        axes: Sequence[Axis],
        measured: Callable[[Step, Mapping[str, int] | None], Step],
    ) -> Step:
        """Return the step of a group whose gain all ranks multiply.

        ``measured`` adds the rise: from the ranks that own the tensors, or by this rank alone if there are no owners.

        A gain for which bounds pay is left to rank 0, because its products take less than reading the tensors.
        """
        ranks, gains, what = self.hooks.ranks, self.unkept, f"group {group.name}"
        blocks = gains.blocks(group, axes)
        owners = {
            axis.parameter: owner
            for block, owner in zip(blocks, owners_of(blocks, ranks.size), strict=True)
            for axis in block
        }

        def bounded() -> BoundedGain | None:
            hold(self.states, list(owners), group.size)
            found = self._gathered(group, axes)
            return gains.bounded(group, axes, self.permutations) if found is None else found

        gain = bounded() if ranks.rank == 0 else None
        if ranks.broadcast(lambda: gain is not None, what):
            return ranks.broadcast(
                lambda: measured(self._solved(group, cast("BoundedGain", gain)), None), what
            )
        hold(self.states, [p for p, owner in owners.items() if owner == ranks.rank], group.size)
        whole = gains.in_blocks(blocks, group, self.permutations, ranks)
        found = ranks.broadcast(lambda: self._solved(group, cast("torch.Tensor", whole)), what)
        return measured(found, owners)

    def _solve(self, group: Group, axes: Sequence[Axis]) -> Step:
        name, problem = group.name, self.problem
        if len(problem.grouping[name]) > 1:
            arguments = problem.a, problem.b, problem.spec, name, axes, self.permutations
            return Step(match_nested(*arguments, self.unmoved))
        gains = self.gains if self.kept is None or name in self.kept else self.unkept
        if name in problem.bonus:
            gain = gains.of(group, axes, self.permutations)
            gain = gain + problem.bonus[name].to(gain)
        else:
            gain = self._gathered(group, axes)
            if gain is None:
                gain = gains.cost_of(group, axes, self.permutations)
        return self._solved(group, gain)

    def _solved(self, group: Group, gain: torch.Tensor | BoundedGain) -> Step:
        """Solve the assignment of a group's gain."""
        name = group.name
        before = self.solutions.get(name)
        if isinstance(gain, BoundedGain):
            solution = solve(gain, maximize=True, warm_start=self.solver.by_kernels(name, before))
            self.gains.spend(name, gain.share)
        else:
            solution = self.solver.solve(name, gain, before)
        return Step({name: torch.from_numpy(solution.col_ind)}, solution)

    def _gathered(self, group: Group, axes: Sequence[Axis]) -> BoundedGain | None:
        """The gain that the placement has gathered, if there is one."""
        return None if self.placement is None else self.placement.gain_of(group, axes, self.permutations)

    def _let_go(self) -> None:
        """Hold no tensors of states on disk."""
        for state in self.states:
            state.want(())

    def _around(self, name: str) -> list[torch.Tensor]:
        """The permutations that the gain of a group depends on, now."""
        names = self.problem.coupled(name) | ({name} & self.problem.self_coupled)
        return [
            self.permutations[member] for group in sorted(names) for member in self.problem.grouping[group]
        ]

    def _end_sweep(self, value: float) -> None:
        self.sweeps += 1
        self.objective.append(value)
