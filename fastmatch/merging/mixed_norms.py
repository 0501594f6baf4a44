"""Batch norms in merges whose units are mixtures: a mixture of normalized channels has no scale of its own.

A rule such as CCA maps the normalized channels ``D (W x - mean) + beta`` of a model, with ``D = weight / sqrt(running_var +
eps)``. The map of ``D W`` is a layer again, but the map of ``D`` is not diagonal, so no batch norm has it. So the layers are
mapped with their scales inside, and the batch norm keeps the first model's scale, which is taken out of the layer again:
``W`` becomes ``D_0^-1 R_k D_k W_k``. The first model's part is what it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import nn

from fastmatch._internal.states import State, working_dtype
from fastmatch.merging.units import UnitMaps
from fastmatch.spec.graph import Structure

__all__ = ["NormedLayer", "normed_layers", "scale_layers", "unscale_layers"]

DEAD = 1e-4
"""A channel whose scale is below this share of the largest stays as dead as it is in the first model."""

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
    merged, modules = set(merged), dict(structure.module.named_modules())
    calls = [node for node in structure.module.graph.nodes if node.op == "call_module"]
    targets = [node.target for node in calls]
    found = []
    for node in calls:
        norm, layer = modules[str(node.target)], next(iter(node.all_input_nodes), node)
        if not _has_scale(norm) or layer.op != "call_module" or len(layer.users) > 1:
            continue
        if not isinstance(modules[str(layer.target)], LINEAR):
            continue
        if targets.count(node.target) > 1 or targets.count(layer.target) > 1:
            continue
        weight = f"{node.target}.weight"
        groups = {group for _, group in structure.spec.axes_of(weight)}
        if not any(maps[group].spread is None for group in groups & maps.keys()):
            continue
        size, state = norm.num_features, structure.module.state_dict()
        scaled = [(f"{node.target}.running_mean", 0)] + [
            (name, axis.dim)
            for name in (f"{layer.target}.weight", f"{layer.target}.bias")
            if name in state
            for axis, group in structure.spec.axes_of(name)
            if group in groups
            and (name, axis.dim) not in structure.inputs
            and state[name].shape[axis.dim] == size
        ]
        if len(scaled) > 1 and {weight, *(name for name, _ in scaled)} <= merged:
            found.append(NormedLayer(str(node.target), norm.eps, tuple(scaled)))
    return found


def _has_scale(module: nn.Module) -> TypeGuard[nn.modules.batchnorm._BatchNorm]:
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
        scale = layer.scale(first)
        alive = scale.abs() > DEAD * scale.abs().max()
        _multiply(new, layer, torch.where(alive, 1 / torch.where(alive, scale, 1.0), 0.0))
    return new


def _multiply(state: dict[str, torch.Tensor], layer: NormedLayer, factors: torch.Tensor) -> None:
    for name, dim in layer.scaled:
        shape = [1] * state[name].ndim
        shape[dim] = -1
        work = working_dtype(state[name].dtype)
        state[name] = state[name].to(work) * factors.to(work).view(shape)
