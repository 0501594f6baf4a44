"""Weights that a module computes from other tensors, recognized by the names that torch gives those.

The average of such tensors is not that of the weights, except where only ``weight_orig`` of one mask differs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

__all__ = ["check_equal_parts", "fixed_parts"]

_PARAMETRIZED = re.compile(r"(?P<path>(?:.*\.)?)parametrizations\.(?P<weight>[^.]+)\.[^.]+")


def fixed_parts(names: Iterable[str]) -> dict[str, str]:
    """Return the tensors that must be equal in all models of an average: name -> what computes the weight in their place.

    These are the masks of torch.nn.utils.prune, and all tensors of weight_norm, spectral_norm and other parametrizations.
    """
    held, found = set(names), dict[str, str]()
    for name in held:
        if match := _PARAMETRIZED.match(name):
            found[name] = f"torch.nn.utils.parametrize.remove_parametrizations(module, {match['weight']!r})"
        weight, _, kind = name.rpartition("_")
        last = weight.rpartition(".")[2]
        if kind == "mask" and f"{weight}_orig" in held:
            found[name] = f"torch.nn.utils.prune.remove(module, {last!r})"
        elif kind == "u" and f"{weight}_orig" in held:
            parts = (f"{weight}_orig", name, f"{weight}_v")
            found |= dict.fromkeys(
                held.intersection(parts), f"torch.nn.utils.remove_spectral_norm(module, {last!r})"
            )
        elif kind == "g" and f"{weight}_v" in held and last.startswith("weight"):
            found |= dict.fromkeys(
                (name, f"{weight}_v"), f"torch.nn.utils.remove_weight_norm(module, {last!r})"
            )
    return found


def check_equal_parts(
    name: str, first: torch.Tensor, other: torch.Tensor, fixed: Mapping[str, str], argument: str
) -> None:
    """Raise ValueError if a tensor of ``fixed`` differs from the first model's by more than rounding."""
    other = other.to(first)
    if not (
        torch.equal(first, other) or (first.is_floating_point() and torch.allclose(first, other, atol=1e-6))
    ):
        raise ValueError(
            f"{argument}: tensor {name!r}, from which a layer computes its weight, differs from the first model's; the average of such "
            f"tensors is not that of the weights. Store the weights themselves: {fixed[name]} for each model"
        )
