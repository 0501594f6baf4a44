"""The biases of linear and convolution layers: their depth in the network, and their removal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import fx, nn

from fastmatch._internal.modules import with_state
from fastmatch._internal.states import State, state_of
from fastmatch.renorm.norms import is_norm

__all__ = ["bias_depths", "norms_in", "remove_biases", "zeroed_biases"]

Model = TypeVar("Model", nn.Module, Mapping[str, torch.Tensor])


_WEIGHT = re.compile(
    r"(?P<layer>(?:.*\.)?)(?:weight|weight_orig|weight_v|parametrizations\.weight\.original[01]?)"
)
"""A layer's weight, or what torch.nn.utils computes it from: masked, spectral_norm, weight_norm, parametrized."""
_BIAS = re.compile(r"(?P<layer>(?:.*\.)?)(?:bias|bias_orig|parametrizations\.bias\.original)")


def _layers(state: State) -> list[str]:
    """Return the paths of linear and convolution layers, each empty or ending in a dot, in the state's order. Norms are not included."""
    found = {m["layer"]: None for name, t in state.items() if t.ndim >= 2 and (m := _WEIGHT.fullmatch(name))}
    return list(found)


def _bias_names(state: State) -> dict[str, str]:
    """Return bias name -> its layer, for linear and convolution layers, in the state's order."""
    layers = set(_layers(state))
    matches = {name: _BIAS.fullmatch(name) for name in state}
    return {name: m["layer"] for name, m in matches.items() if m and m["layer"] in layers}


def bias_depths(model: nn.Module | State) -> dict[str, int]:
    """Return bias name -> depth: the number of linear and convolution layers on the longest path to its layer's output.

    The paths are those of the graph that ``torch.fx`` traces. For a state dict, or a module that ``torch.fx`` cannot
    follow, layers are counted in the state's order.
    """
    state = state_of(model, "model")
    layers = _layers(state)
    traced = _traced_depths(model, set(layers)) if isinstance(model, nn.Module) else {}
    depth = {layer: traced.get(layer, k) for k, layer in enumerate(layers, start=1)}
    return {name: depth[layer] for name, layer in _bias_names(state).items()}


def _traced_depths(model: nn.Module, layers: set[str]) -> dict[str, int]:
    """Return layer -> depth for the layers on the graph; nothing if the model cannot be traced."""
    try:
        graph = model.graph if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model).graph
    except Exception:  # whatever the model's own code does with a proxy
        return {}
    depths: dict[str, int] = {}
    reached: dict[fx.Node, int] = {}
    for node in graph.nodes:
        reached[node] = max((reached[n] for n in node.all_input_nodes), default=0)
        if node.op == "call_module":
            own = [layer for layer in layers if layer.startswith(f"{node.target}.")]
        else:  # a weight that a function takes
            read = (str(n.target) for n in node.all_input_nodes if n.op == "get_attr")
            own = [m["layer"] for name in read if (m := _WEIGHT.fullmatch(name)) and m["layer"] in layers]
        for layer in own:
            reached[node] += 1
            depths[layer] = max(depths.get(layer, 0), reached[node])
    return depths


def norms_in(model: nn.Module | State) -> list[str]:
    """Return the names of the norms of a model; in a state dict, of the parts with running statistics or a vector weight."""
    if isinstance(model, nn.Module):
        return [name for name, module in model.named_modules() if is_norm(module)]
    found = [
        n for n, t in model.items() if n.endswith("running_var") or (n.endswith("weight") and t.ndim == 1)
    ]
    return list(dict.fromkeys(n.rpartition(".")[0] for n in found))


def zeroed_biases(state: State, last: int | None = None) -> dict[str, torch.Tensor]:
    """Return zeros for the biases of the ``last`` layers, or of all layers for None."""
    names = list(_bias_names(state))
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
