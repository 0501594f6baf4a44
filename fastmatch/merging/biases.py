"""The biases of linear and convolution layers: their depth in the network, and their removal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from fastmatch._internal.modules import with_state
from fastmatch._internal.states import State, state_of

__all__ = ["bias_depths", "remove_biases", "zeroed_biases"]

Model = TypeVar("Model", nn.Module, Mapping[str, torch.Tensor])


def _bias_names(state: State) -> list[str]:
    """Return the biases of linear and convolution layers, in the state's order. Biases of norms are not included."""
    names = []
    for name in state:
        if name == "bias" or name.endswith(".bias"):
            weight = state.get(f"{name[: -len('bias')]}weight")
            if weight is not None and weight.ndim >= 2:
                names.append(name)
    return names


def bias_depths(state: State) -> dict[str, int]:
    """Return bias name -> depth, 1 for the first layer; layers are counted in the state's order."""
    weights = [n for n, t in state.items() if t.ndim >= 2 and n.rsplit(".", 1)[-1] == "weight"]
    depth = {name[: -len("weight")] + "bias": k for k, name in enumerate(weights, start=1)}
    return {name: depth[name] for name in _bias_names(state)}


def zeroed_biases(state: State, last: int | None = None) -> dict[str, torch.Tensor]:
    """Return zeros for the biases of the ``last`` layers, or of all layers for None."""
    names = _bias_names(state)
    if last is not None and not 0 <= last <= len(names):
        raise ValueError(f"last: expected 0 to {len(names)}, the number of biases, got {last}")
    chosen = names if last is None else names[len(names) - last :]
    return {name: torch.zeros_like(state[name]) for name in chosen}


def remove_biases(model: Model, last: int | None = None) -> Model:
    """Return a copy of ``model`` whose last biases are zero. No data is read.

    ``fm.merge(models, biases="remove")`` removes all biases of a merge.

    Example:
        >>> without = fm.remove_biases(model_a, last=1)

    Args:
        model: a module or state dict with layers in forward order.
        last: how many biases, counted from the end; None removes all of them.

    Raises:
        TypeError: neither a module nor a state dict.
        ValueError: ``last`` is not between 0 and the number of biases.
    """
    state = state_of(model, "model")
    zeros = zeroed_biases(state, last)
    new = {name: zeros[name] if name in zeros else t.clone() for name, t in state.items()}
    if isinstance(model, nn.Module):
        return with_state(model, new)
    return new
