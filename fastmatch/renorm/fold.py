"""The affine map that gives a layer's output its target statistics: on activations, or folded into the layer.

The scale and shift of each method (REPAIR, RESCALE, RESHIFT) come from ``fastmatch_kernels.channel_affine``, so
that the map on activations and the folded form are one formula.
"""

from __future__ import annotations

import torch
from torch import nn

from fastmatch._internal.states import working_dtype
from fastmatch.renorm.harm import harmed
from fastmatch.renorm.layers import Layer, bias_mask, by_outputs, channel_dim, raw_bias, raw_weight
from fastmatch.renorm.targets import EPS, Target
from fastmatch.statistics.moments import ChannelMoments
from fastmatch_kernels.channel_affine.reference import Method, affine_of
from fastmatch_kernels.channel_affine.reference import fold as folded
from fastmatch_kernels.ops import channel_affine

__all__ = ["bring_to_target", "fold"]


def _affine(
    layer: Layer, moments: ChannelMoments, target: Target, method: Method
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (scale, shift, kept) for a layer's output.

    The shift is zero where a pruned bias is masked. ``kept`` is True for the channels that keep gain one because theirs
    would do harm; methods that shift still bring their means to the target.
    """
    target = Target(*(t.to(moments.mean.device) for t in target))
    scale, shift = _masked(layer, *affine_of(moments.mean, moments.variance, *target, method, EPS))
    kept = harmed(moments, target, scale, shift)
    if method == "repair":
        alone = _masked(layer, torch.ones_like(scale), target.mean - moments.mean)
    else:
        alone = torch.ones_like(scale), torch.zeros_like(shift)
    if method != "reshift":
        scale, shift = (torch.where(kept, x, y) for x, y in zip(alone, (scale, shift), strict=True))
    return scale, shift, kept & (method != "reshift")


def _masked(layer: Layer, scale: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mask = bias_mask(layer)
    return scale, shift if mask is None else shift * mask.to(shift)


def bring_to_target(
    layer: Layer, outputs: list[torch.Tensor], target: Target, method: Method
) -> tuple[list[torch.Tensor], ChannelMoments]:
    """Map outputs of one layer so that their pooled statistics are the target's.

    Returns:
        The new outputs, and the statistics that the outputs had before.
    """
    moments = ChannelMoments()
    if (
        len(outputs) == 1
        and outputs[0].numel()
        and bias_mask(layer) is None
        and outputs[0].device.type == "cpu"
    ):
        # The kernel reads the output once for statistics and map; the plain form below reads it twice. On a GPU it would
        # have to wait for ``kept``, which takes longer than to read an output of 50 MB again.
        output = outputs[0]
        dim = channel_dim(layer, output)
        goal_mean, goal_std = (t.to(output.device) for t in target)
        new, mean, variance = channel_affine(output, goal_mean, goal_std, method, dim=dim, eps=EPS)
        count = output.numel() // output.shape[dim]
        moments = ChannelMoments(count, mean, variance * count)
        scale, shift, kept = _affine(layer, moments, target, method)
        if not bool(kept.any()):
            return [new], moments
    else:
        for output in outputs:
            moments.update(output, channel_dim(layer, output))
        if moments.count == 0:
            return outputs, moments
        scale, shift, _ = _affine(layer, moments, target, method)
    news = []
    for output in outputs:
        shape = [1] * output.ndim
        shape[channel_dim(layer, output)] = -1
        work = working_dtype(output.dtype)
        if output.is_cuda and output.dtype == work:  # one read and one write
            news.append(torch.addcmul(shift.to(work).view(shape), output, scale.to(work).view(shape)))
            continue
        new = output.to(work) * scale.to(work).view(shape) + shift.to(work).view(shape)
        news.append(new.to(output.dtype))
    return news, moments


def fold(layer: Layer, moments: ChannelMoments, target: Target, method: Method) -> torch.Tensor:
    """Change a layer's weight and bias in place so that its output has the target statistics; masks stay.

    Args:
        layer: a linear or convolution layer with C output channels.
        moments: the statistics that the output has now.
        target: the statistics that it shall have.
        method: ``"repair"``, ``"rescale"`` or ``"reshift"``.

    Returns:
        (C,) True for the channels that keep gain one, because theirs would do harm (:mod:`fastmatch.renorm.harm`).
    """
    weight = raw_weight(layer)
    assert weight is not None
    scale, shift, kept = (x.to(weight.device) for x in _affine(layer, moments, target, method))
    own = dict(layer.named_parameters(recurse=False))
    bias = raw_bias(layer)
    with torch.no_grad():
        rows = by_outputs(layer, weight.detach())
        new_weight, new_bias = folded(rows, None if bias is None else bias.detach(), scale, shift)
        if method != "reshift":
            weight.copy_(by_outputs(layer, new_weight))
        if bias is not None:
            bias.copy_(new_bias)
        elif method != "rescale":
            layer.bias = nn.Parameter(new_bias, requires_grad=weight.requires_grad)
        # torch.nn.utils.prune keeps the masked product as a plain attribute until the next forward pass.
        for name in ("weight", "bias"):
            if f"{name}_orig" in own:
                setattr(layer, name, own[f"{name}_orig"].detach() * getattr(layer, f"{name}_mask"))
    return kept
