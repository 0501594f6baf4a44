"""Renormalization of a layer's output in plain torch: its statistics, and the affine map to target statistics.

With the batch's mean mu and population variance v, targets mu* and sigma*, and ``g = sigma* / sqrt(v + eps)``:
repair ``(z - mu) g + mu*``, rescale ``z g``, reshift ``z - mu + mu*``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch

__all__ = ["METHODS", "AffineArguments", "Method", "affine_of", "channel_affine", "fold"]

Method: TypeAlias = Literal["repair", "rescale", "reshift"]
METHODS: tuple[Method, ...] = get_args(Method)
"""The kernels know a method by its position here."""


class AffineArguments(NamedTuple):
    """Checked arguments of :func:`fastmatch_kernels.ops.channel_affine`, whose backends return (mean, variance)."""

    x: torch.Tensor  # (B, C, *spatial) with channels at dim
    dim: int
    goal_mean: torch.Tensor  # (C,) float64
    goal_std: torch.Tensor  # (C,) float64
    method: str
    eps: float
    out: torch.Tensor  # like x; may be x


def affine_of(
    mean: torch.Tensor,
    variance: torch.Tensor,
    goal_mean: torch.Tensor,
    goal_std: torch.Tensor,
    method: str,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scale, shift), (C,) each, of the map ``z' = scale z + shift``."""
    gain = goal_std / (variance + eps).sqrt()
    if method == "repair":
        return gain, goal_mean - gain * mean
    if method == "rescale":
        return gain, torch.zeros_like(mean)
    return torch.ones_like(mean), goal_mean - mean


def channel_affine(arguments: AffineArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute in float64."""
    x, dim, goal_mean, goal_std, method, eps, out = arguments
    others = [d for d in range(x.ndim) if d != dim % x.ndim]
    variance, mean = torch.var_mean(x.double(), dim=others, correction=0)
    scale, shift = affine_of(mean, variance, goal_mean, goal_std, method, eps)
    shape = [1] * x.ndim
    shape[dim] = -1
    out.copy_(x.double() * scale.view(shape) + shift.view(shape))
    return mean, variance


def fold(
    weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor, shift: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (weight, bias) of a layer whose output is ``scale z + shift``: ``scale W`` and ``scale b + shift``.

    Args:
        weight: (C, ...) with output channels first. It is read once and written once.
        bias: (C,), or None for zeros.
        scale: (C,) float64.
        shift: (C,) float64.

    Returns:
        Both in the weight's dtype, computed in float64.
    """
    rows = scale.to(weight.device).view(-1, *[1] * (weight.ndim - 1))
    start = torch.zeros_like(scale) if bias is None else bias.double()
    return (weight.double() * rows).to(weight.dtype), (scale * start + shift).to(weight.dtype)
