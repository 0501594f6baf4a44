"""Weight matching: coordinate ascent over permutation groups (Git Re-Basin, Ainsworth et al. 2022, section 3.2).

The objective is the inner product of A's and the permuted B's parameters. For one group, with all others
held, it is linear in the permutation: a gain matrix, the sum over the group's (tensor, axis) pairs of
``A_rows @ B_rows.T``, and a linear assignment problem.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fastmatch.assignment import Assignment, solve
from fastmatch.matching.gains import Gains, unit_rows
from fastmatch.permute import check_permutations, permute_tensor
from fastmatch.progress import progress_bar
from fastmatch.spec import Axis, Group, Permutations, PermutationSpec
from fastmatch.states import State, check_spec, headers_of

__all__ = ["INCLUDE", "Matching", "match_weights", "objective", "weight_scale"]

INCLUDE = ("weights", "affine", "statistics")
"""What enters the gain, each adding to the one before: matrices and kernels; biases, norm scales and
shifts (Git Re-Basin's choice); running statistics of batch norm (some published ports)."""

PIECE = 1 << 20
"""Numbers at a time in float64: the copies stay near the processor, and few operations wait for their threads."""

KEPT = 2
"""Gains kept between solves, at most, in sizes of one model: as much as both models together."""

RUNNING_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Matching:
    """The outcome of a matching.

    Attributes:
        permutations: group name -> LongTensor, ``new_b[i] = b[perm[i]]``.
        method: ``"weights"`` or ``"activations"``.
        objective: the objective before the first sweep and after every sweep (weights; float64 sums), or
            the summed similarity of the matched units before and after (activations).
        sweeps: passes over the groups.
        solves: assignment problems solved.
        skipped: solves left out because no neighbour had moved since.
        converged: no group can improve any more by itself.
    """

    permutations: Permutations
    method: str
    objective: tuple[float, ...]
    sweeps: int = 1
    solves: int = 0
    skipped: int = 0
    converged: bool = True


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
            total += _inner(a[name], permute_tensor(b[name], name, spec, permutations))
    return total


def _inner(a: torch.Tensor, b: torch.Tensor) -> float:
    """The inner product in float64, a piece at a time so that the copies stay in the processor's cache."""
    pairs = zip(a.flatten().split(PIECE), b.to(a.device).flatten().split(PIECE), strict=True)
    return sum(float(torch.dot(x.double(), y.double())) for x, y in pairs)


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

    def __post_init__(self) -> None:
        for group in self.spec.groups.values():
            names = [axis.parameter for axis in self.axes(group)]
            if len(names) != len(set(names)):
                self.self_coupled.add(group.name)

    def axes(self, group: Group) -> list[Axis]:
        headers = headers_of(self.a)
        return [x for x in group.axes if included(x.parameter, headers[x.parameter], self.include)]

    def size(self) -> int:
        """Bytes of A that enter the gains, in float32."""
        headers = headers_of(self.a)
        names = {x.parameter for group in self.spec.groups.values() for x in self.axes(group)}
        return 4 * sum(headers[name].numel() for name in names)

    def bonus_of(self, name: str, permutation: torch.Tensor) -> float:
        """What the permutation of one group earns beside the weights."""
        if name not in self.bonus:
            return 0.0
        matrix = self.bonus[name]
        return float(matrix.double().gather(1, permutation.to(matrix.device)[:, None]).sum())

    def improvement(self, group: Group, new: torch.Tensor) -> float:
        """What the objective gains by moving ``group`` to ``new``, exact to float64 rounding."""
        old = self.permutations[group.name]
        earned = self.bonus_of(group.name, new) - self.bonus_of(group.name, old)
        if group.name in self.self_coupled:
            # Both axes of one tensor move with this group: the gain matrix is only a linearisation.
            names = sorted({axis.parameter for axis in self.axes(group)})
            moved = {**self.permutations, group.name: new}
            return earned + sum(self._inner(n, moved) - self._inner(n, self.permutations) for n in names)
        # Only the units that move, in float64: float32 gains alone could promise progress that is rounding.
        units = torch.nonzero(new != old).flatten()
        if not len(units):  # nothing to read again
            return earned
        return earned + sum(self._step(axis, group.size, units, old, new) for axis in self.axes(group))

    def _step(
        self, axis: Axis, size: int, units: torch.Tensor, old: torch.Tensor, new: torch.Tensor
    ) -> float:
        """The inner product of A's ``units`` with B's ``new`` minus its ``old`` ones, on one axis."""
        a, b = self.a[axis.parameter], self.b[axis.parameter]
        whole, total = axis.is_whole(size, a.shape[axis.dim]), 0.0
        if not whole:
            b = permute_tensor(b, axis.parameter, self.spec, self.permutations, skip=axis)
        for part in units.split(max(1, PIECE * size // a.numel())):
            if whole:
                rows = a.index_select(axis.dim, part.to(a.device)).double()
                step = b.index_select(axis.dim, new[part].to(b.device)).double()
                step -= b.index_select(axis.dim, old[part].to(b.device)).double()
                step = permute_tensor(step, axis.parameter, self.spec, self.permutations, skip=axis)
            else:
                rows = unit_rows(a, axis, size, torch.float64, part)
                step = unit_rows(b, axis, size, torch.float64, new[part])
                step -= unit_rows(b, axis, size, torch.float64, old[part])
            total += float(torch.dot(rows.flatten(), step.to(rows.device).flatten()))
        return total

    def _inner(self, name: str, permutations: Permutations) -> float:
        return _inner(self.a[name], permute_tensor(self.b[name], name, self.spec, permutations))


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

    Each sweep visits the groups in a fresh random order. A group is solved again only if a group that
    shares a tensor with it has moved since its last solve; a solution is kept only if the objective,
    recomputed in float64 over the rows that move, rises by more than the tolerance. So the objective never
    falls and the loop ends by itself.

    Args:
        a, b: state dicts of the same architecture; A is the reference. Half precision is matched in float32.
        spec: which axes move together.
        start: permutations to start from; the identity where left out.
        seed: of the order of groups: ``numpy.random.default_rng(seed).permutation(n_groups)`` per sweep.
        orders: yields the order of groups of every sweep, instead of the seed; where it ends, the ascent does.
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
    names = list(spec.groups)
    threshold = tolerance * weight_scale(a, b, spec, include)
    generator = np.random.default_rng(seed)
    orders = orders or (generator.permutation(len(names)).tolist() for _ in range(max_sweeps))
    current = objective(a, b, spec, problem.permutations, include)
    current += sum(problem.bonus_of(name, perm) for name, perm in problem.permutations.items())
    trace = [current]
    stale = set(names if stale is None else stale)
    solved: dict[str, Assignment] = {}
    solves = skipped = sweeps = 0
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
            gain = gains.of(group, axes, problem.permutations)
            if name in problem.bonus:
                gain = gain + problem.bonus[name].to(gain)
            solved[name] = solve(gain, maximize=True, warm_start=solved.get(name))
            new = torch.from_numpy(solved[name].col_ind)
            solves += 1
            gained = problem.improvement(group, new)
            if gained > threshold:
                problem.permutations[name] = new
                current += gained
                stale |= spec.neighbours(name)
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
            squares[k] += _inner(tensor, tensor)
    return (squares[0] * squares[1]) ** 0.5
