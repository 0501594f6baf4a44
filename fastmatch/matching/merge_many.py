"""MergeMany: match each model to the mean of the others (Ainsworth et al. 2022, appendix A.11)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from fastmatch._internal.checks import check_integer
from fastmatch._internal.progress import progress_bar
from fastmatch._internal.states import State, state_of
from fastmatch.matching.activations import ActivationMatching
from fastmatch.matching.ascent import KEPT, Hooks
from fastmatch.matching.gains import Gains
from fastmatch.matching.matcher import Models, Strategy, check_matcher, check_rereadable
from fastmatch.matching.pair_objective import anchored, moving
from fastmatch.matching.similar_many import match_similar
from fastmatch.matching.weights import WeightMatching, check_unbalanced, match_weights
from fastmatch.permutations.alignment import Alignment, Matching
from fastmatch.permutations.apply import permute_tensor
from fastmatch.spec import Permutations, PermutationSpec

__all__ = ["MergeMany", "Totals", "check_init", "match_mean"]


def check_init(matcher: WeightMatching) -> None:
    """Raise ValueError unless the matcher begins at the identity, because the strategy sets where each match begins, and balances nothing."""
    if matcher.init != "identity":
        given = repr(matcher.init) if isinstance(matcher.init, str) else "permutations"
        raise ValueError(
            "matcher: each match begins at the current permutations; write "
            f'WeightMatching(init="identity", ...), got init={given}'
        )
    check_unbalanced(matcher)


@dataclass(frozen=True, eq=False)
class MergeMany(Strategy):
    """Match each model to the mean of the others, in random order, until a whole round moves nothing.

    By weights (the default), it maximizes ``sum_{p<q} <P_p theta_p, P_q theta_q>`` over the permutations P_k of each model's units. A model is matched
    again in the groups whose tensors have changed in another model since its last match. A match to the
    mean of the others raises this sum by as much as it raises its own objective. So the sum never falls and the rounds
    end by themselves, at a local optimum. They begin with all models matched to the first one, if that is better than the models as they are.

    With :class:`ActivationMatching`, it maximizes the similarity of matched units, summed over all pairs of models, in the
    same way, from the matches to the reference on. Each group is then one problem by itself.

    Example:
        >>> models = [model_a, model_b]
        >>> alignments = fm.align_many(models, x, fm.MergeMany())
        >>> merged = fm.merge([f.apply(m) for f, m in zip(alignments, models)])
        >>> alignments = fm.align_many(models, x, fm.MergeMany(fm.ActivationMatching(loader)))

    Args:
        matcher: the options of each match. :class:`WeightMatching` must have ``init="identity"``: each match begins where the
            model is. :class:`ActivationMatching` reads its data once for each pair of models.
        max_rounds: the largest number of rounds; ``matching.converged`` says whether it was enough.

    Raises:
        ValueError: ``max_rounds`` is out of range, or ``matcher.init`` is not ``"identity"``.
        TypeError: ``matcher`` is neither of the two, or its data is an iterator, which can be read only once.

    Cost: by weights, two matches per model as of two; later ones multiply the units that have moved. Memory: the sum of the models in float64, and
    for every model the mean of the others and gains of at most twice its size.
    """

    matcher: WeightMatching | ActivationMatching = WeightMatching(init="identity")
    max_rounds: int = 100

    def __post_init__(self) -> None:
        if isinstance(self.matcher, ActivationMatching):
            check_rereadable("matcher", self.matcher)
        else:
            check_matcher("matcher", self.matcher, WeightMatching)
            check_init(self.matcher)
        check_integer("max_rounds", self.max_rounds, least=1)

    def match(
        self, models: Models, spec: PermutationSpec, reference: int = 0, *, progress: bool | None = None
    ) -> list[Alignment]:
        """Return one alignment per model; see :meth:`Strategy.match`.

        Each ``matching.objective`` is the sum over pairs of the models as they are, before the first round if they were matched to
        one of them, and after each round.
        """
        if isinstance(self.matcher, ActivationMatching):
            permutations, matching = match_similar(
                models, spec, self.matcher, reference, self.max_rounds, progress=progress
            )
            return anchored(permutations, reference, spec, matching)
        states = [state_of(model, f"models[{k}]") for k, model in enumerate(models)]
        permutations, matching = match_mean(states, spec, self, progress=progress)
        return anchored(permutations, reference, spec, matching)


def match_mean(
    states: Sequence[State],
    spec: PermutationSpec,
    options: MergeMany,
    start: Sequence[Permutations] | None = None,
    *,
    progress: bool | None = None,
) -> tuple[list[Permutations], Matching]:
    """Return one dict of permutations per model, and the outcome for the last of them.

    Args:
        states: state dicts of the same architecture.
        spec: which axes move together.
        options: how they are matched.
        start: where the models begin; :func:`first_orders` for None.
        progress: show progress bars; None shows them on a terminal.
    """
    matcher = options.matcher
    assert isinstance(matcher, WeightMatching)
    names = moving(states[0], spec, matcher.include)
    solves = skipped = rounds = 0
    before: list[float] = []
    if start is None:
        first = first_orders(states, spec, matcher, progress=progress)
        start, solves = first.orders, first.solves
        before = [first.at_identity] if first.objective > first.at_identity else []
    current = list(start)
    generator = np.random.default_rng(matcher.seed)
    totals = Totals(states, spec, current, names)
    trace = [*before, totals.objective()]
    stale = [set(spec.top_level()) for _ in states]
    kept = [_KeptGains(state, spec, names) for state in states]
    moved = True
    while moved and rounds < options.max_rounds:
        moved = False
        order = [int(k) for k in generator.permutation(len(states))]
        for k in progress_bar(order, f"matching to the mean, round {rounds + 1}", show=progress):
            single = replace(matcher, init=current[k], seed=int(generator.integers(2**31)))
            if not stale[k]:
                continue
            mean = totals.mean_of_others(k)
            hooks = Hooks(stale=stale[k], gains=kept[k].at(mean))
            found = match_weights(mean, states[k], spec, single, hooks, progress=False)
            differ = {g: p != current[k][g] for g, p in found.permutations.items()}
            changed = {g for g, units in differ.items() if units.any()}
            moved |= bool(changed)
            stale[k] = set() if found.converged else set(spec.top_level())
            neighbours = _with_neighbours(changed, spec)
            for other in range(len(states)):
                if other != k:
                    stale[other] |= neighbours
                    kept[other].note(differ)
            current[k] = found.permutations
            totals.move(k, current[k])
            solves, skipped = solves + found.solves, skipped + found.skipped
        rounds += 1
        trace.append(totals.objective())
    outcome = Matching(current[-1], "MergeMany", tuple(trace), rounds, solves, skipped, converged=not moved)
    return current, outcome


class FirstOrders(NamedTuple):
    """Where models begin, the number of assignments solved for it, and the objective there and of the models as they are."""

    orders: list[Permutations]
    solves: int
    objective: float
    at_identity: float


def first_orders(
    states: Sequence[State], spec: PermutationSpec, matcher: WeightMatching, *, progress: bool | None = None
) -> FirstOrders:
    """Return where models begin: all matched to the first, or as they are.

    The mean of models in different orders tells little of any of them. So rounds from there end sooner, and higher, than from the
    models as they are, unless these are alike already.
    """
    single, solves = replace(matcher, init="greedy"), 0
    found = [spec.identity() for _ in states]
    for k in progress_bar(range(1, len(states)), "matching to the first", show=progress):
        matched = match_weights(states[0], states[k], spec, single, progress=False)
        found[k] = matched.permutations
        solves += matched.solves
    names = moving(states[0], spec, matcher.include)
    identity = [spec.identity() for _ in states]
    at_found, at_identity = (Totals(states, spec, p, names).objective() for p in (found, identity))
    better = found if at_found > at_identity else identity
    return FirstOrders(better, solves, max(at_found, at_identity), at_identity)


def _with_neighbours(groups: set[str], spec: PermutationSpec) -> set[str]:
    """The top-level groups of ``groups`` and of all groups that share a tensor with them."""
    reached = groups.union(*(spec.neighbours(g) for g in groups))
    return {spec.groups[g].within or g for g in reached}


class _KeptGains:
    """The gains of a model with the mean of the others, between its matches.

    Late rounds move few units, so gains are updated by these. A gain is of the mean in float32, unless the model is in float64.

    Args:
        state: the model.
        spec: which axes move together.
        names: the tensors that enter.
    """

    def __init__(self, state: State, spec: PermutationSpec, names: Sequence[str]) -> None:
        self.state, self.spec, self.names = state, spec, names
        self.gains: Gains | None = None
        self.moved: Mapping[str, torch.Tensor] = {}

    def note(self, differ: Mapping[str, torch.Tensor]) -> None:
        """Note at which positions of each group another model has moved units."""
        self.moved = {group: units | self.moved.get(group, units) for group, units in differ.items()}

    def at(self, mean: State) -> Gains:
        """Return the gains with this mean of the others."""
        wide = {name: self.state[name].dtype == torch.float64 for name in self.names}
        a = {
            **mean,
            **{name: mean[name].to(torch.float64 if wide[name] else torch.float32) for name in self.names},
        }
        if self.gains is None:
            self.gains = Gains(
                a, self.state, self.spec, KEPT * 4 * sum(a[name].numel() for name in self.names)
            )
        else:
            self.gains.follow(a, {group: units.nonzero().flatten() for group, units in self.moved.items()})
        self.moved = {}
        return self.gains


class Totals:
    """The sum over models of the permuted tensors in ``names``, in float64; it follows the models that move."""

    def __init__(
        self,
        states: Sequence[State],
        spec: PermutationSpec,
        permutations: Sequence[Permutations],
        names: Sequence[str],
    ) -> None:
        self.states, self.spec, self.names = states, spec, names
        self.permutations = list(permutations)
        self.totals = {name: self._tensor(0, name).to(torch.float64, copy=True) for name in names}
        for k in range(1, len(states)):
            for name in names:
                self.totals[name] = self.totals[name] + self._tensor(k, name)
        self.own = sum(float(s[name].double().square().sum()) for s in states for name in names)
        """The models' products with themselves, which no order changes."""

    def objective(self) -> float:
        """Return the inner products of all pairs of models, summed."""
        return (sum(float(total.square().sum()) for total in self.totals.values()) - self.own) / 2

    def _tensor(self, k: int, name: str) -> torch.Tensor:
        return permute_tensor(self.states[k][name], name, self.spec, self.permutations[k])

    def move(self, k: int, permutations: Permutations) -> None:
        """Give a model other permutations."""
        before = self.permutations[k]
        groups = {g for g, p in permutations.items() if not torch.equal(p, before[g])}
        names = {axis.parameter for g in groups for axis in self.spec.groups[g].axes}
        then = {name: self._tensor(k, name).double() for name in self.names if name in names}
        self.permutations[k] = permutations
        for name, tensor in then.items():
            self.totals[name] += self._tensor(k, name).double() - tensor

    def mean_of_others(self, k: int) -> dict[str, torch.Tensor]:
        """Return the mean of the other models; tensors that do not enter are model k's own."""
        count = len(self.states) - 1
        means = {name: (total - self._tensor(k, name)) / count for name, total in self.totals.items()}
        return {**self.states[k], **means}
