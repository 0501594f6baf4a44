"""Many models by their activations: one order of units for all, which maximizes the similarity of all pairs.

Groups are independent. With the similarities S_pq of model p's units to model q's, and the permutations pi_k of each model::

    maximize sum_{p<q} sum_i S_pq[pi_p(i), pi_q(i)]

One model is matched at a time, exactly, to all others as they are now. So the sum never falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TypeAlias

import torch

from fastmatch._internal.progress import progress_bar
from fastmatch.matching.activations import ActivationMatching, best_permutation
from fastmatch.matching.matcher import Models
from fastmatch.permutations.alignment import Matching
from fastmatch.spec import Permutations, PermutationSpec

__all__ = ["match_similar"]

Similarities: TypeAlias = dict[tuple[int, int], torch.Tensor]
"""(p, q) -> (n, n) similarity of model p's units to model q's, for p != q."""

LEAST_RISE = 1e-12
"""Of the sum, relative to the largest similarity."""


def match_similar(
    models: Models,
    spec: PermutationSpec,
    matcher: ActivationMatching,
    reference: int,
    max_rounds: int,
    *,
    progress: bool | None = None,
) -> tuple[list[Permutations], Matching]:
    """Return one dict of permutations per model, and the outcome.

    Args:
        models: modules of one architecture.
        spec: which axes move together.
        matcher: how units are compared; its data is read once for each pair of models.
        reference: the model to which all others are matched in the beginning.
        max_rounds: the largest number of passes over the models.
        progress: show progress bars; None shows them on a terminal.

    Raises:
        ValueError: the spec has heads or other groups within groups, whose best order depends on the units within.
    """
    if spec.subgroups():
        name = next(iter(spec.subgroups()))[0]
        raise ValueError(
            f"matcher: MergeMany compares units by activations one by one, and group {name!r} has groups within; "
            "use fm.ToReference(matcher), or select the other groups (spec.select)"
        )
    similar: dict[str, Similarities] = {name: {} for name in spec.groups}
    pairs = list(combinations(range(len(models)), 2))
    for p, q in progress_bar(pairs, "activations of pairs", show=progress):
        for name, found in matcher.similarities(models[p], models[q], spec, progress=False).items():
            similar[name][p, q], similar[name][q, p] = found, found.T
    current: list[Permutations] = [
        {name: _to_reference(similar[name], k, reference) for name in spec.groups} for k in range(len(models))
    ]
    identity = spec.identity()
    objective = [_total(similar, [identity] * len(models)), _total(similar, current)]
    rounds, solves = 0, len(spec.groups) * (len(models) - 1)
    moved = True
    while moved and rounds < max_rounds:
        moved = False
        for name, found in similar.items():
            orders = [p[name] for p in current]
            moved |= _ascend(found, orders)
            for permutations, order in zip(current, orders, strict=True):
                permutations[name] = order
            solves += len(models)
        rounds += 1
        objective.append(_total(similar, current))
    return current, Matching(current[-1], "MergeMany", tuple(objective), rounds, solves, converged=not moved)


def _to_reference(similar: Similarities, k: int, reference: int) -> torch.Tensor:
    if k == reference:
        return torch.arange(len(next(iter(similar.values()))), device="cpu")
    return best_permutation(similar[reference, k])


def _ascend(similar: Similarities, orders: list[torch.Tensor]) -> bool:
    """Match every model to all others once, in ``orders``; return whether one of them moved."""
    moved = False
    largest = max(float(s.abs().max()) for s in similar.values())
    for k in range(len(orders)):
        others = [q for q in range(len(orders)) if q != k]
        gain = torch.stack([similar[q, k][orders[q].to(similar[q, k].device)] for q in others]).sum(0)
        new = best_permutation(gain)
        places = torch.arange(len(new), device=gain.device)
        before, after = (float(gain[places, p.to(gain.device)].sum()) for p in (orders[k], new))
        if after - before > LEAST_RISE * largest * len(new):
            orders[k], moved = new, True
    return moved


def _total(similar: dict[str, Similarities], permutations: Sequence[Permutations]) -> float:
    """Return the similarity of matched units, summed over pairs of models and groups."""
    total = 0.0
    for name, found in similar.items():
        for (p, q), values in found.items():
            if p < q:
                one, two = (permutations[k][name].to(values.device) for k in (p, q))
                total += float(values[one, two].sum())
    return total
