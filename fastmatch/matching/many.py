"""Several models into one order of units: to a reference, along a chain, to the mean, or through a universe.

``"mean"`` is MergeMany (Ainsworth et al. 2022, appendix A.11). ``"universe"`` maximises the inner products of all
pairs at once over one map a model into a shared order, by Frank-Wolfe (C2M3, Crisostomi et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from fastmatch._internal.progress import progress_bar
from fastmatch._internal.states import State
from fastmatch.assignment import linear_sum_assignment
from fastmatch.matching.weights import included, match_weights
from fastmatch.permutations.alignment import Matching
from fastmatch.permutations.apply import apply_permutations, compose, invert
from fastmatch.spec import Axis, Permutations, PermutationSpec

__all__ = ["anchored", "match_mean", "match_universe", "pair_objective"]

STEPS = 17
"""Points on the segment to the Frank-Wolfe vertex at which the objective is compared."""


def _moving(states: Sequence[State], spec: PermutationSpec, include: str) -> list[str]:
    """The tensors that some group moves and that enter the objective."""
    names = dict.fromkeys(axis.parameter for group in spec.groups.values() for axis in group.axes)
    return [name for name in names if included(name, states[0][name], include)]


def _pairs(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum over pairs p < q of the inner products ``<t_p, t_q>``."""
    total = torch.stack(list(tensors)).sum(dim=0)
    return (total.square().sum() - sum(t.square().sum() for t in tensors)) / 2


def pair_objective(
    states: Sequence[State], spec: PermutationSpec, permutations: Sequence[Permutations], include: str
) -> float:
    """Inner products of the permuted parameters, summed over all pairs of models, in float64."""
    moved = [apply_permutations(s, spec, p) for s, p in zip(states, permutations, strict=True)]
    return sum(float(_pairs([m[n].double() for m in moved])) for n in _moving(states, spec, include))


def match_mean(
    states: Sequence[State],
    spec: PermutationSpec,
    *,
    start: Sequence[Permutations] | None = None,
    seed: int = 0,
    max_rounds: int = 100,
    max_sweeps: int = 100,
    tolerance: float = 1e-12,
    include: str = "affine",
    progress: bool | None = None,
) -> tuple[list[Permutations], Matching]:
    """Matches each model to the mean of the rest, in random order, until a whole round moves nothing.

    A match to the mean of the rest raises the pairwise objective by as much as it raises its own, so the
    objective never falls and the rounds end by themselves; ``max_rounds`` caps them.

    Returns:
        One dict of permutations a model, and a :class:`Matching` of the last model with the pairwise
        objective before the first round and after each; ``converged`` is False where the cap ended it.
    """
    if max_rounds < 1:
        raise ValueError(f"max_rounds: expected at least 1, got {max_rounds}")
    current = list(start) if start is not None else [spec.identity() for _ in states]
    generator = np.random.default_rng(seed)
    trace = [pair_objective(states, spec, current, include)]
    solves = skipped = rounds = 0
    names = set(_moving(states, spec, include))
    moved = True
    while moved and rounds < max_rounds:
        moved = False
        order = [int(k) for k in generator.permutation(len(states))]
        for k in progress_bar(order, f"matching to the mean, round {rounds + 1}", show=progress):
            rest = [j for j in range(len(states)) if j != k]
            found = match_weights(
                _mean_of([states[j] for j in rest], spec, [current[j] for j in rest], names), states[k], spec,
                start=current[k], seed=int(generator.integers(2**31)), max_sweeps=max_sweeps,
                tolerance=tolerance, include=include, progress=False,
            )  # fmt: skip
            moved |= any(not torch.equal(p, current[k][g]) for g, p in found.permutations.items())
            current[k] = found.permutations
            solves, skipped = solves + found.solves, skipped + found.skipped
        rounds += 1
        trace.append(pair_objective(states, spec, current, include))
    outcome = Matching(current[-1], "mean", tuple(trace), rounds, solves, skipped, converged=not moved)
    return current, outcome


def _mean_of(
    states: Sequence[State], spec: PermutationSpec, permutations: Sequence[Permutations], names: set[str]
) -> dict[str, torch.Tensor]:
    """The mean in float64 of the tensors in ``names``; the first model's own for the others."""
    moved = [apply_permutations(s, spec, p) for s, p in zip(states, permutations, strict=True)]
    mean = dict(moved[0])
    for name in names:
        mean[name] = torch.stack([m[name].double() for m in moved]).mean(dim=0)
    return mean


