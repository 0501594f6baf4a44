"""How far a merge's outputs are from its endpoints'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fastmatch._internal.batches import Forward, collated, evaluating, samples_in, split_batch
from fastmatch.renorm.probes import Probe, features

__all__ = ["PREFERENCE", "Disagreement", "disagreement", "is_held_out"]

PREFERENCE = 0.9
"""Another method than the first one must have an angle smaller by this factor. Angles of equally good methods differ by
some percent (bench/results/renormalization_choice.md)."""


class Disagreement(NamedTuple):
    """How a merge's outputs differ from the weighted mean of the endpoints' outputs; less is better.

    Attributes:
        choices: fraction of samples with another largest output. 0 unless the data has one class per sample and the
            outputs have one number per class.
        angle: mean over samples of one minus the cosine between the two outputs, each less its own mean, so that
            their scale does not count.
    """

    choices: float
    angle: float

    def __str__(self) -> str:
        return f"{self.choices:.1%} other, angle {self.angle:.3g}"


def disagreement(
    model: nn.Module, probes: Sequence[Probe], weights: Sequence[float], forward: Forward, *, every: int = 1
) -> Disagreement | None:
    """Return how far a merge's outputs are from the endpoints' on the probes; None if outputs cannot be compared.

    Of all samples, each ``every``-th one counts.
    """
    count, other, angle, seen = 0, 0.0, 0.0, 0
    with evaluating(model):
        for probe in probes:
            ours = features(forward(model, probe.batch))
            if ours is None or any(k is None or k.shape != ours.shape for k in probe.outputs):
                return None
            theirs = sum(
                w * k.to(ours.device) for w, k in zip(weights, probe.outputs, strict=True) if k is not None
            )
            assert isinstance(theirs, torch.Tensor)
            has_classes = _is_classification(probe.batch, ours)
            if every > 1:
                size = samples_in(probe.batch)
                counts = is_held_out(seen, size, every).repeat_interleave(len(ours) // size).to(ours.device)
                ours, theirs, seen = ours[counts], theirs[counts], seen + size
            if not len(ours):
                continue
            count += len(ours)
            if has_classes:
                other += float((ours.argmax(1) != theirs.argmax(1)).sum())
            angle += _angle(ours, theirs) * len(ours)
    return Disagreement(other / count, angle / count) if count else None


def is_held_out(first: int, size: int, every: int) -> torch.Tensor:
    """Return (size,) True for each ``every``-th sample of all, where ``first`` samples came before."""
    return torch.arange(first, first + size) % every == every - 1


def _angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return one minus the mean cosine of rows less their means; of columns where there are one or two features."""
    if a.shape[1] < 3:
        a, b = a.T, b.T
    a, b = (x.double() - x.double().mean(1, keepdim=True) for x in (a, b))
    return float(1 - torch.nan_to_num(torch.cosine_similarity(a, b, dim=1), nan=-1.0).mean())


def _is_classification(batch: Any, outputs: torch.Tensor) -> bool:
    """Return whether a batch has one class per sample as its targets, and outputs have a number per class."""
    batch = collated(batch)
    if isinstance(batch, (tuple, list)) and len(batch) != 2:
        return False
    targets = split_batch(batch)[1]
    if not isinstance(targets, torch.Tensor):
        return False
    integers = not (targets.is_floating_point() or targets.is_complex())
    fits = targets.ndim == 1 and len(targets) == len(outputs) and outputs.shape[1] > 1
    return integers and fits and (len(targets) == 0 or int(targets.max()) < outputs.shape[1])
