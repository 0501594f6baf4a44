"""Weight matching in which each squared difference is weighted by the parameter's diagonal Fisher information.

The objective is ``- sum_k (F_a + P F_b)_k (a - P b)_k^2`` over the permutations P of B's units; each network's Fisher
information moves with its parameters (the distance of Fisher-weighted averaging, Matena and Raffel 2022). Expanded,
it is four inner products of tensors that P permutes alike,

    2 (F_a a) . P b  -  F_a . P b^2  +  2 a . P (F_b b)  -  a^2 . P F_b

and two terms that P does not change. So it is weight matching of four tensors per parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastmatch._internal.batches import check_data
from fastmatch._internal.checks import check_choice, check_integer
from fastmatch._internal.divided import check_undivided
from fastmatch._internal.states import State, state_of, working_dtype
from fastmatch.matching.matcher import Matcher, Model, check_matcher, modules_of
from fastmatch.matching.objective import included
from fastmatch.matching.weights import WeightMatching, check_unbalanced, match_weights
from fastmatch.permutations.alignment import Matching
from fastmatch.spec import PermutationSpec
from fastmatch.spec.checks import check_spec
from fastmatch.statistics.fisher import Labels, diagonal_fisher

__all__ = ["FisherMatching", "match_fisher"]

Fisher = Mapping[str, torch.Tensor]
"""Parameter name -> non-negative weights of its shape."""

TERMS = 4


@dataclass(frozen=True, eq=False)
class FisherMatching(Matcher):
    """Match units by their weights, each squared difference weighted by Fisher information.

    Maximizes ``- sum_k (F_a + P F_b)_k (a - P b)_k^2`` over the permutations P of B's units, where F is the diagonal
    of the Fisher information of each network.

    Example:
        >>> alignment = fm.align(model_a, model_b, x, fm.FisherMatching(loader))
        >>> alignment.matching.objective[-1] <= 0
        True

    Args:
        data: batches of (inputs, targets), read once for each network; not an iterator, which can be read only once. For
            ``labels="sampled"`` inputs are enough.
        labels: ``"data"`` takes the targets: the empirical Fisher information. ``"sampled"`` draws labels from each
            network's own predictions.
        samples: stop after this many samples; None reads all of them.
        seed: of the drawn labels.
        ascent: the options of the coordinate ascent on the objective.

    Raises:
        TypeError: ``data`` is not an iterable of batches that can be read twice, or ``ascent`` is not a
            :class:`WeightMatching`.

    Memory: four copies of the parameters that move, in addition to the networks; per-sample gradients of one batch.
    """

    data: Iterable[Any] = field(repr=False)
    ascent: WeightMatching = WeightMatching()
    labels: Labels = "data"
    samples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_data(self.data, reads=2)
        check_matcher("ascent", self.ascent, WeightMatching)
        check_unbalanced(self.ascent)
        check_choice("labels", self.labels, Labels)
        check_integer("seed", self.seed)
        if self.labels == "data" and self.seed:
            raise ValueError(f'seed: is for labels="sampled"; got {self.seed}')
        if self.samples is not None:
            check_integer("samples", self.samples, least=1)

    def match(
        self, model_a: Model, model_b: Model, spec: PermutationSpec, *, progress: bool | None = None
    ) -> Matching:
        """Match the units of model B to those of model A.

        Args:
            model_a, model_b: modules of the same architecture that classify; A is the reference. Neither is changed.
            spec: which axes move together.
            progress: show progress bars; None shows them on a terminal.

        Returns:
            A :class:`Matching`; its ``objective`` is the negated weighted distance before the first sweep and after
            each, over the tensors that the spec moves and ``ascent.include`` takes in. It never falls.

        Raises:
            TypeError: a model is a state dict, which cannot be run.
            ValueError: ``data`` does not yield pairs of tensors.
        """
        models = modules_of(model_a, model_b)
        for name, model in zip(("model_a", "model_b"), models, strict=True):
            check_undivided(model, name)
        fisher_a, fisher_b = (
            diagonal_fisher(
                model, self.data, labels=self.labels, samples=self.samples, seed=self.seed, progress=progress
            )
            for model in models
        )
        a, b = state_of(model_a, "model_a"), state_of(model_b, "model_b")
        return match_fisher(a, b, spec, fisher_a, fisher_b, self.ascent, progress=progress)


def match_fisher(
    a: State,
    b: State,
    spec: PermutationSpec,
    fisher_a: Fisher,
    fisher_b: Fisher,
    ascent: WeightMatching | None = None,
    *,
    progress: bool | None = None,
) -> Matching:
    """Match two state dicts under given weights of their parameters.

    Args:
        a, b: state dicts of the same architecture; A is the reference.
        spec: which axes move together.
        fisher_a, fisher_b: parameter name -> non-negative weights of its shape, such as
            :func:`fastmatch.statistics.fisher.diagonal_fisher`. Tensors that neither names (buffers) do not enter.
            Only the ratios of all weights matter to the permutations.
        ascent: the options of the coordinate ascent; ``WeightMatching()`` for None.
        progress: show progress bars; None shows them on a terminal.

    Raises:
        ValueError: one of the two lacks a parameter that the other has, has another shape, or negative entries.
    """
    ascent = ascent or WeightMatching()
    check_spec(spec, a, "model_a")
    check_spec(spec, b, "model_b")
    moving = {axis.parameter for g in spec.groups.values() for axis in g.axes}
    names = sorted(
        name
        for name in moving
        if (name in fisher_a or name in fisher_b) and included(name, a[name], ascent.include)
    )
    _check_fisher("fisher_a", fisher_a, a, names)
    _check_fisher("fisher_b", fisher_b, a, names)
    # In units of the largest mean: the Fisher information of a trained network may be 1e-9, and the ascent measures
    # progress relative to the norms of the terms.
    unit = max((float(x[n].double().mean()) for x in (fisher_a, fisher_b) for n in names), default=0.0) or 1.0
    left: dict[str, torch.Tensor] = {}
    right: dict[str, torch.Tensor] = {}
    constant = 0.0
    for name in names:
        work = working_dtype(a[name].dtype)
        one, two = a[name].to(work), b[name].to(device=a[name].device, dtype=work)
        f, g = (x[name].to(one.device).double().div(unit).to(work) for x in (fisher_a, fisher_b))
        for k, (x, y) in enumerate(
            ((2 * f * one, two), (-f, two * two), (2 * one, g * two), (-one * one, g))
        ):
            left[_term(k, name)], right[_term(k, name)] = x, y
        constant += float((f.double() * one.double().square()).sum())
        constant += float((g.double() * two.double().square()).sum())
    found = match_weights(left, right, _spec_of_terms(spec, names), ascent, progress=progress)
    objective = tuple(unit * (value - constant) for value in found.objective)
    return replace(found, matcher="FisherMatching", objective=objective)


def _check_fisher(argument: str, fisher: Fisher, state: State, names: list[str]) -> None:
    for name in names:
        if name not in fisher or fisher[name].shape != state[name].shape:
            found = tuple(fisher[name].shape) if name in fisher else "nothing"
            raise ValueError(
                f"{argument}: expected weights of shape {tuple(state[name].shape)} for {name!r}, got {found}"
            )
        if not bool((fisher[name] >= 0).all()):
            raise ValueError(f"{argument}: {name!r} holds negative numbers or NaN")


def _term(k: int, name: str) -> str:
    return f"term {k}.{name}"


def _spec_of_terms(spec: PermutationSpec, names: list[str]) -> PermutationSpec:
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
