"""Renormalization without data: biases that shrink as fast as the weights' product does, or no biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from fastmatch._internal.coefficients import check_weights, remember_weights
from fastmatch._internal.modules import with_state
from fastmatch._internal.states import State, state_of
from fastmatch.merging.average import merge_states

__all__ = ["normalize_biases", "remove_biases"]

Model = TypeVar("Model", nn.Module, Mapping[str, torch.Tensor])


def bias_names(state: State) -> list[str]:
    """The biases of linear and convolution layers, in the state's order; those of norms are none."""
    names = []
    for name in state:
        if name == "bias" or name.endswith(".bias"):
            weight = state.get(f"{name[: -len('bias')]}weight")
            if weight is not None and weight.ndim >= 2:
                names.append(name)
    return names


def _depths(state: State) -> dict[str, int]:
    """Bias name -> depth, 1 for the first layer: matrices and kernels counted in the state's order."""
    weights = [n for n, t in state.items() if t.ndim >= 2 and n.rsplit(".", 1)[-1] == "weight"]
    depth = {name[: -len("weight")] + "bias": k for k, name in enumerate(weights, start=1)}
    return {name: depth[name] for name in bias_names(state)}


def normalize_biases(models: Sequence[Model], weights: Sequence[float] | None = None) -> Model:
    """A merge of plain networks whose biases keep pace with their shrinking activations; no data is read.

    Weights are averaged; layer h's bias is ``sum_k alpha_k^h b_k`` (Qu and Horvath 2024): between unmatched
    halves, h layers of averaged weights scale a ReLU network's signal by ``alpha^h``, and linear biases would
    drown it.

    Example:
        >>> merged = fm.normalize_biases([model_a, model_b_aligned])

    Args:
        models: modules or state dicts of one architecture without norms, aligned, layers in forward order.
        weights: one a model, 0 to 1; equal ones where left out.
    """
    if not models:
        raise ValueError("models: expected at least one")
    states = [state_of(m, f"models[{k}]") for k, m in enumerate(models)]
    alphas = check_weights(weights, len(states))
    if min(alphas) < 0:
        raise ValueError(f"weights: powers of weights need weights of 0 at least, got {alphas}")
    merged = merge_states(states, alphas)
    for name, depth in _depths(states[0]).items():
        powers = merge_states([{name: s[name]} for s in states], [a**depth for a in alphas])
        merged[name] = powers[name]
    first = models[0]
    if isinstance(first, nn.Module):
        return remember_weights(with_state(first, merged), alphas)
    return merged


def remove_biases(model: Model, last: int | None = None) -> Model:
    """A copy of ``model`` with the biases of its ``last`` layers zero, or of all where left out; no data is read.

    Args:
        model: a module or state dict, layers in forward order.
        last: how many biases, counted from the end.
    """
    state = state_of(model, "model")
    names = bias_names(state)
    if last is not None and not 0 <= last <= len(names):
        raise ValueError(f"last: expected 0 to {len(names)}, the number of biases, got {last}")
    removed = names if last is None else names[len(names) - last :]
    new = {name: torch.zeros_like(t) if name in removed else t.clone() for name, t in state.items()}
    if isinstance(model, nn.Module):
        return with_state(model, new)
    return new
