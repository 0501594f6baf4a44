"""Batch norms in merges whose units are mixtures: a mixture of normalized channels has no scale of its own.

A rule such as CCA maps the normalized channels ``D (W x - mean) + beta`` of a model, with ``D = weight / sqrt(running_var +
eps)``. The map of ``D W`` is a layer again, but the map of ``D`` is not diagonal, so no batch norm has it. So the layers are
mapped with their scales inside, and the batch norm keeps the first model's scale, which is taken out of the layer again:
``W`` becomes ``D_0^-1 R_k D_k W_k``. The first model's part is what it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import nn

from fastmatch._internal.states import State, working_dtype
from fastmatch.merging.units import UnitMaps
from fastmatch.spec.graph import Structure

__all__ = ["NormedLayer", "normed_layers", "scale_layers", "unscale_layers"]

DEAD, DEAD_IN_HALF = 1e-12, 1e-4
"""A batch norm's weight below this share of its largest one: the channel's row is the first model's, because what is divided by so
small a scale, or its square, may not be a number of the parameter's type. The second is for types that end at 65,504."""

LINEAR = (nn.Linear, nn.modules.conv._ConvNd)
"""Layers whose outputs are scaled by scaling their weights and biases."""


@dataclass(frozen=True)
class NormedLayer:
    """A layer whose outputs go to one batch norm and nowhere else.

    Attributes:
        norm: the batch norm's name.
        eps: what it adds to the variance.
        scaled: the (tensor, dimension) pairs that have the units of the layer's output.
    """

    norm: str
    eps: float
    scaled: tuple[tuple[str, int], ...]

    def scale(self, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return D, float64."""
        weight, variance = state[f"{self.norm}.weight"], state[f"{self.norm}.running_var"]
        return weight.double() / (variance.double() + self.eps).sqrt()


def normed_layers(
    structure: Structure, merged: Iterable[str], maps: Mapping[str, UnitMaps]
) -> list[NormedLayer]:
    """Return the layers before batch norms whose units are mixed.

    Args:
        structure: the traced graph.
        merged: the names of the parameters and buffers that are merged.
        maps: group -> how its units are merged.
    """
    merged, module = set(merged), structure.module
    modules, state = dict(module.named_modules()), module.state_dict()
    nodes = [node for node in module.graph.nodes if node.op in ("call_module", "get_attr")]
    uses = Counter(str(node.target) for node in nodes)
    holders = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    found = []
    for node in nodes:
        norm, layer = modules.get(str(node.target)), next(iter(node.all_input_nodes), node)
        before = modules.get(str(layer.target))
        if not (_has_scale(norm) and isinstance(before, LINEAR) and len(layer.users) == 1):
            continue
        names = [f"{layer.target}.weight", f"{layer.target}.bias", f"{node.target}.weight"]
        reused = any(uses[str(x)] > 1 for x in (node.target, layer.target)) or any(uses[x] for x in names)
        tied = any(holders[id(p)] > 1 for p in (*before.parameters(), *norm.parameters()))
        groups = {group for _, group in structure.spec.axes_of(names[2])}
        mixes = any(maps[group].spread is None for group in groups & maps.keys())
        held = [name for name in names[:2] if name in state]
        scaled = dict.fromkeys(
            (name, axis.dim)
            for name in held
            for axis, group in structure.spec.axes_of(name)
            if group in groups
            and (name, axis.dim) not in structure.inputs
            and state[name].shape[axis.dim] == norm.num_features
        )
        # A weight that is computed from others, or whose channels are several dimensions, is not scaled; nor is its bias then.
        whole = names[0] in held and {name for name, _ in scaled} == set(held)
        if mixes and whole and not (reused or tied) and {*held, names[2]} <= merged:
            found.append(
                NormedLayer(str(node.target), norm.eps, (*scaled, (f"{node.target}.running_mean", 0)))
            )
    return found


def _has_scale(module: nn.Module | None) -> TypeGuard[nn.modules.batchnorm._BatchNorm]:
    return (
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.weight is not None
        and module.running_var is not None
    )


def scale_layers(state: State, layers: Iterable[NormedLayer]) -> State:
    """Return a model's state with the scales of batch norms in the layers before them, in float32 or wider."""
    new = dict(state)
    for layer in layers:
        _multiply(new, layer, layer.scale(state))
    return new


def unscale_layers(merged: State, layers: Iterable[NormedLayer], first: State) -> State:
    """Return a merged state with the first model's scales in its batch norms, and not in the layers before them."""
    new = dict(merged)
    for layer in layers:
        for name in (f"{layer.norm}.weight", f"{layer.norm}.running_var"):
            new[name] = first[name]
        weight, scale = first[f"{layer.norm}.weight"].abs(), layer.scale(first)
        share = DEAD if torch.finfo(weight.dtype).max > 1e30 else DEAD_IN_HALF
        alive = weight > share * weight.max()
        _multiply(new, layer, torch.where(alive, 1 / torch.where(alive, scale, 1.0), 0.0))
        for name, dim in layer.scaled:
            new[name] = torch.where(_along(alive, new[name], dim), new[name], first[name].to(new[name].dtype))
    return new


def _along(values: torch.Tensor, tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Return a vector in a shape that goes along a dimension of a tensor."""
    shape = [1] * tensor.ndim
    shape[dim] = -1
    return values.view(shape)


def _multiply(state: dict[str, torch.Tensor], layer: NormedLayer, factors: torch.Tensor) -> None:
    for name, dim in layer.scaled:
        work = working_dtype(state[name].dtype)
        state[name] = state[name].to(work) * _along(factors.to(work), state[name], dim)
