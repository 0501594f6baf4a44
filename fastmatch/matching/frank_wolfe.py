"""Frank-Wolfe: match all pairs of models at once through a shared order of units (C2M3, Crisostomi et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fastmatch._internal.checks import check_integer
from fastmatch._internal.progress import progress_bar
from fastmatch._internal.states import State, state_of
from fastmatch.assignment import linear_sum_assignment
from fastmatch.matching.matcher import Models, Strategy, check_matcher
from fastmatch.matching.merge_many import MergeMany, check_init, match_mean
from fastmatch.matching.mixtures import Mixtures, can_mix
from fastmatch.matching.objective import Include
from fastmatch.matching.pair_objective import anchored, moving, sum_over_pairs
from fastmatch.matching.pair_products import PairProducts, can_pair, pairs_pay
from fastmatch.matching.weights import WeightMatching
from fastmatch.permutations.alignment import Alignment, Matching
from fastmatch.spec import Axis, Permutations, PermutationSpec

__all__ = ["FrankWolfe", "match_frank_wolfe"]

LEAST_RISE = 1e-6
"""The relative rise of the relaxed objective that is more than rounding, where mixtures are in float32."""

STEPS = 17
"""The objective is compared at this many points of the segment to the Frank-Wolfe vertex, both ends included."""

Maps = list[list[torch.Tensor]]
"""Per model and group, a doubly stochastic (size, size) float64 matrix."""


@dataclass(frozen=True, eq=False)
class FrankWolfe(Strategy):
    """Match all pairs of models at once: one map per model into a shared order of units, found by Frank-Wolfe.

    Maximizes ``sum_{p<q} <P_p theta_p, P_q theta_q>`` over permutations P_k that are relaxed to doubly stochastic
    matrices. Each step solves one assignment problem per model and group, with the gradient as its gain, and goes to
    the best of 17 points on the segment to that vertex, while the relaxed objective rises by more than rounding. At the end each map is
    rounded to its nearest permutation, and :class:`MergeMany` improves the result. What :class:`MergeMany` finds by itself is
    returned if it is better than that, or than the relaxed objective. Groups with subgroups (heads) move only in this last part.

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

    Cost: per step, a gain and an assignment problem for every model and group. Memory: one n x n float64 matrix per model
    and group, and every model six times, in float32 unless a model is in float64. For a group of many weights that move
    along no other dimension, n x n matrices are kept in place of the six: one for each pair of models, and two for each model.
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

        Each ``matching.objective`` is the sum over pairs of the models as they are, after rounding, and after each round of the
        last part; or that of :class:`MergeMany`, if its result is better.
        """
        states = [state_of(model, f"models[{k}]") for k, model in enumerate(models)]
        permutations, matching = match_frank_wolfe(states, spec, self, progress=progress)
        return anchored(permutations, reference, spec, matching)


@torch.inference_mode(False)  # it needs gradients, whatever mode the caller is in
def match_frank_wolfe(
    states: Sequence[State], spec: PermutationSpec, options: FrankWolfe, *, progress: bool | None = None
) -> tuple[list[Permutations], Matching]:
    """Return one dict of permutations per model, into the shared order, and the outcome for the last of them."""
    maps, solves, relaxed = _climb(states, spec.flat(), options, progress)
    last = MergeMany(options.matcher, options.max_rounds)
    found, outcome = match_mean(states, spec, last, progress=progress)
    solves += outcome.solves
    if outcome.objective[-1] < relaxed:  # else rounding is not expected to end higher
        rounded = [_rounded(model, spec) for model in maps]
        other, polished = match_mean(states, spec, last, start=rounded, progress=progress)
        solves += polished.solves
        if polished.objective[-1] >= outcome.objective[-1]:
            found = other
            outcome = replace(polished, objective=(outcome.objective[0], *polished.objective))
    return found, replace(outcome, matcher="FrankWolfe", solves=solves)


class _Relaxation:
    """The pairwise objective under doubly stochastic maps, which begin at the identity.

    Args:
        states: state dicts of the same architecture.
        spec: the groups whose units are mixed.
        include: which tensors enter.
    """

    def __init__(self, states: Sequence[State], spec: PermutationSpec, include: Include) -> None:
        names = moving(states[0], spec, include)
        self.spec, self.count = spec, len(states)
        self.device = states[0][names[0]].device if names else torch.device("cpu")
        self.sizes = [group.size for group in spec.groups.values()]
        wide = any(s[n].dtype == torch.float64 for s in states for n in names)
        self.dtype = torch.float64 if wide else torch.float32
        self.maps: Maps = [
            [torch.eye(n, dtype=torch.float64, device=self.device) for n in self.sizes] for _ in states
        ]
        numbers = {name: k for k, name in enumerate(spec.groups)}
        axes_of = {name: [(axis, numbers[group]) for axis, group in spec.axes_of(name)] for name in names}
        self.parts: list[Mixtures | PairProducts] = []
        """The tensors, each in one part."""
        others = []
        paired = self._pair(states, axes_of)
        for name, axes in axes_of.items():
            if name in paired:
                continue
            if can_mix([axis for axis, _ in axes], [self.sizes[k] for _, k in axes]):
                self.parts.append(Mixtures([s[name].to(self.device) for s in states], axes))
            else:
                others.append(name)
        self.others = [{n: s[n].to(self.device, torch.float64) for n in others} for s in states]
        """The tensors whose maps act on slices."""

    def _pair(self, states: Sequence[State], axes_of: Mapping[str, Sequence[tuple[Axis, int]]]) -> set[str]:
        """Add the groups of whose tensors products of pairs are kept; return the names of these tensors."""
        paired: set[str] = set()
        for number, size in enumerate(self.sizes):
            alone = {
                name: axes[0][0]
                for name, axes in axes_of.items()
                if axes[0][1] == number
                and can_pair([axis for axis, _ in axes], [size] * len(axes), states[0][name].shape)
            }
            weights = sum(states[0][name].numel() for name in alone) // size
            if pairs_pay(size, weights, self.count):
                tensors = [[s[name].to(self.device) for name in alone] for s in states]
                self.parts.append(PairProducts(tensors, list(alone.values()), number, size))
                paired |= alone.keys()
        return paired

    def gradients(self) -> Maps:
        """Return the gradient by the maps, in float32 unless a state is in float64."""
        found = [
            [torch.zeros(n, n, dtype=self.dtype, device=self.device) for n in self.sizes]
            for _ in range(self.count)
        ]
        for part in self.parts:
            part.add_gradients(found)
        if self.others[0]:
            for total, part in zip(found, _gradient(self.others, self.spec, self.maps), strict=True):
                for x, y in zip(total, part, strict=True):
                    x += y
        return found

    def look(self, permutations: Sequence[Sequence[torch.Tensor]], points: Sequence[float]) -> list[float]:
        """Return the objective at fractions of the way to permutations, per model and group."""
        values = np.zeros(len(points))
        for part in self.parts:
            gram = part.look(permutations).numpy()
            degree = len(gram) - 1
            weights = np.array(
                [[(1 - t) ** k * t ** (degree - k) for k in range(degree + 1)] for t in points]
            )
            values += np.einsum("tk,kl,tl->t", weights, gram, weights)
        if self.others[0]:
            with torch.no_grad():
                values += [float(_relaxed(self.others, self.spec, self._at(permutations, t))) for t in points]
        return values.tolist()

    def go(self, permutations: Sequence[Sequence[torch.Tensor]], t: float) -> None:
        """Move by a fraction of the way to the permutations last looked at."""
        self.maps = self._at(permutations, t)
        for part in self.parts:
            part.go(t)

    def _at(self, permutations: Sequence[Sequence[torch.Tensor]], t: float) -> Maps:
        """The maps at a fraction of the way to permutations."""
        return [
            [_towards(m, p, t) for m, p in zip(maps, model, strict=True)]
            for maps, model in zip(self.maps, permutations, strict=True)
        ]


def _climb(
    states: Sequence[State], spec: PermutationSpec, options: FrankWolfe, progress: bool | None
) -> tuple[Maps, int, float]:
    """The relaxed maps at which no step raises the objective, the number of assignment problems solved, and the objective there."""
    relaxation = _Relaxation(states, spec, options.matcher.include)
    points = np.linspace(0, 1, STEPS).tolist()
    least = max(options.matcher.tolerance, LEAST_RISE if relaxation.dtype == torch.float32 else 0.0)
    solves, reached = 0, -math.inf
    for _ in progress_bar(range(options.max_steps), "Frank-Wolfe", show=progress):
        vertices = [
            [linear_sum_assignment(g, maximize=True)[1].cpu() for g in model]
            for model in relaxation.gradients()
        ]
        solves += sum(map(len, vertices))
        values = relaxation.look(vertices, points)
        best = int(np.argmax(values))
        reached = values[0]
        if not values[best] > values[0] + least * abs(values[0]):
            break
        relaxation.go(vertices, points[best])
        reached = values[best]
    return relaxation.maps, solves, reached


def _rounded(maps: list[torch.Tensor], spec: PermutationSpec) -> Permutations:
    """The nearest permutations; the identity for groups that the maps do not move."""
    nearest = {
        g: linear_sum_assignment(m, maximize=True)[1].cpu()
        for g, m in zip(spec.flat().groups, maps, strict=True)
    }
    return {**spec.identity(), **nearest}


def _towards(matrix: torch.Tensor, permutation: torch.Tensor, t: float) -> torch.Tensor:
    """The point at fraction ``t`` of the way from a map to a permutation."""
    moved = matrix * (1 - t)
    moved[torch.arange(len(moved), device=moved.device), permutation.to(moved.device)] += t
    return moved


def _gradient(tensors: Sequence[State], spec: PermutationSpec, maps: Maps) -> Maps:
    """The gradient of the relaxed objective by the maps."""
    with torch.enable_grad():
        leaves = [[m.detach().requires_grad_() for m in model] for model in maps]
        value = _relaxed(tensors, spec, leaves)
        flat = torch.autograd.grad(value, [m for model in leaves for m in model], allow_unused=True)
    grads = iter(flat)
    return [[torch.zeros_like(m) if (g := next(grads)) is None else g for m in model] for model in leaves]


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
