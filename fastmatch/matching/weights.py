"""Weight matching: coordinate ascent over permutation groups (Git Re-Basin, Ainsworth et al. 2022, section 3.2).

The objective is the inner product of A's and the permuted B's parameters. For one group, with all others
held, it is linear in the permutation: a gain matrix, the sum over the group's (tensor, axis) pairs of
``A_rows @ B_rows.T``, and a linear assignment problem.

The ascent begins where a first pass over the groups places them: one after the other, each by those of its tensors
whose other axes are placed already. What an unmatched neighbour would add to a gain is noise; without it the ascent
ends higher and after a fraction of the solves (docs/matching.md has figures).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fastmatch._internal.progress import progress_bar
from fastmatch._internal.states import State, headers_of
from fastmatch.assignment import Assignment, solve
from fastmatch.matching.gains import Gains
from fastmatch.matching.inner import change_of_inner, inner
from fastmatch.matching.nested import match_nested
from fastmatch.permutations.alignment import Matching
from fastmatch.permutations.apply import check_permutations, dimension_indices, permute_tensor
from fastmatch.spec import Axis, Group, Permutations, PermutationSpec
from fastmatch.spec.checks import check_spec

__all__ = ["INCLUDE", "match_weights", "objective", "weight_scale"]

INCLUDE = ("weights", "affine", "statistics")
"""What enters the gain, each adding to the one before: matrices and kernels; biases, norm scales and
shifts (Git Re-Basin's choice); running statistics of batch norm (some published ports)."""

KEPT = 2
"""Gains kept between solves, at most, in sizes of one model: as much as both models together."""

RUNNING_STATISTICS = ("running_mean", "running_var")


def included(name: str, tensor: torch.Tensor, include: str) -> bool:
    """Whether a tensor of the state dict enters the gain under ``include``."""
    if not tensor.is_floating_point():
        return False
    if name.rsplit(".", 1)[-1] in RUNNING_STATISTICS:
        return include == "statistics"
    return tensor.ndim >= 2 or include != "weights"


def objective(a: State, b: State, spec: PermutationSpec, permutations: Permutations, include: str) -> float:
    """Inner product of A's and the permuted B's parameters that the spec moves, in float64."""
    total, headers = 0.0, headers_of(a)
    for name in {axis.parameter for g in spec.groups.values() for axis in g.axes}:
        if included(name, headers[name], include):
            total += _inner(a, b, spec, name, permutations)
    return total


def _inner(a: State, b: State, spec: PermutationSpec, name: str, permutations: Permutations) -> float:
    """The inner product of one tensor of A's with the permuted B's."""
    if spec.has_slices(name):
        return inner(a[name], permute_tensor(b[name], name, spec, permutations), {})
    return inner(a[name], b[name], dimension_indices(name, spec, permutations))


@dataclass
class _Problem:
    """Everything one weight matching holds: the two networks, the spec, and the permutations so far."""

    a: State
    b: State
    spec: PermutationSpec
    include: str
    permutations: Permutations
    bonus: Mapping[str, torch.Tensor] = field(default_factory=dict)
    self_coupled: set[str] = field(default_factory=set)
    members: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for group in self.spec.groups.values():
            dims = {(axis.parameter, axis.dim) for axis in self.axes(group)}
            if len(dims) != len({name for name, _ in dims}):
                self.self_coupled.add(group.name)
            self.members.setdefault(self.root(group.name), []).append(group.name)

    def root(self, name: str) -> str:
        """The group that a group lies within, itself if none: the one that it is solved together with."""
        return self.spec.groups[name].within or name

    def coupled(self, root: str) -> set[str]:
        """The roots that share a tensor with ``root`` or a group within it, without itself."""
        names = {g for member in self.members[root] for g in self.spec.neighbours(member)}
        return {self.root(g) for g in names} - {root}

    def placement(self, unplaced: Collection[str]) -> list[tuple[Group, list[Axis], bool]]:
        """The order in which to place groups: (group, the axes to place it by, whether these are all it has).

        Next comes the group of which the largest share of numbers is known, the first of the spec where that ties:
        those in tensors that move otherwise only with groups that stand. Groups that hold others are placed by all they have.
        """
        headers = headers_of(self.a)
        partners: dict[str, list[tuple[Axis, int, set[str]]]] = {}
        for name in unplaced:
            partners[name] = []
            for axis in self.axes(self.spec.groups[name]):
                others = {
                    self.root(g)
                    for x, g in self.spec.axes_of(axis.parameter)
                    if self.root(g) != name or (g == name and x.dim != axis.dim)
                }
                partners[name].append((axis, headers[axis.parameter].numel(), others))
        waiting, result = dict.fromkeys(unplaced), []
        while waiting:
            known = {name: [x for x in partners[name] if x[2].isdisjoint(waiting)] for name in waiting}
            share = {
                name: sum(n for _, n, _ in known[name]) / max(1, sum(n for _, n, _ in partners[name]))
                for name in waiting
            }
            name = max(waiting, key=lambda n: share[n])
            del waiting[name]
            is_simple = len(self.members[name]) == 1
            by = known[name] if known[name] and is_simple else partners[name]
            result.append(
                (self.spec.groups[name], [x[0] for x in by], len(known[name]) == len(partners[name]))
            )
        return result

    def axes(self, group: Group) -> list[Axis]:
        headers = headers_of(self.a)
        return [x for x in group.axes if included(x.parameter, headers[x.parameter], self.include)]

    def size(self) -> int:
        """Bytes of A that enter the gains, in float32."""
        headers = headers_of(self.a)
        names = {x.parameter for group in self.spec.groups.values() for x in self.axes(group)}
        return 4 * sum(headers[name].numel() for name in names)

    def value(self) -> float:
        """The objective, what the bonuses earn included."""
        value = objective(self.a, self.b, self.spec, self.permutations, self.include)
        return value + sum(self.bonus_of(name, p) for name, p in self.permutations.items())

    def bonus_of(self, name: str, permutation: torch.Tensor) -> float:
        """What the permutation of one group earns beside the weights."""
        if name not in self.bonus:
            return 0.0
        matrix = self.bonus[name]
        return float(matrix.double().gather(1, permutation.to(matrix.device)[:, None]).sum())

    def improvement(self, new: Permutations) -> float:
        """What the objective gains by moving the groups of ``new`` to it, exact to float64 rounding.

        float32 gains alone could promise progress that is rounding, and are only a linearisation where both
        axes of one tensor move with the group.
        """
        changed = {name: p for name, p in new.items() if not torch.equal(p, self.permutations[name])}
        moved = {**self.permutations, **changed}
        total = 0.0
        for name, p in changed.items():
            total += self.bonus_of(name, p) - self.bonus_of(name, self.permutations[name])
        for name in sorted({x.parameter for group in changed for x in self.axes(self.spec.groups[group])}):
            if self.spec.has_slices(name):
                now, then = (_inner(self.a, self.b, self.spec, name, p) for p in (moved, self.permutations))
                total += now - then
            else:
                orders = (dimension_indices(name, self.spec, p) for p in (moved, self.permutations))
                total += change_of_inner(self.a[name], self.b[name], *orders)
        return total


def match_weights(
    a: State,
    b: State,
    spec: PermutationSpec,
    *,
    start: Mapping[str, torch.Tensor] | None = None,
    seed: int = 0,
    orders: Iterator[Sequence[int]] | None = None,
    max_sweeps: int = 100,
    tolerance: float = 1e-12,
    include: str = "affine",
    bonus: Mapping[str, torch.Tensor] | None = None,
    progress: bool | None = None,
    streamed: bool = False,
    stale: Collection[str] | None = None,
    on_solve: Callable[[str, Permutations, set[str]], None] | None = None,
) -> Matching:
    """Finds the permutations of B's hidden units under which its weights are closest to A's.

    The first sweep places the groups that ``start`` leaves out: most of it known first, each by the tensors whose
    other axes are placed already; should that end below where it began, it is undone. Every further sweep visits the
    groups in a fresh random order. A group is solved again only if a group that
    shares a tensor with it has moved since its last solve; a solution is kept only if the objective,
    recomputed in float64 over the rows that move, rises by more than the tolerance. So the objective never
    falls and the loop ends by itself.

    Args:
        a, b: state dicts of the same architecture; A is the reference. Half precision is matched in float32.
        spec: which axes move together.
        start: permutations to start from; groups left out are placed. ``spec.identity()`` begins as published.
        seed: of the order of groups: ``numpy.random.default_rng(seed).permutation(n_groups)`` per sweep.
        orders: yields the order of groups of every sweep, instead of the seed; where it ends, the ascent does.
            Then nothing is placed, and what ``start`` leaves out begins as the identity.
        max_sweeps: give up after so many.
        tolerance: least progress, relative to the product of the norms of A's and B's parameters.
        include: what enters the gain, see :data:`INCLUDE`.
        bonus: group name -> (size, size) matrix added to the group's gain and, over its matched units, to
            the objective.
        progress: show a bar; None shows it on a terminal.
        streamed: keep no gain between solves: for states that lie on disk and do not fit into memory.
        stale: the groups to solve at first, with ``start`` of an interrupted run; all where left out.
        on_solve: called after each solve with the group's name, all permutations and the groups still stale.

    Returns:
        A :class:`Matching`; ``objective`` has one entry before the first sweep and one after each.

    Raises:
        ValueError: a tensor of the spec is missing or of another shape, or an argument is out of range.

    Cost per solve of a group of n units with d parameters each: 2 n^2 d operations for the gain, less once few
    neighbours move, and one n x n assignment problem; memory n^2 beside the two models, and as much as
    both for gains that are kept.
    """
    import numpy as np

    if include not in INCLUDE:
        raise ValueError(f"include: expected one of {INCLUDE}, got {include!r}")
    if max_sweeps < 1:
        raise ValueError(f"max_sweeps: expected at least 1, got {max_sweeps}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance: expected a number of at least 0, got {tolerance}")
    check_spec(spec, headers_of(a), "model_a")
    check_spec(spec, headers_of(b), "model_b")
    problem = _Problem(a, b, spec, include, check_permutations(start or {}, spec, "start"), bonus or {})
    gains = Gains(a, b, spec, budget=0 if streamed else KEPT * problem.size())
    names = spec.top_level()
    threshold = tolerance * weight_scale(a, b, spec, include)
    generator = np.random.default_rng(seed)
    unplaced = [name for name in names if name not in (start or {})] if orders is None else []
    orders = orders or (generator.permutation(len(names)).tolist() for _ in range(max_sweeps))
    current = problem.value()
    trace = [current]
    stale = set(names if stale is None else stale)
    solved: dict[str, Assignment] = {}

    def solution(group: Group, axes: Sequence[Axis]) -> Permutations:
        name = group.name
        if len(problem.members[name]) > 1:
            return match_nested(a, b, spec, name, axes, problem.permutations)
        gain = gains.of(group, axes, problem.permutations)
        if name in problem.bonus:
            gain = gain + problem.bonus[name].to(gain)
        solved[name] = solve(gain, maximize=True, warm_start=solved.get(name))
        return {name: torch.from_numpy(solved[name].col_ind)}

    solves = skipped = sweeps = 0
    if unplaced:
        before = problem.permutations
        steps = problem.placement(unplaced)
        for group, axes, is_whole in progress_bar(steps, "weight matching, sweep 1", show=progress):
            if is_whole:
                stale.discard(group.name)
            if axes:
                problem.permutations = {**problem.permutations, **solution(group, axes)}
                solves += 1
            if on_solve is not None:
                on_solve(group.name, problem.permutations, stale)
        skipped, sweeps = len(names) - solves, 1
        current = problem.value()
        if current < trace[0]:
            problem.permutations, current, stale = before, trace[0], set(names)
            if on_solve is not None:
                for name in unplaced:
                    on_solve(name, problem.permutations, stale)
        trace.append(current)
    while stale and sweeps < max_sweeps:
        picks = next(orders, None)
        if picks is None:
            break
        order = [names[i] for i in picks]
        for name in progress_bar(order, f"weight matching, sweep {sweeps + 1}", show=progress):
            if name not in stale:
                skipped += 1
                continue
            stale.discard(name)
            group = spec.groups[name]
            axes = problem.axes(group)
            if not axes:  # nothing of this group enters the gain
                continue
            new = solution(group, axes)
            solves += 1
            gained = problem.improvement(new)
            if gained > threshold:
                problem.permutations |= new
                current += gained
                stale |= problem.coupled(name)
                if name in problem.self_coupled:
                    stale.add(name)
            if on_solve is not None:
                on_solve(name, problem.permutations, stale)
        sweeps += 1
        trace.append(current)
    return Matching(
        permutations=problem.permutations,
        method="weights",
        objective=tuple(trace),
        sweeps=sweeps,
        solves=solves,
        skipped=skipped,
        converged=not stale,
    )


def weight_scale(a: State, b: State, spec: PermutationSpec, include: str) -> float:
    """Norm of A's times norm of B's parameters in the objective: the largest value it could take."""
    problem = _Problem(a, b, spec, include, spec.identity())
    squares = [0.0, 0.0]
    for name in {x.parameter for g in spec.groups.values() for x in problem.axes(g)}:
        for k, state in enumerate((a, b)):
            tensor = state[name]
            squares[k] += inner(tensor, tensor, {})
    return (squares[0] * squares[1]) ** 0.5
