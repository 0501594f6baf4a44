"""Matching by activations and weights at once: ``alpha * activations + (1 - alpha) * weights``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from fastmatch._internal.states import state_of
from fastmatch.matching.activations import similarities
from fastmatch.matching.weights import match_weights, weight_scale
from fastmatch.permutations.alignment import Matching
from fastmatch.spec import PermutationSpec

__all__ = ["match_mix"]


def match_mix(
    model_a: nn.Module,
    model_b: nn.Module,
    spec: PermutationSpec,
    data: Iterable[Any],
    *,
    alpha: float,
    weights: dict[str, Any] | None = None,
    activations: dict[str, Any] | None = None,
) -> Matching:
    """Coordinate ascent on ``alpha * activations + (1 - alpha) * weights``.

    Each term is scaled to what it could reach at most: the inner product of the parameters is divided by
    the product of their norms; the summed similarity by the sum over groups of its Frobenius norm times
    the square root of the group's size. Both lie in [-1, 1], whatever the networks' width and depth.

    Args:
        model_a, model_b, spec, data: as for activation matching; the data is read once.
        alpha: share of the activations, from 0 to below 1.
        weights, activations: further arguments of the two matchings.

    Returns:
        A :class:`Matching` with the mixed objective before the first sweep and after each; it never falls.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha: expected a number from 0 to below 1 (activations alone), got {alpha}")
    spec = spec.flat()
    options = dict(weights or {})
    a, b = state_of(model_a, "model_a"), state_of(model_b, "model_b")
    gains = similarities(model_a, model_b, spec, data, **(activations or {}))
    reach = sum(float(g.norm()) * len(g) ** 0.5 for g in gains.values()) or 1.0
    scale = weight_scale(a, b, spec, options.get("include", "affine")) or 1.0
    unit = (1 - alpha) / scale
    bonus = {name: gain * (alpha / reach / unit) for name, gain in gains.items()}
    found = match_weights(a, b, spec, bonus=bonus, **options)
    return replace(found, method="mix", objective=tuple(value * unit for value in found.objective))
