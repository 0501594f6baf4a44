"""Weight matching under the Fisher information: a parameter counts as far as the networks' outputs hang on it.

``- sum_k (F_a + P F_b)_k (a - P b)_k^2`` is to be maximised over the permutations P of B's units, with each network's
own diagonal Fisher moving with its parameters (the distance of Fisher-weighted averaging, Matena and Raffel
2022). Multiplied out it is four inner products of tensors that P permutes alike,

    2 (F_a a) . P b  -  F_a . P b^2  +  2 a . P (F_b b)  -  a^2 . P F_b

and two terms that P does not change. So it is weight matching of four tensors a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fastmatch._internal.states import State
from fastmatch.matching.weights import included, match_weights
from fastmatch.permutations.alignment import Matching
from fastmatch.spec import PermutationSpec
from fastmatch.spec.checks import check_spec

__all__ = ["match_fisher"]

TERMS = 4


def match_fisher(
    a: State,
    b: State,
    spec: PermutationSpec,
    fisher_a: Mapping[str, torch.Tensor],
    fisher_b: Mapping[str, torch.Tensor],
    **options: Any,
) -> Matching:
    """Coordinate ascent on the negated Fisher-weighted squared distance.

    Args:
        a, b: state dicts of the same architecture; A is the reference.
        spec: which axes move together.
        fisher_a, fisher_b: parameter name -> non-negative weights of its shape
            (:func:`fastmatch.statistics.fisher.diagonal_fisher`). Tensors without any (buffers) do not count.
        options: of :func:`fastmatch.matching.weights.match_weights`.

    Returns:
        A :class:`Matching`; its ``objective`` is ``- sum (F_a + P F_b) (a - P b)^2`` over the tensors that the
        spec moves and ``include`` takes in, and never falls. Only ratios of the weights matter to the permutations.

    Raises:
        ValueError: a Fisher lacks a parameter that the other has, has another shape, or negative entries.

    Memory: four copies of the parameters that move, beside the networks.
    """
    check_spec(spec, a, "model_a")
    check_spec(spec, b, "model_b")
    moving = {axis.parameter for g in spec.groups.values() for axis in g.axes}
    include = options.get("include", "affine")
    names = sorted(
        name for name in moving if (name in fisher_a or name in fisher_b) and included(name, a[name], include)
    )
    for argument, fisher in (("fisher_a", fisher_a), ("fisher_b", fisher_b)):
        for name in names:
            if name not in fisher or fisher[name].shape != a[name].shape:
                found = tuple(fisher[name].shape) if name in fisher else "nothing"
                raise ValueError(
                    f"{argument}: expected weights of shape {tuple(a[name].shape)} for {name!r}, got {found}"
                )
            if not bool((fisher[name] >= 0).all()):
                raise ValueError(f"{argument}: {name!r} holds negative numbers or NaN")
    unit = max((float(x[n].double().mean()) for x in (fisher_a, fisher_b) for n in names), default=0.0) or 1.0
    left: dict[str, torch.Tensor] = {}
    right: dict[str, torch.Tensor] = {}
    constant = 0.0
    for name in names:
        work = torch.promote_types(a[name].dtype, torch.float32)
        one, two = a[name].to(work), b[name].to(device=a[name].device, dtype=work)
        # In units of the largest mean: a trained net's Fisher can be 1e-9, and progress is judged by the terms' norms.
        f, g = (x[name].to(one.device).double().div(unit).to(work) for x in (fisher_a, fisher_b))
        for k, (x, y) in enumerate(
            ((2 * f * one, two), (-f, two * two), (2 * one, g * two), (-one * one, g))
        ):
            left[_term(k, name)], right[_term(k, name)] = x, y
        constant += float((f.double() * one.double().square()).sum())
        constant += float((g.double() * two.double().square()).sum())
    found = match_weights(left, right, _of_terms(spec, names), **options)
    return replace(
        found, method="fisher", objective=tuple(unit * (value - constant) for value in found.objective)
    )


def _term(k: int, name: str) -> str:
    return f"term {k}.{name}"


def _of_terms(spec: PermutationSpec, names: list[str]) -> PermutationSpec:
    """The spec under which every term of a parameter moves as the parameter does."""
    terms = range(TERMS)
    groups = {
        group.name: replace(
            group,
            axes=tuple(
                replace(axis, parameter=_term(k, axis.parameter))
                for axis in group.axes
                if axis.parameter in names
                for k in terms
            ),
        )
        for group in spec.groups.values()
    }
    return PermutationSpec(groups, {_term(k, name): spec.shapes[name] for name in names for k in terms})
