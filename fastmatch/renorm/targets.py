"""Target statistics: the mean and standard deviation that a layer's output should have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastmatch.statistics.moments import ChannelMoments

__all__ = ["EPS", "Target", "layer_average", "mixed_target"]

EPS = 1e-5
"""Added to every variance, as in batch norm and the published code. It is added to both sides of the ratio, so a
network renormalized to its own statistics does not change, constant channels included."""


class Target(NamedTuple):
    """Target statistics of one layer: mu* and sigma*, (C,) float64 each."""

    mean: torch.Tensor
    std: torch.Tensor


def mixed_target(
    moments: Sequence[ChannelMoments], weights: Sequence[float], std_factor: float = 1.0
) -> Target:
    """``mu* = sum_k w_k mu_k`` and ``sigma* = std_factor sum_k w_k sqrt(v_k + eps)`` of one layer.

    Args:
        moments: those of the layer in each endpoint.
        weights: one per endpoint.
        std_factor: multiplies sigma*.
    """
    mean = torch.stack([w * m.mean for w, m in zip(weights, moments, strict=True)]).sum(0)
    std = torch.stack([w * (m.variance + EPS).sqrt() for w, m in zip(weights, moments, strict=True)])
    return Target(mean, std_factor * std.sum(0))


def layer_average(target: Target) -> Target:
    """Return a target whose channels differ only in the signs of their means: mean ``|mu*|`` and mean ``sigma*``."""
    mean = target.mean.abs().mean() * target.mean.sign()
    return Target(mean, target.std.mean().expand_as(target.std).clone())
