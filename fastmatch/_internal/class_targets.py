"""Refuse what cross entropy takes without a word although it means nothing there."""

from __future__ import annotations

import torch

__all__ = ["check_class_outputs", "check_class_targets"]

TOLERANCE = 1e-2
"""By which a row of class probabilities may sum to other than one: half precision rounds."""


def check_class_outputs(output: torch.Tensor, expected: str) -> None:
    """Raise ValueError if there is one class: its cross entropy is zero whatever the output is."""
    if output.ndim > 1 and output.shape[1] == 1:
        raise ValueError(
            f"{expected}; the model has one output {tuple(output.shape)}, whose cross entropy is always zero"
        )


def check_class_targets(targets: torch.Tensor, expected: str) -> None:
    """Raise ValueError if targets are floating point numbers, but not probabilities of classes."""
    if not targets.is_floating_point() or targets.ndim < 2 or not targets.numel():
        return
    sums = targets.float().sum(1)
    if bool((targets < 0).any()) or not bool(((sums - 1).abs() < TOLERANCE).all()):
        raise ValueError(
            f"{expected}; the targets {tuple(targets.shape)} are numbers that are no probabilities of classes (not negative, and one in sum)"
        )
