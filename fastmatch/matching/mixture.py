"""Matching by activations and weights at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastmatch._internal.checks import check_number
from fastmatch._internal.states import state_of
from fastmatch.matching.activations import ActivationMatching
from fastmatch.matching.ascent import Hooks
from fastmatch.matching.matcher import Matcher, Model, check_matcher
from fastmatch.matching.objective import weight_scale
from fastmatch.matching.weights import WeightMatching, check_unbalanced, match_weights
from fastmatch.permutations.alignment import Matching
from fastmatch.spec import PermutationSpec

__all__ = ["Mixture"]


@dataclass(frozen=True, eq=False)
class Mixture(Matcher):
    """Match units by activations and weights: maximize ``w * activations + (1 - w) * weights``, w = activation_weight.

    Each term is divided by its largest possible value: the inner product of the parameters by the product of their
    norms; the summed similarity by the sum over groups of its Frobenius norm times the square root of the group's
    size. So both are in [-1, 1] for networks of any width and depth.

    Example:
        >>> matcher = fm.Mixture(fm.WeightMatching(), fm.ActivationMatching(loader), activation_weight=0.3)
        >>> alignment = fm.align(model_a, model_b, x, matcher)
        >>> -1 <= alignment.matching.objective[-1] <= 1
        True

    Args:
        weight_matching: the options of the coordinate ascent and of the weights' term.
        activation_matching: the options of the activations' term. Its data is read once.
        activation_weight: w, from 0 (weights alone) to below 1. For activations alone use :class:`ActivationMatching`.

    Raises:
        ValueError: ``activation_weight`` is out of range.
        TypeError: ``weight_matching`` or ``activation_matching`` is not a matcher of that kind.
    """

    weight_matching: WeightMatching
    activation_matching: ActivationMatching
    activation_weight: float = 0.5

    def __post_init__(self) -> None:
        check_matcher("weight_matching", self.weight_matching, WeightMatching)
        check_unbalanced(self.weight_matching)
        check_matcher("activation_matching", self.activation_matching, ActivationMatching)
        check_number("activation_weight", self.activation_weight)
        if self.activation_weight >= 1:
            raise ValueError(
                "activation_weight: expected a number from 0 to below 1 (for activations alone, give "
                f"ActivationMatching as the matcher); got {self.activation_weight!r}"
            )

    def match(
        self, model_a: Model, model_b: Model, spec: PermutationSpec, *, progress: bool | None = None
    ) -> Matching:
        """Match the units of model B to those of model A.

        Groups with subgroups (heads) stay in place; their subgroups move within them.

        Args:
            model_a, model_b: modules of the traced architecture; A is the reference. Neither is changed.
            spec: a traced spec, which knows where activations can be read.
            progress: show progress bars; None shows them on a terminal.

        Returns:
            A :class:`Matching` with the mixed objective before the first sweep and after each. It never falls.

        Raises:
            TypeError: a model is a state dict, which cannot be run.
            ValueError: the spec has no site for a group, the data yields nothing, or activations are not finite.
        """
        spec = spec.flat()
        gains = self.activation_matching.similarities(model_a, model_b, spec, progress=progress)
        a, b = state_of(model_a, "model_a"), state_of(model_b, "model_b")
        reach = sum(float(g.norm()) * len(g) ** 0.5 for g in gains.values()) or 1.0
        scale = weight_scale(a, b, spec, self.weight_matching.include) or 1.0
        unit = (1 - self.activation_weight) / scale
        bonus = {name: gain * (self.activation_weight / reach / unit) for name, gain in gains.items()}
        found = match_weights(a, b, spec, self.weight_matching, Hooks(bonus=bonus), progress=progress)
        objective = tuple(value * unit for value in found.objective)
        return replace(found, matcher="Mixture", objective=objective)
