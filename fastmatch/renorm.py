"""Renormalization of a merged network: REPAIR, RESCALE, RESHIFT and RESET.

A merge of aligned networks has activations of too small a variance (Jordan et al. 2022, REPAIR). Each
method brings the statistics of every linear and convolution output, before norm and activation, to goals
made of the endpoints' statistics: ``mu* = sum_k alpha_k mu_k`` and ``sigma* = sum_k alpha_k sigma_k``
(Qu and Horvath 2024, arXiv 2402.05966). With the merge's own mean mu and variance v,
``g = sigma* / sqrt(v + eps)`` and ``sigma_k = sqrt(v_k + eps)``:

=========  ======================  ===============================
method     forward form            folded into weight W and bias b
=========  ======================  ===============================
repair     (z - mu) g + mu*        W' = g W, b' = mu* + g (b - mu)
rescale    z g                     W' = g W, b' = g b
reshift    z - mu + mu*            b' = b - mu + mu*
reset      batch norm's running statistics, measured anew
=========  ======================  ===============================
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from fastmatch.batches import Forward, batches_of, check_module, default_forward, evaluating
from fastmatch.kernels.reference.channel_affine import affine_of
from fastmatch.merge import check_weights
from fastmatch.moments import ChannelMoments
from fastmatch.states import check_same_architecture, state_of

__all__ = ["METHODS", "EndpointStatistics", "endpoint_statistics", "renormalize"]

METHODS = ("repair", "rescale", "reshift", "reset")
EPS = 1e-5
"""Added to variances, as in batch norm and the published code; on both sides of the ratio, so that a
network renormalized to its own statistics stays what it is, constant channels included."""

Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class EndpointStatistics:
    """Per endpoint and layer, the statistics of the layer's output; measured once, used for every merge."""

    models: tuple[dict[str, ChannelMoments], ...]

    def goals(self, weights: Sequence[float]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Layer name -> (mu*, sigma*), float64, for one weight an endpoint."""
        goals = {}
        for name in self.models[0]:
            mean = sum(w * m[name].mean for w, m in zip(weights, self.models, strict=True))
            std = sum(w * (m[name].variance + EPS).sqrt() for w, m in zip(weights, self.models, strict=True))
            assert isinstance(mean, torch.Tensor)
            assert isinstance(std, torch.Tensor)
            goals[name] = (mean, std)
        return goals


def renormalizable_layers(model: nn.Module, layers: Sequence[str] | None = None) -> dict[str, Layer]:
    """The linear and convolution layers by name, or those of ``layers``.

    Raises:
        ValueError: ``layers`` names something that is not one of them, or the model has none.
    """
    found: dict[str, Layer] = {n: m for n, m in model.named_modules() if isinstance(m, LAYERS)}
    if layers is not None:
        unknown = [n for n in layers if n not in found]
        if unknown:
            raise ValueError(
                f"layers: {unknown[0]!r} is no linear or convolution layer; there are {list(found)}"
            )
        found = {n: found[n] for n in found if n in set(layers)}
    if not found:
        raise ValueError("model: has no linear or convolution layer to renormalize")
    return found


def channel_dim(layer: nn.Module, output: torch.Tensor) -> int:
    """Where the channels of a layer's output lie: last for linear, before the positions for convolution."""
    if isinstance(layer, nn.Conv1d):
        return output.ndim - 2
    if isinstance(layer, nn.Conv2d):
        return output.ndim - 3
    if isinstance(layer, nn.Conv3d):
        return output.ndim - 4
    return output.ndim - 1


def endpoint_statistics(
    models: Sequence[nn.Module],
    data: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    forward: Forward = default_forward,
    progress: bool | None = None,
) -> EndpointStatistics:
    """Means and variances of every linear and convolution output of every endpoint, in one read of ``data``.

    Args:
        models: the endpoints, aligned; left as they are.
        data: a loader of inputs or (inputs, targets).
        layers: names of the layers to measure; all where left out.
        forward: how to run a model on a batch.
        progress: show a bar; None shows it on a terminal.
    """
    if not models:
        raise ValueError("endpoints: expected at least one model")
    for k, model in enumerate(models):
        check_module(model, f"endpoints[{k}]")
    tables: list[dict[str, ChannelMoments]] = []
    handles = []
    try:
        for model in models:
            table: dict[str, ChannelMoments] = {}
            for name, layer in renormalizable_layers(model, layers).items():
                table[name] = ChannelMoments()
                handles.append(layer.register_forward_hook(_measure(table[name])))
            tables.append(table)
        with evaluating(*models):
            for batch in batches_of(data, "endpoint statistics", progress=progress):
                for model in models:
                    forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    _require_seen(tables[0])
    return EndpointStatistics(tuple(tables))


def _measure(moments: ChannelMoments) -> Callable[..., None]:
    def hook(layer: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        moments.update(output, channel_dim(layer, output))

    return hook


def _require_seen(table: dict[str, ChannelMoments]) -> None:
    unseen = [name for name, moments in table.items() if moments.count == 0]
    if unseen:
        raise ValueError(
            f"layers: {unseen[0]!r} was never run on the data; name the layers to renormalize in layers="
        )


def renormalize(
    model: nn.Module,
    endpoints: Sequence[nn.Module] | EndpointStatistics | None,
    data: Iterable[Any],
    method: str = "repair",
    *,
    weights: Sequence[float] | None = None,
    layers: Sequence[str] | None = None,
    forward: Forward = default_forward,
    progress: bool | None = None,
) -> nn.Module:
    """A copy of a merged model whose activations have the endpoints' statistics again.

    Example:
        >>> merged = fm.merge([model_a, model_b_aligned])
        >>> merged = fm.renormalize(merged, [model_a, model_b_aligned], data=loader, method="repair")

    Joint mode: in one pass every layer sees the layers before it already brought to their goals by the
    statistics of the batch (as batch norm in training mode would), while its own are pooled over all
    batches; they are then folded into weights and biases. A missing bias is created where the method needs
    one. A batch's statistics stand in for the whole data's, so use large batches: with all data in one, a network
    renormalized to its own statistics stays itself; with small ones it comes out changed. Reads ``data`` once for the endpoints (not at all if given :class:`EndpointStatistics`, nor for
    ``"reset"``) and once for the merge.

    Args:
        model: the merge; left as it is.
        endpoints: the models that were merged, aligned, or their measured statistics. May be None for
            ``"reset"``, which does not look at them.
        data: a loader, iterated anew for each read.
        method: ``"repair"``, ``"rescale"``, ``"reshift"``, or ``"reset"`` for nets with batch norm.
        weights: the weights that the merge was made with, one an endpoint; equal ones where left out.
        layers: names of linear and convolution layers; all of them where left out (not for ``"reset"``).
        forward: how to run a model on a batch.
        progress: show a bar; None shows it on a terminal.

    Raises:
        ValueError: an unknown method, no batch norm for ``"reset"``, data that yields nothing, an endpoint
            of another architecture, or a layer that the data never reaches.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    check_module(model, "model")
    if method == "reset":
        return _reset(model, data, forward, progress)
    if endpoints is None:
        raise ValueError(f"endpoints: expected the merged models or their statistics for method {method!r}")
    if not isinstance(endpoints, EndpointStatistics):
        for k, endpoint in enumerate(endpoints):
            check_same_architecture(
                state_of(model, "model"), state_of(endpoint, f"endpoints[{k}]"), "model", f"endpoints[{k}]"
            )
        endpoints = endpoint_statistics(endpoints, data, layers=layers, forward=forward, progress=progress)
    goals = endpoints.goals(check_weights(weights, len(endpoints.models)))
    new = copy.deepcopy(model)
    targets = renormalizable_layers(new, layers)
    missing = [name for name in targets if name not in goals]
    if missing:
        raise ValueError(f"endpoints: have no statistics for layer {missing[0]!r}")
    measured = {name: ChannelMoments() for name in targets}
    handles = [
        layer.register_forward_hook(_normalize(measured[name], *goals[name], method))
        for name, layer in targets.items()
    ]
    try:
        with evaluating(new):
            for batch in batches_of(data, f"{method} of the merge", progress=progress):
                forward(new, batch)
    finally:
        for handle in handles:
            handle.remove()
    _require_seen(measured)
    for name, layer in targets.items():
        fold(layer, measured[name].mean, measured[name].variance, *goals[name], method)
    return new


def _normalize(
    moments: ChannelMoments, goal_mean: torch.Tensor, goal_std: torch.Tensor, method: str
) -> Callable[..., torch.Tensor]:
    """A forward hook: pools the output's statistics and returns it brought to the goals by this batch's."""

    def hook(layer: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        dim = channel_dim(layer, output)
        batch = ChannelMoments()
        batch.update(output, dim)
        if batch.count == 0:
            return output
        moments.merge(batch)
        scale, shift = affine_of(batch.mean, batch.variance, goal_mean, goal_std, method, EPS)
        shape = [1] * output.ndim
        shape[dim] = -1
        return output * scale.to(output.dtype).view(shape) + shift.to(output.dtype).view(shape)

    return hook


def fold(
    layer: Layer,
    mean: torch.Tensor,
    variance: torch.Tensor,
    goal_mean: torch.Tensor,
    goal_std: torch.Tensor,
    method: str,
) -> None:
    """Brings a layer's output to the goals by changing its weight and bias in place.

    Args:
        layer: a linear or convolution layer of C output channels.
        mean, variance: (C,), the output's own statistics as they are.
        goal_mean, goal_std: (C,), what they shall be.
        method: ``"repair"``, ``"rescale"`` or ``"reshift"``.
    """
    weight = layer.weight
    scale, shift = (x.to(weight.device) for x in affine_of(mean, variance, goal_mean, goal_std, method, EPS))
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.detach().double()
    with torch.no_grad():
        if method != "reshift":
            weight.copy_(weight.double() * scale.view(-1, *[1] * (weight.ndim - 1)))
        bias = (scale * bias + shift).to(weight.dtype)
        if layer.bias is not None:
            layer.bias.copy_(bias)
        elif method != "rescale":
            layer.bias = nn.Parameter(bias, requires_grad=weight.requires_grad)


def _reset(model: nn.Module, data: Iterable[Any], forward: Forward, progress: bool | None) -> nn.Module:
    """Batch norm's running statistics measured anew: pooled over all samples, upstream layers on batch statistics."""
    new = copy.deepcopy(model)
    norms = [m for m in new.modules() if isinstance(m, NORMS) and m.running_mean is not None]
    if not norms:
        raise ValueError(
            'model: method "reset" needs batch norm with running statistics, and there is none; '
            'use "repair" or "rescale"'
        )
    table = [ChannelMoments() for _ in norms]

    def measure(moments: ChannelMoments) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            moments.update(inputs[0], dim=1 if inputs[0].ndim > 1 else 0)

        return hook

    handles = [n.register_forward_pre_hook(measure(m)) for n, m in zip(norms, table, strict=True)]
    modes = [(module, module.training) for module in new.modules()]
    count = 0
    try:
        with evaluating(new):
            for norm in norms:
                norm.train()
            for batch in batches_of(data, "reset of the merge", progress=progress):
                forward(new, batch)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    with torch.no_grad():
        for norm, moments in zip(norms, table, strict=True):
            if moments.count == 0:
                continue
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.copy_(moments.mean)
            # The unbiased variance, as torch keeps it.
            norm.running_var.copy_(moments.m2 / max(moments.count - 1, 1))
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.fill_(count)
    return new
