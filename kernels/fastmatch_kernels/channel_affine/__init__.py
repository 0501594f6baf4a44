"""Renormalization of a layer's output by its own statistics: ``channel_affine``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmatch_kernels._dispatch import Backend, Operation, backend_of, check_choice, check_floating
from fastmatch_kernels.channel_affine.reference import AffineArguments, Method

__all__ = ["channel_affine"]


def _fake(arguments: AffineArguments) -> tuple[Tensor, Tensor]:
    return torch.empty_like(arguments.goal_mean), torch.empty_like(arguments.goal_mean)


_channel_affine = Operation(
    "channel_affine", AffineArguments, _fake, returns=tuple[Tensor, Tensor], mutates=("out",)
)


def channel_affine(
    x: Tensor,
    goal_mean: Tensor,
    goal_std: Tensor,
    method: Method = "repair",
    *,
    dim: int = 1,
    eps: float = 1e-5,
    out: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Map each channel of a layer's output to target statistics; return the result and the statistics that it had.

    With mean mu and population variance v of a channel and ``g = goal_std / sqrt(v + eps)``: repair is
    ``(x - mu) g + goal_mean``, rescale ``x g`` and reshift ``x - mu + goal_mean``.

    Example:
        >>> from fastmatch_kernels.ops import channel_affine
        >>> z = torch.randn(8, 3, 4, 4)
        >>> mapped, mean, variance = channel_affine(z, torch.zeros(3), torch.ones(3), "repair")
        >>> torch.allclose(mapped.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
        True

    Args:
        x: (B, C, *spatial) with channels at ``dim`` and at least one sample; float64 not on "triton". Any strides.
            NaN and inf stay in their channel.
        goal_mean: (C,) target means, converted to float64.
        goal_std: (C,) target standard deviations, converted to float64.
        method: "repair", "rescale" or "reshift".
        dim: dimension of the channels.
        eps: added to the variance.
        out: like ``x``, written and returned; may be ``x``.
        backend: "triton", "cpu" or "reference"; by the tensors' device if None.

    Returns:
        (out, mean (C,) float64, population variance (C,) float64).

    Raises:
        TypeError: ``x`` is not a floating point tensor.
        ValueError: shapes, devices or options that do not fit.
    """
    check_floating("x", x)
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"x: expected a dimension {dim}, got shape {tuple(x.shape)}")
    check_choice("method", method, Method)
    if x.numel() == 0:
        raise ValueError(f"x: expected at least one sample and channel, got shape {tuple(x.shape)}")
    for name, goal in (("goal_mean", goal_mean), ("goal_std", goal_std)):
        if goal.shape != (x.shape[dim],):
            raise ValueError(f"{name}: expected {x.shape[dim]} numbers, got shape {tuple(goal.shape)}")
    chosen = backend_of(x, goal_mean, goal_std, backend=backend)
    if out is None:
        out = torch.empty_like(x)
    elif out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(f"out: expected a tensor like x, got {tuple(out.shape)} of {out.dtype}")
    goals = (goal_mean.detach().double(), goal_std.detach().double())
    mean, variance = _channel_affine(AffineArguments(x.detach(), dim, *goals, method, eps, out), chosen)
    return out, mean, variance