def match_universe(
    states: Sequence[State],
    spec: PermutationSpec,
    *,
    seed: int = 0,
    max_steps: int = 50,
    max_sweeps: int = 100,
    tolerance: float = 1e-12,
    include: str = "affine",
    progress: bool | None = None,
) -> tuple[list[Permutations], Matching]:
    """Cycle-consistent matching: one map a model into a shared order, the universe, found by Frank-Wolfe.

    The maps are relaxed to doubly stochastic matrices. A step solves one assignment problem a model and
    group with the gradient as gain and goes to the best of :data:`STEPS` points towards that vertex, the
    present one among them: the relaxed objective never falls. At the end each map goes to its nearest
    permutation (or all to the identity, where that is better), and :func:`match_mean` improves what single
    models can still gain, groups that hold others among them: the universe keeps those in place.

    Returns:
        One dict of permutations a model, into the universe; a :class:`Matching` with the pairwise objective
        at the identity, after rounding and after each round of the improvement. It never falls.

    Memory: two n x n float64 matrices a model and group, and every model in float64.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps: expected at least 1, got {max_steps}")
    names = _moving(states, spec, include)
    tensors = [{n: s[n].double() for n in names} for s in states]
    flat = spec.flat()
    maps = [[torch.eye(g.size, dtype=torch.float64) for g in flat.groups.values()] for _ in states]
    solves = 0
    for _ in progress_bar(range(max_steps), "Frank-Wolfe", show=progress):
        value, gradients = _gradient(tensors, flat, maps)
        vertices = [[_vertex(g) for g in model] for model in gradients]
        solves += sum(map(len, vertices))
        points = [
            [_towards(m, v, t) for m, v in zip(maps, vertices, strict=True)]
            for t in torch.linspace(0, 1, STEPS, dtype=torch.float64)[1:].tolist()
        ]
        with torch.no_grad():
            values = [float(_relaxed(tensors, flat, point)) for point in points]
        best = int(np.argmax(values))
        if not values[best] > value + tolerance * abs(value):
            break
        maps = points[best]
    rounded = [
        {
            **spec.identity(),
            **{
                g: linear_sum_assignment(m, maximize=True)[1] for g, m in zip(flat.groups, model, strict=True)
            },
        }
        for model in maps
    ]
    identity = [spec.identity() for _ in states]
    at_start, at_rounded = (pair_objective(states, spec, p, include) for p in (identity, rounded))
    found, polish = match_mean(
        states, spec, start=rounded if at_rounded > at_start else identity, seed=seed, max_sweeps=max_sweeps,
        tolerance=tolerance, include=include, progress=progress,
    )  # fmt: skip
    outcome = Matching(
        found[-1], "universe", (at_start, *polish.objective), polish.sweeps, solves + polish.solves,
        polish.skipped, polish.converged,
    )  # fmt: skip
    return found, outcome


def _towards(maps: list[torch.Tensor], vertices: list[torch.Tensor], t: float) -> list[torch.Tensor]:
    return [torch.lerp(m, v, t) for m, v in zip(maps, vertices, strict=True)]


def _vertex(gradient: torch.Tensor) -> torch.Tensor:
    """The permutation matrix of largest inner product with ``gradient``."""
    rows, cols = linear_sum_assignment(gradient, maximize=True)
    vertex = torch.zeros_like(gradient)
    vertex[rows, cols] = 1.0
    return vertex


def _gradient(
    tensors: Sequence[State], spec: PermutationSpec, maps: list[list[torch.Tensor]]
) -> tuple[float, list[list[torch.Tensor]]]:
    with torch.enable_grad():
        leaves = [[m.detach().requires_grad_() for m in model] for model in maps]
        value = _relaxed(tensors, spec, leaves)
        flat = torch.autograd.grad(value, [m for model in leaves for m in model], allow_unused=True)
    grads = iter(flat)
    filled = [[torch.zeros_like(m) if (g := next(grads)) is None else g for m in model] for model in leaves]
    return float(value.detach()), filled


def _relaxed(
    tensors: Sequence[State], spec: PermutationSpec, maps: Sequence[Sequence[torch.Tensor]]
) -> torch.Tensor:
    """The pairwise objective under doubly stochastic maps."""
    tables = [dict(zip(spec.groups, model, strict=True)) for model in maps]
    terms = []
    for name in tensors[0]:
        moved = []
        for state, table in zip(tensors, tables, strict=True):
            tensor = state[name]
            for axis, group in spec.axes_of(name):
                tensor = _mix_axis(tensor, axis, table[group])
            moved.append(tensor)
        terms.append(_pairs(moved))
    return torch.stack(terms).sum()


def _mix_axis(tensor: torch.Tensor, axis: Axis, matrix: torch.Tensor) -> torch.Tensor:
    """``tensor`` with the units of one axis replaced by mixtures: ``new[i] = sum_j matrix[i, j] old[j]``."""
    if axis.at:
        whole = tensor.clone()
        part = axis.slice_of(whole)
        part.copy_(_mix_axis(part.clone(), replace(axis, at=()), matrix))
        return whole
    front = tensor.movedim(axis.dim, 0)
    positions = axis.positions(len(matrix))  # (outer, size, inner)
    mixed = torch.einsum("ij,ojk...->oik...", matrix, front[positions])
    mixed = mixed.reshape(-1, *front.shape[1:])
    return front.index_copy(0, positions.flatten(), mixed).movedim(0, axis.dim)


def anchored(permutations: list[Permutations], reference: int, spec: PermutationSpec) -> list[Permutations]:
    """The same relative order of all models, with the reference left as it is."""
    back = invert(permutations[reference], spec)
    return [compose(p, back, spec) for p in permutations]
