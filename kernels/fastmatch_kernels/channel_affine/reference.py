"""Renormalization of a layer's output in one go: its statistics, and the affine map to its goals; plain torch.

With the batch's mean mu and population variance v, and ``g = sigma* / sqrt(v + eps)``:
repair ``(z - mu) g + mu*``, rescale ``z g``, reshift ``z - mu + mu*`` (see fastmatch.renorm).
"""

from __future__ import annotations

import torch

__all__ = ["METHODS", "affine_of", "channel_affine", "fold"]

METHODS = ("repair", "rescale", "reshift")


def affine_of(
    mean: torch.Tensor,
    variance: torch.Tensor,
    goal_mean: torch.Tensor,
    goal_std: torch.Tensor,
    method: str,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, shift), (C,) each, with ``z' = scale z + shift``."""
    gain = goal_std / (variance + eps).sqrt()
    if method == "repair":
        return gain, goal_mean - gain * mean
    if method == "rescale":
        return gain, torch.zeros_like(mean)
    return torch.ones_like(mean), goal_mean - mean


def channel_affine(
    x: torch.Tensor,
    dim: int,
    goal_mean: torch.Tensor,
    goal_std: torch.Tensor,
    method: str,
    eps: float,
    out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes ``x`` brought to its goals to ``out`` and returns its (mean, population variance), float64.

    Args:
        x: (B, C, *spatial), channels at ``dim``, at least one sample.
        goal_mean, goal_std: (C,) float64.
        method: one of :data:`METHODS`.
        eps: added to the variance.
        out: like x; may be x.
    """
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
    """(weight, bias) of a layer whose output is ``scale z + shift``: ``scale W`` and ``scale b + shift``.

    One read and one write of the weight, output channels first; in float64 inside, returned in its dtype.
    """
    rows = scale.to(weight.device).view(-1, *[1] * (weight.ndim - 1))
    start = torch.zeros_like(scale) if bias is None else bias.double()
    return (weight.double() * rows).to(weight.dtype), (scale * start + shift).to(weight.dtype)
