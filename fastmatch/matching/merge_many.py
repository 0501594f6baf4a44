"""MergeMany: match each model to the mean of the others (Ainsworth et al. 2022, appendix A.11)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fastmatch._internal.checks import check_integer
from fastmatch._internal.progress import progress_bar
from fastmatch._internal.states import State, state_of
from fastmatch.matching.matcher import Models, Strategy, check_matcher
from fastmatch.matching.pair_objective import anchored, moving, pair_objective
from fastmatch.matching.weights import WeightMatching, match_weights
from fastmatch.permutations.alignment import Alignment, Matching
from fastmatch.permutations.apply import apply_permutations
from fastmatch.spec import Permutations, PermutationSpec

__all__ = ["MergeMany", "check_init", "match_mean"]


def check_init(matcher: WeightMatching) -> None:
    """Raise ValueError unless the matcher begins at the identity: the strategy sets where each match begins."""
    if matcher.init != "identity":
        given = repr(matcher.init) if isinstance(matcher.init, str) else "permutations"
        raise ValueError(
            "matcher: each match begins at the current permutations, the first at the identity; write "
            f'WeightMatching(init="identity", ...), got init={given}'
        )


@dataclass(frozen=True, eq=False)
class MergeMany(Strategy):
    """Match each model to the mean of the others, in random order, until a whole round moves nothing.

    Maximizes ``sum_{p<q} <P_p theta_p, P_q theta_q>`` over the permutations P_k of each model's units. A match to the
    mean of the others raises this sum by as much as it raises its own objective. So the sum never falls and the rounds
    end by themselves.

    Example:
        >>> models = [model_a, model_b]
        >>> alignments = fm.align_many(models, x, fm.MergeMany())
        >>> merged = fm.merge([f.apply(m) for f, m in zip(alignments, models)])

    Args:
        matcher: the options of each match. ``init`` must be ``"identity"``: the first matches begin there, later ones
            where the model is.
        max_rounds: the largest number of rounds; ``matching.converged`` says whether it was enough.

    Raises:
        ValueError: ``max_rounds`` is out of range, or ``matcher.init`` is not ``"identity"``.
        TypeError: ``matcher`` is not a :class:`WeightMatching`.
    """

    matcher: WeightMatching = WeightMatching(init="identity")
    max_rounds: int = 100

    def __post_init__(self) -> None:
        check_matcher("matcher", self.matcher, WeightMatching)
        check_init(self.matcher)
        check_integer("max_rounds", self.max_rounds, least=1)

    def match(
        self, models: Models, spec: PermutationSpec, reference: int = 0, *, progress: bool | None = None
    ) -> list[Alignment]:
        """Return one alignment per model; see :meth:`Strategy.match`.

        Each ``matching.objective`` is the sum over pairs before the first round and after each.
        """
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
        start: where the models begin; the identity for None.
        progress: show progress bars; None shows them on a terminal.
    """
    matcher = options.matcher
    current = list(start) if start is not None else [spec.identity() for _ in states]
    generator = np.random.default_rng(matcher.seed)
    trace = [pair_objective(states, spec, current, matcher.include)]
    solves = skipped = rounds = 0
    names = set(moving(states[0], spec, matcher.include))
    moved = True
    while moved and rounds < options.max_rounds:
        moved = False
        order = [int(k) for k in generator.permutation(len(states))]
        for k in progress_bar(order, f"matching to the mean, round {rounds + 1}", show=progress):
            others = [j for j in range(len(states)) if j != k]
            mean = _mean_of([states[j] for j in others], spec, [current[j] for j in others], names)
            single = replace(matcher, init=current[k], seed=int(generator.integers(2**31)))
            found = match_weights(mean, states[k], spec, single, progress=False)
            moved |= any(not torch.equal(p, current[k][g]) for g, p in found.permutations.items())
            current[k] = found.permutations
            solves, skipped = solves + found.solves, skipped + found.skipped
        rounds += 1
        trace.append(pair_objective(states, spec, current, matcher.include))
    outcome = Matching(current[-1], "MergeMany", tuple(trace), rounds, solves, skipped, converged=not moved)
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
