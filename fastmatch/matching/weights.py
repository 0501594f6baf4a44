"""Weight matching: coordinate ascent over permutation groups (Git Re-Basin, Ainsworth et al. 2022, section 3.2).

The objective is the inner product of A's and the permuted B's parameters. For one group, with all others
held, it is linear in the permutation: a gain matrix, the sum over the group's (tensor, axis) pairs of
``A_rows @ B_rows.T``, and a linear assignment problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fastmatch.assignment import Assignment, solve
from fastmatch.matching.gains import Gains, unit_rows
from fastmatch.permute import check_permutations, permute_tensor
from fastmatch.progress import progress_bar
from fastmatch.spec import Axis, Group, Permutations, PermutationSpec
from fastmatch.states import State, check_spec

__all__ = ["INCLUDE", "Matching", "match_weights", "objective"]

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
    total = 0.0
    for name in {axis.parameter for g in spec.groups.values() for axis in g.axes}:
        if included(name, a[name], include):
            moved = permute_tensor(b[name], name, spec, permutations)
            total += _inner(a[name], moved)
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
    self_coupled: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for group in self.spec.groups.values():
            names = [axis.parameter for axis in self.axes(group)]
            if len(names) != len(set(names)):
                self.self_coupled.add(group.name)

    def axes(self, group: Group) -> list[Axis]:
        return [x for x in group.axes if included(x.parameter, self.a[x.parameter], self.include)]

    def size(self) -> int:
        """Bytes of A that enter the gains, in float32."""
        names = {x.parameter for group in self.spec.groups.values() for x in self.axes(group)}
        return 4 * sum(self.a[name].numel() for name in names)

    def improvement(self, group: Group, new: torch.Tensor) -> float:
        """What the objective gains by moving ``group`` to ``new``, exact to float64 rounding."""
        old = self.permutations[group.name]
        if group.name in self.self_coupled:
            # Both axes of one tensor move with this group: the gain matrix is only a linearisation.
            names = sorted({axis.parameter for axis in self.axes(group)})
            moved = {**self.permutations, group.name: new}
            return sum(self._inner(n, moved) - self._inner(n, self.permutations) for n in names)
        # Only the units that move, in float64: float32 gains alone could promise progress that is rounding.
        units = torch.nonzero(new != old).flatten()
        total = 0.0
        for axis in self.axes(group):
            features = self.a[axis.parameter].numel() // group.size
            for part in units.split(max(1, PIECE // features)):
                total += self._step(axis, group.size, part, old[part], new[part])
        return total

    def _step(
        self, axis: Axis, size: int, units: torch.Tensor, old: torch.Tensor, new: torch.Tensor
    ) -> float:
        """The inner product of A's ``units`` with B's ``new`` minus its ``old``, on one axis."""
        a, b = self.a[axis.parameter], self.b[axis.parameter]
        if axis.is_whole(size, a.shape[axis.dim]):
            b = (
                b.index_select(axis.dim, new.to(b.device)).double()
                - b.index_select(axis.dim, old.to(b.device)).double()
            )
            b = permute_tensor(b, axis.parameter, self.spec, self.permutations, skip=axis)
            a = a.index_select(axis.dim, units.to(a.device)).double()
            return float(torch.dot(a.flatten(), b.to(a.device).flatten()))
        b = permute_tensor(b, axis.parameter, self.spec, self.permutations, skip=axis)
        rows = unit_rows(b, axis, size, torch.float64)
        step = (rows[new] - rows[old]).to(a.device)
        return float(torch.dot(unit_rows(a, axis, size, torch.float64)[units].flatten(), step.flatten()))

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
    progress: bool | None = None,
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
        progress: show a bar; None shows it on a terminal.

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
    check_spec(spec, a, "model_a")
    check_spec(spec, b, "model_b")
    problem = _Problem(a, b, spec, include, check_permutations(start or {}, spec, "start"))
    gains = Gains(a, b, spec, budget=KEPT * problem.size())
    names = list(spec.groups)
    threshold = tolerance * _scale(problem)
    generator = np.random.default_rng(seed)
    orders = orders or (generator.permutation(len(names)).tolist() for _ in range(max_sweeps))
    current = objective(a, b, spec, problem.permutations, include)
    trace = [current]
    stale = set(names)
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


def _scale(problem: _Problem) -> float:
    """Norm of A's times norm of B's parameters in the objective: the largest value it could take."""
    squares = [0.0, 0.0]
    for name in {x.parameter for g in problem.spec.groups.values() for x in problem.axes(g)}:
        for k, state in enumerate((problem.a, problem.b)):
            squares[k] += _inner(state[name], state[name])
    return (squares[0] * squares[1]) ** 0.5
