"""Channels that a gain would harm: they keep gain one.

A gain restores a variance that shrank. Two kinds of channels have nothing to restore, and a gain takes them away from
their target:

- constant ones, such as a channel whose weights are all pruned: ``sigma* / sqrt(v + eps)`` is then decided by eps;
- channels that are almost constant around a mean which the method does not set. The gain multiplies that mean too.
"""

from __future__ import annotations

import torch

from fastmatch.renorm.targets import EPS, Target
from fastmatch.statistics.moments import ChannelMoments

__all__ = ["harmed"]

CONSTANT = 1e-3 * EPS
"""A variance below this changes no gain by more than 0.05%: eps alone decides it."""
LARGE_GAIN = 5.0
"""Gains up to this are what merging and moderate pruning ask for; they are always applied, as published. (Averaging K
units that are not correlated asks for sqrt(K).)"""
NO_GAIN = 0.01
"""A constant channel whose target is constant too has a gain of one up to this."""


def harmed(moments: ChannelMoments, target: Target, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return (C,) True for the channels that must keep gain one.

    A channel with a large gain keeps gain one if ``scale z + shift`` were farther from its target than the layer's worst
    channel is now, or farther than the channel itself is now by more than the layer's median. The distance is
    ``(mean - mu*)^2 + (std - sigma*)^2``.

    Args:
        moments: the statistics that the layer's output has.
        target: the statistics that it shall have.
        scale: (C,) float64.
        shift: (C,) float64.
    """
    std = (moments.variance + EPS).sqrt()
    before = (moments.mean - target.mean).square() + (std - target.std).square()
    after = (scale * moments.mean + shift - target.mean).square() + (scale * std - target.std).square()
    constant = (moments.variance < CONSTANT) & ((scale - 1).abs() > NO_GAIN)
    # The worst channel alone is no bound: one that is far off, for whatever reason, would let all others go as far.
    allowed = torch.minimum(before + before.median(), before.max())
    return constant | ((scale > LARGE_GAIN) & (after > allowed))
