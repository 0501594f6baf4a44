"""The objective of many models: inner products of the permuted parameters, summed over all pairs of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fastmatch._internal.states import State
from fastmatch.matching.objective import Include, included
from fastmatch.permutations.alignment import Alignment, Matching
from fastmatch.permutations.apply import compose, invert
from fastmatch.spec import Permutations, PermutationSpec

__all__ = ["anchored", "moving", "sum_over_pairs"]


def moving(state: State, spec: PermutationSpec, include: Include) -> list[str]:
    """Return the tensors that some group moves and that enter the objective."""
    names = dict.fromkeys(axis.parameter for group in spec.groups.values() for axis in group.axes)
    return [name for name in names if included(name, state[name], include)]


def sum_over_pairs(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return ``sum_{p<q} <t_p, t_q>``, a scalar."""
    total = torch.stack(list(tensors)).sum(dim=0)
    return (total.square().sum() - sum(t.square().sum() for t in tensors)) / 2


def anchored(
    permutations: Sequence[Permutations], reference: int, spec: PermutationSpec, matching: Matching
) -> list[Alignment]:
    """Return the same relative order of all models, with the units of the reference in their own order."""
    back = invert(permutations[reference], spec)
    composed = [compose(p, back, spec) for p in permutations]
    return [Alignment(p, spec, replace(matching, permutations=p)) for p in composed]
