"""Frank-Wolfe: match all pairs of models at once through a shared order of units (C2M3, Crisostomi et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fastmatch._internal.checks import check_integer
from fastmatch._internal.progress import progress_bar
from fastmatch._internal.states import State, state_of
from fastmatch.assignment import linear_sum_assignment
from fastmatch.matching.matcher import Models, Strategy, check_matcher
from fastmatch.matching.merge_many import MergeMany, check_init, match_mean
from fastmatch.matching.pair_objective import anchored, moving, pair_objective, sum_over_pairs
from fastmatch.matching.weights import WeightMatching
from fastmatch.permutations.alignment import Alignment, Matching
from fastmatch.spec import Axis, Permutations, PermutationSpec

__all__ = ["FrankWolfe", "match_frank_wolfe"]

STEPS = 17
"""The objective is compared at this many points of the segment to the Frank-Wolfe vertex, both ends included."""

Maps = list[list[torch.Tensor]]
"""Per model and group, a doubly stochastic (size, size) float64 matrix."""


@dataclass(frozen=True, eq=False)
class FrankWolfe(Strategy):
    """Match all pairs of models at once: one map per model into a shared order of units, found by Frank-Wolfe.

    Maximizes ``sum_{p<q} <P_p theta_p, P_q theta_q>`` over permutations P_k that are relaxed to doubly stochastic
    matrices. Each step solves one assignment problem per model and group, with the gradient as its gain, and goes to
    the best of 17 points on the segment to that vertex. The relaxed objective never falls. At the end each map is
    rounded to its nearest permutation (or all are set to the identity, if that is better), and :class:`MergeMany`
    improves the result. Groups with subgroups (heads) move only in this last part.

    Example:
        >>> alignments = fm.align_many([model_a, model_b], x, fm.FrankWolfe(max_steps=5))
        >>> alignments[1].matching.matcher
        'FrankWolfe'

    Args:
        matcher: the options of the last part. ``include`` and ``tolerance`` are also those of the steps; ``init`` must
            be ``"identity"``.
        max_steps: the largest number of Frank-Wolfe steps.
        max_rounds: the largest number of rounds of the last part.

    Raises:
        ValueError: ``max_steps`` or ``max_rounds`` is out of range, or ``matcher.init`` is not ``"identity"``.
        TypeError: ``matcher`` is not a :class:`WeightMatching`.

    Memory: two n x n float64 matrices per model and group, and every model in float64.
    """

    matcher: WeightMatching = WeightMatching(init="identity")
    max_steps: int = 50
    max_rounds: int = 100

    def __post_init__(self) -> None:
        check_matcher("matcher", self.matcher, WeightMatching)
        check_init(self.matcher)
        check_integer("max_steps", self.max_steps, least=1)
        check_integer("max_rounds", self.max_rounds, least=1)

    def match(
        self, models: Models, spec: PermutationSpec, reference: int = 0, *, progress: bool | None = None
    ) -> list[Alignment]:
        """Return one alignment per model; see :meth:`Strategy.match`.

        Each ``matching.objective`` is the sum over pairs at the identity, after rounding, and after each round of the
        last part. It never falls.
        """
        states = [state_of(model, f"models[{k}]") for k, model in enumerate(models)]
        permutations, matching = match_frank_wolfe(states, spec, self, progress=progress)
        return anchored(permutations, reference, spec, matching)


@torch.inference_mode(False)  # it needs gradients, whatever mode the caller is in
def match_frank_wolfe(
    states: Sequence[State], spec: PermutationSpec, options: FrankWolfe, *, progress: bool | None = None
) -> tuple[list[Permutations], Matching]:
    """Return one dict of permutations per model, into the shared order, and the outcome for the last of them."""
    include = options.matcher.include
    maps, solves = _climb(states, spec.flat(), options, progress)
    rounded = [_rounded(model, spec) for model in maps]
    identity = [spec.identity() for _ in states]
    at_start, at_rounded = (pair_objective(states, spec, p, include) for p in (identity, rounded))
    found, polished = match_mean(
        states,
        spec,
        MergeMany(options.matcher, options.max_rounds),
        start=rounded if at_rounded > at_start else identity,
        progress=progress,
    )
    outcome = replace(
        polished,
        matcher="FrankWolfe",
        objective=(at_start, *polished.objective),
        solves=solves + polished.solves,
    )
    return found, outcome


def _climb(
    states: Sequence[State], spec: PermutationSpec, options: FrankWolfe, progress: bool | None
) -> tuple[Maps, int]:
    """The relaxed maps at which no step raises the objective, and the number of assignment problems solved."""
    names = moving(states[0], spec, options.matcher.include)
    device = states[0][names[0]].device if names else torch.device("cpu")
    tensors = [{n: s[n].to(device, torch.float64) for n in names} for s in states]
    maps = [
        [torch.eye(g.size, dtype=torch.float64, device=device) for g in spec.groups.values()] for _ in states
    ]
    solves = 0
    for _ in progress_bar(range(options.max_steps), "Frank-Wolfe", show=progress):
        value, gradients = _gradient(tensors, spec, maps)
        vertices = [[_vertex(g) for g in model] for model in gradients]
        solves += sum(map(len, vertices))
        points = [
            [_towards(m, v, t) for m, v in zip(maps, vertices, strict=True)]
            for t in torch.linspace(0, 1, STEPS, dtype=torch.float64, device="cpu")[1:].tolist()
        ]
        with torch.no_grad():
            values = [float(_relaxed(tensors, spec, point)) for point in points]
        best = int(np.argmax(values))
        if not values[best] > value + options.matcher.tolerance * abs(value):
            break
        maps = points[best]
    return maps, solves


def _rounded(maps: list[torch.Tensor], spec: PermutationSpec) -> Permutations:
    """The nearest permutations; the identity for groups that the maps do not move."""
    nearest = {
        g: linear_sum_assignment(m, maximize=True)[1].cpu()
        for g, m in zip(spec.flat().groups, maps, strict=True)
    }
    return {**spec.identity(), **nearest}


def _towards(maps: list[torch.Tensor], vertices: list[torch.Tensor], t: float) -> list[torch.Tensor]:
    """The points at fraction ``t`` of the segments from maps to vertices."""
    return [torch.lerp(m, v, t) for m, v in zip(maps, vertices, strict=True)]


def _vertex(gradient: torch.Tensor) -> torch.Tensor:
    """The permutation matrix of largest inner product with ``gradient``."""
    rows, cols = linear_sum_assignment(gradient, maximize=True)
    vertex = torch.zeros_like(gradient)
    vertex[rows, cols] = 1.0
    return vertex


def _gradient(tensors: Sequence[State], spec: PermutationSpec, maps: Maps) -> tuple[float, Maps]:
    """The relaxed objective and its gradient by the maps."""
    with torch.enable_grad():
        leaves = [[m.detach().requires_grad_() for m in model] for model in maps]
        value = _relaxed(tensors, spec, leaves)
        flat = torch.autograd.grad(value, [m for model in leaves for m in model], allow_unused=True)
    grads = iter(flat)
    filled = [[torch.zeros_like(m) if (g := next(grads)) is None else g for m in model] for model in leaves]
    return float(value.detach()), filled


def _relaxed(tensors: Sequence[State], spec: PermutationSpec, maps: Maps) -> torch.Tensor:
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
        terms.append(sum_over_pairs(moved))
    return torch.stack(terms).sum()


def _mix_axis(tensor: torch.Tensor, axis: Axis, matrix: torch.Tensor) -> torch.Tensor:
    """``tensor`` with the units of one axis replaced by mixtures: ``new[i] = sum_j matrix[i, j] old[j]``."""
    if axis.at:
        whole = tensor.clone()
        part = axis.slice_of(whole)
        part.copy_(_mix_axis(part.clone(), replace(axis, at=()), matrix))
        return whole
    front = tensor.movedim(axis.dim, 0)
    positions = axis.positions(len(matrix)).to(tensor.device)  # (outer, size, inner)
    mixed = torch.einsum("ij,ojk...->oik...", matrix, front[positions])
    mixed = mixed.reshape(-1, *front.shape[1:])
    return front.index_copy(0, positions.flatten(), mixed).movedim(0, axis.dim)
