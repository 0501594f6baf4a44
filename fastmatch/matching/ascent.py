"""Coordinate ascent on the weight objective: one group is solved at a time, all others held.

For one group the objective is linear in the permutation. Its gain is the sum over the group's (tensor, axis) pairs of
``A_rows @ B_rows.T``, and the best permutation is the solution of a linear assignment problem.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fastmatch._internal.progress import progress_bar
from fastmatch.assignment import Assignment, solve
from fastmatch.assignment.bounded_gain import BoundedGain
from fastmatch.matching.device_gain import gain_solver
from fastmatch.matching.gains import Gains
from fastmatch.matching.greedy import greedy_order
from fastmatch.matching.nested import match_nested
from fastmatch.matching.objective import WeightObjective
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
        stale: the groups to solve first, if all others are known to be at their best; all of them for None.
        remembered: called for every costly step with its name and the function that computes it. It returns the step:
            computed now, or by an interrupted run whose steps are repeated. A run whose steps are all given back as they
            were takes the same way, so it ends in the same permutations.
    """

    bonus: Mapping[str, torch.Tensor] = field(default_factory=dict)
    orders: Iterator[Sequence[int]] | None = None
    out_of_core: bool = False
    stale: Collection[str] | None = None
    remembered: Callable[[str, Callable[[], Step]], Step] = lambda name, compute: compute()


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
        self.stale = set(self.names if hooks.stale is None else hooks.stale)
        budget = 0 if hooks.out_of_core else KEPT * problem.size()
        self.gains = Gains(problem.a, problem.b, problem.spec, budget)
        self.solutions: dict[str, Assignment] = {}
        self.objective = [self._objective()]
        self.sweeps = self.solves = self.skipped = 0

    def initialize_greedily(self, names: Collection[str]) -> None:
        """Match ``names`` one after the other as the first sweep; undo it if the objective falls."""
        before = self.permutations
        steps = greedy_order(self.problem, names)
        for step in progress_bar(steps, "weight matching, sweep 1", show=self.progress):
            if step.is_complete:
                self.stale.discard(step.group.name)
            if step.axes:
                found = self._step(step.group, step.axes, is_measured=False)
                self.permutations = {**self.permutations, **found.permutations}
        self.skipped += len(self.names) - self.solves
        value = self._objective()
        if value < self.objective[0]:
            self.permutations, value, self.stale = before, self.objective[0], set(self.names)
        self._end_sweep(value)

    def sweep(self, order: Sequence[str]) -> None:
        """Visit the groups in ``order`` and solve those that are stale."""
        value = self.objective[-1]
        for name in progress_bar(order, f"weight matching, sweep {self.sweeps + 1}", show=self.progress):
            if name not in self.stale:
                self.skipped += 1
                continue
            self.stale.discard(name)
            group = self.problem.spec.groups[name]
            axes = self.problem.axes(group)
            if not axes:  # none of the group's tensors enters the gain
                continue
            found = self._step(group, axes, is_measured=True)
            if found.value > self.threshold:
                self.permutations = {**self.permutations, **found.permutations}
                value += found.value
                self.stale |= self.problem.coupled(name)
                if name in self.problem.self_coupled:
                    self.stale.add(name)
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
        )

    def _objective(self) -> float:
        return self.hooks.remembered("", lambda: Step(value=self.problem.value(self.permutations))).value

    def _step(self, group: Group, axes: Sequence[Axis], *, is_measured: bool) -> Step:
        """The best permutations of a group and its subgroups, all others held; with the rise if ``is_measured``."""

        def compute() -> Step:
            found = self._solve(group, axes)
            rise = self.problem.change(found.permutations, self.permutations) if is_measured else 0.0
            return replace(found, value=rise)

        self.solves += 1
        found = self.hooks.remembered(group.name, compute)
        if found.solution is not None:
            self.solutions[group.name] = found.solution
        return found

    def _solve(self, group: Group, axes: Sequence[Axis]) -> Step:
        name, problem = group.name, self.problem
        if len(problem.grouping[name]) > 1:
            return Step(match_nested(problem.a, problem.b, problem.spec, name, axes, self.permutations))
        if name in problem.bonus:
            gain = self.gains.of(group, axes, self.permutations)
            gain = gain + problem.bonus[name].to(gain)
        else:
            gain = self.gains.cost_of(group, axes, self.permutations)
        solver = gain_solver(gain) if isinstance(gain, torch.Tensor) else None
        solution = solve(gain, maximize=True, warm_start=self.solutions.get(name), solver=solver)
        if isinstance(gain, BoundedGain):
            self.gains.spend(name, gain.share)
        return Step({name: torch.from_numpy(solution.col_ind)}, solution)

    def _end_sweep(self, value: float) -> None:
        self.sweeps += 1
        self.objective.append(value)
