"""The affine map to the goals, applied to a layer's output or folded into its weight and bias."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from fastmatch.renorm.layers import Layer, bias_mask, channel_dim, raw_weight
from fastmatch.statistics.moments import ChannelMoments
from fastmatch_kernels.channel_affine.reference import affine_of
from fastmatch_kernels.channel_affine.reference import fold as folded
from fastmatch_kernels.ops import channel_affine

__all__ = ["EPS", "Goal", "bring_to_goal", "fold"]

EPS = 1e-5
"""Added to variances, as in batch norm and the published code; on both sides of the ratio, so that a
network renormalized to its own statistics stays what it is, constant channels included."""

Goal = tuple[torch.Tensor, torch.Tensor]
"""(mu*, sigma*), (C,) float64 each."""


def _affine(layer: Layer, moments: ChannelMoments, goal: Goal, method: str) -> Goal:
    """(scale, shift) for a layer's output; where a pruned bias is masked nothing is added."""
    mean, std = (g.to(moments.mean.device) for g in goal)
    scale, shift = affine_of(moments.mean, moments.variance, mean, std, method, EPS)
    mask = bias_mask(layer)
    return scale, shift if mask is None else shift * mask.to(shift)


def bring_to_goal(
    layer: Layer, outputs: list[torch.Tensor], goal: Goal, method: str
) -> tuple[list[torch.Tensor], ChannelMoments]:
    """Outputs of one layer brought to the goal by their pooled statistics, and those statistics."""
    moments = ChannelMoments()
    if len(outputs) == 1 and outputs[0].numel() and bias_mask(layer) is None and _has_kernel(outputs[0]):
        # One read for statistics and map: the plain form reads three times.
        output = outputs[0]
        dim = channel_dim(layer, output)
        mean, std = (g.to(output.device) for g in goal)
        new, mean, variance = channel_affine(output, mean, std, method, dim=dim, eps=EPS)
        count = output.numel() // output.shape[dim]
        return [new], ChannelMoments(count, mean, variance * count)
    for output in outputs:
        moments.update(output, channel_dim(layer, output))
    if moments.count == 0:
        return outputs, moments
    scale, shift = _affine(layer, moments, goal, method)
    news = []
    for output in outputs:
        shape = [1] * output.ndim
        shape[channel_dim(layer, output)] = -1
        work = torch.promote_types(output.dtype, torch.float32)
        new = output.to(work) * scale.to(work).view(shape) + shift.to(work).view(shape)
        news.append(new.to(output.dtype))
    return news, moments


def _has_kernel(output: torch.Tensor) -> bool:
    if output.device.type == "cpu":
        return True
    # On a GPU the kernel is Triton's, an optional dependency, and not for float64.
    on_gpu = output.device.type == "cuda" and output.dtype != torch.float64
    return on_gpu and importlib.util.find_spec("triton") is not None


def fold(layer: Layer, moments: ChannelMoments, goal: Goal, method: str) -> None:
    """Brings a layer's output to the goal by changing its weight and bias in place; masks stay.

    Args:
        layer: a linear or convolution layer of C output channels.
        moments: the output's own statistics as they are.
        goal: (mu*, sigma*), what they shall be.
        method: ``"repair"``, ``"rescale"`` or ``"reshift"``.
    """
    weight = raw_weight(layer)
    assert weight is not None
    scale, shift = (x.to(weight.device) for x in _affine(layer, moments, goal, method))
    own = dict(layer.named_parameters(recurse=False))
    bias = own.get("bias", own.get("bias_orig"))
    with torch.no_grad():
        new_weight, new_bias = folded(weight.detach(), None if bias is None else bias.detach(), scale, shift)
        if method != "reshift":
            weight.copy_(new_weight)
        if bias is not None:
            bias.copy_(new_bias)
        elif method != "rescale":
            layer.bias = nn.Parameter(new_bias, requires_grad=weight.requires_grad)
        # torch.nn.utils.prune keeps the masked product as a plain attribute until the next forward pass.
        for name in ("weight", "bias"):
            if f"{name}_orig" in own:
                setattr(layer, name, own[f"{name}_orig"].detach() * getattr(layer, f"{name}_mask"))
