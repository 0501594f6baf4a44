"""Weight matching: coordinate ascent over permutation groups (Git Re-Basin, Ainsworth et al. 2022, section 3.2).

The objective is the inner product of A's and the permuted B's parameters. For one group, with all others
held, it is linear in the permutation: a gain matrix, the sum over the group's (tensor, axis) pairs of
``A_rows @ B_rows.T``, and a linear assignment problem.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from fastmatch.assignment import Assignment, solve
from fastmatch.permute import check_permutations, permute_tensor
from fastmatch.progress import progress_bar
from fastmatch.spec import Axis, Group, Permutations, PermutationSpec
from fastmatch.states import State, check_spec, headers_of

__all__ = ["INCLUDE", "Matching", "match_weights", "objective", "weight_scale"]

INCLUDE = ("weights", "affine", "statistics")
"""What enters the gain, each adding to the one before: matrices and kernels; biases, norm scales and
shifts (Git Re-Basin's choice); running statistics of batch norm (some published ports)."""

CHUNK = 64
"""Rows at a time in float64, so that the copies stay in the processor's cache."""

BLOCK = 1 << 23
"""Numbers of a streamed tensor in one piece: its float32 or float64 copies stay small beside it."""

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


def _rows(tensor: torch.Tensor, axis: Axis, size: int, dtype: torch.dtype) -> torch.Tensor:
    """The (size, features) matrix of one axis: everything that belongs to unit i, in row i."""
    front = tensor.to(dtype).movedim(axis.dim, 0)
    if axis.is_whole(size, front.shape[0]):
        return front.reshape(size, -1)
    picked = front[axis.positions(size).to(tensor.device)]  # (outer, size, inner, rest...)
    return picked.movedim(1, 0).reshape(size, -1)


def objective(a: State, b: State, spec: PermutationSpec, permutations: Permutations, include: str) -> float:
    """Inner product of A's and the permuted B's parameters that the spec moves, in float64."""
    total, headers = 0.0, headers_of(a)
    for name in {axis.parameter for g in spec.groups.values() for axis in g.axes}:
        if included(name, headers[name], include):
            total += _inner(a[name], permute_tensor(b[name], name, spec, permutations))
    return total


def _inner(a: torch.Tensor, b: torch.Tensor) -> float:
    """Inner product in float64, piece by piece."""
    pieces = zip(a.reshape(-1).split(BLOCK), b.reshape(-1).split(BLOCK), strict=True)
    return sum(float(torch.dot(x.double(), y.to(x.device).double())) for x, y in pieces)


def _pieces(a: torch.Tensor, b: torch.Tensor, axis: Axis) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both tensors cut alike across their longest dimension but the axis's own."""
    others = [d for d in range(a.ndim) if d != axis.dim]
    if not others or a.numel() <= BLOCK:
        yield a, b
        return
    dim = max(others, key=lambda d: a.shape[d])
    step = max(1, BLOCK * a.shape[dim] // a.numel())
    yield from zip(a.split(step, dim), b.split(step, dim), strict=True)


class _Streamed:
    """A group's pairs of rows, read and permuted afresh each time they are gone through."""

    def __init__(self, problem: _Problem, group: Group) -> None:
        self.problem, self.group = problem, group

    def __bool__(self) -> bool:
        return bool(self.problem.axes(self.group))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self.problem.pairs(self.group, streamed=True)


@dataclass
class _Problem:
    """Everything one weight matching holds: the two networks, the spec, and the permutations so far."""

    a: State
    b: State
    spec: PermutationSpec
    include: str
    permutations: Permutations
    bonus: Mapping[str, torch.Tensor] = field(default_factory=dict)
    streamed: bool = False
    self_coupled: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for group in self.spec.groups.values():
            names = [axis.parameter for axis in self.axes(group)]
            if len(names) != len(set(names)):
                self.self_coupled.add(group.name)

    def axes(self, group: Group) -> list[Axis]:
        headers = headers_of(self.a)
        return [x for x in group.axes if included(x.parameter, headers[x.parameter], self.include)]

    def rows(self, group: Group) -> Collection[tuple[torch.Tensor, torch.Tensor]] | _Streamed:
        """The group's pairs of rows: held, or read again at every use where the networks are streamed."""
        return _Streamed(self, group) if self.streamed else list(self.pairs(group))

    def pairs(self, group: Group, *, streamed: bool = False) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Per axis the (n, features) matrices of A and B, B's other axes permuted; vectors joined in one."""
        vectors_a, vectors_b = [], []
        for axis in self.axes(group):
            a, b = self.a[axis.parameter], self.b[axis.parameter]
            dtype = torch.float64 if a.dtype == b.dtype == torch.float64 else torch.float32
            b = permute_tensor(b, axis.parameter, self.spec, self.permutations, skip=axis)
            for part_a, part_b in _pieces(a, b, axis) if streamed else [(a, b)]:
                rows_a = _rows(part_a, axis, group.size, dtype)
                rows_b = _rows(part_b, axis, group.size, dtype).to(rows_a.device)
                if rows_a.shape[1] == 1:
                    vectors_a.append(rows_a)
                    vectors_b.append(rows_b)
                else:
                    yield rows_a, rows_b
        if vectors_a:
            yield torch.cat(vectors_a, dim=1), torch.cat(vectors_b, dim=1)

    def gain_of(self, group: Group, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        gain = torch.zeros(group.size, group.size)
        for rows_a, rows_b in pairs:
            gain = gain.to(device=rows_a.device, dtype=torch.promote_types(gain.dtype, rows_a.dtype))
            gain.addmm_(rows_a.to(gain.dtype), rows_b.to(gain.dtype).T)
        if group.name in self.bonus:
            gain += self.bonus[group.name].to(gain)
        return gain

    def bonus_of(self, name: str, permutation: torch.Tensor) -> float:
        """What the permutation of one group earns beside the weights."""
        if name not in self.bonus:
            return 0.0
        matrix = self.bonus[name]
        return float(matrix.double().gather(1, permutation.to(matrix.device)[:, None]).sum())

    def improvement(
        self, group: Group, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], new: torch.Tensor
    ) -> float:
        """What the objective gains by moving ``group`` to ``new``, exact to float64 rounding."""
        old = self.permutations[group.name]
        earned = self.bonus_of(group.name, new) - self.bonus_of(group.name, old)
        if group.name in self.self_coupled:
            # Both axes of one tensor move with this group: the gain matrix is only a linearisation.
            names = sorted({axis.parameter for axis in self.axes(group)})
            moved = {**self.permutations, group.name: new}
            return earned + sum(self._inner(n, moved) - self._inner(n, self.permutations) for n in names)
        # Only the rows that move, in float64: float32 gains alone could promise progress that is rounding.
        total = earned
        moving = torch.nonzero(new != old).flatten()
        if not len(moving):  # nothing to read again
            return total
        for a, b in pairs:
            for rows in moving.split(CHUNK):
                step = b[new[rows]].double().sub_(b[old[rows]])
                total += float(torch.linalg.vecdot(a[rows].double(), step).sum())
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
        max_sweeps: give up after so many.
        tolerance: least progress, relative to the product of the norms of A's and B's parameters.
        include: what enters the gain, see :data:`INCLUDE`.
        bonus: group name -> (size, size) matrix added to the group's gain and, over its matched units, to
            the objective.
        progress: show a bar; None shows it on a terminal.
        streamed: read a group's tensors again at each use, one at a time and in pieces, instead of holding
            them: for states that lie on disk.
        stale: the groups to solve at first, with ``start`` of an interrupted run; all where left out.
        on_solve: called after each solve with the group's name, all permutations and the groups still stale.

    Returns:
        A :class:`Matching`; ``objective`` has one entry before the first sweep and one after each.

    Raises:
        ValueError: a tensor of the spec is missing or of another shape, or an argument is out of range.

    Cost per solve of a group of n units with d parameters each: 2 n^2 d operations for the gain and one
    n x n assignment problem; memory n^2 beside the two models.
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
    start = check_permutations(start or {}, spec, "start")
    problem = _Problem(a, b, spec, include, start, bonus or {}, streamed)
    names = list(spec.groups)
    threshold = tolerance * weight_scale(a, b, spec, include)
    generator = np.random.default_rng(seed)
    current = objective(a, b, spec, problem.permutations, include)
    current += sum(problem.bonus_of(name, perm) for name, perm in problem.permutations.items())
    trace = [current]
    stale = set(names if stale is None else stale)
    solved: dict[str, Assignment] = {}
    solves = skipped = sweeps = 0
    while stale and sweeps < max_sweeps:
        order = [names[i] for i in generator.permutation(len(names))]
        for name in progress_bar(order, f"weight matching, sweep {sweeps + 1}", show=progress):
            if name not in stale:
                skipped += 1
                continue
            stale.discard(name)
            group = spec.groups[name]
            pairs = problem.rows(group)
            if not pairs:  # nothing of this group enters the gain
                continue
            solved[name] = solve(problem.gain_of(group, pairs), maximize=True, warm_start=solved.get(name))
            new = torch.from_numpy(solved[name].col_ind)
            solves += 1
            gained = problem.improvement(group, pairs, new)
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
