"""How far a merge's outputs are from its endpoints'."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fastmatch._internal.batches import Forward, collated, evaluating, split_batch
from fastmatch.renorm.probes import Probe, features

__all__ = ["PREFERENCE", "Disagreement", "disagreement"]

PREFERENCE = 0.9
"""Another candidate than the preferred one must be nearer by this factor: REPAIR is preferred if the data has classes, and leaving the
merge alone if not. Distances of equally good methods differ by some percent (bench/results/renormalization_choice.md)."""


class Disagreement(NamedTuple):
    """How a merge's outputs differ from the weighted mean of the endpoints' outputs; less is better.

    Classes do not depend on the scale of the outputs, so ``choices`` and then ``angle`` count where the data has classes. Other outputs are the
    values themselves, or may be: there ``error`` alone counts.

    Attributes:
        choices: fraction of samples with another largest output. None unless the data has one class per sample and the
            outputs have one number per class.
        angle: mean over samples of one minus the cosine between the two outputs, each less its own mean, so that
            their scale does not count.
        error: sum of squared differences over the sum of squares of the endpoints' mean outputs.
    """

    choices: float | None
    angle: float
    error: float

    @property
    def has_classes(self) -> bool:
        """Whether the data has one class per sample."""
        return self.choices is not None

    def distance(self, factor: float = 1.0) -> tuple[float, float]:
        """Return what is compared, the first number before the second; the second is multiplied by ``factor``."""
        if self.choices is None:
            return 0.0, self.error * factor
        return self.choices, self.angle * factor

    def __str__(self) -> str:
        if self.choices is None:
            return f"squared error {self.error:.3g}"
        return f"{self.choices:.1%} other, angle {self.angle:.3g}"


def disagreement(
    model: nn.Module,
    probes: Sequence[Probe],
    weights: Sequence[float],
    forward: Forward,
    *,
    held_out: Sequence[torch.Tensor] | None = None,
) -> Disagreement | None:
    """Return how far a merge's outputs are from the endpoints' on the probes; None if outputs cannot be compared.

    With ``held_out``, only the samples count for which it is True: (samples,) for each probe.
    """
    count, other, angle, error, size = 0, 0.0, 0.0, 0.0, 0.0
    has_classes = True
    with evaluating(model):
        for k, probe in enumerate(probes):
            if held_out is not None and not bool(held_out[k].any()):
                continue
            ours = features(forward(model, probe.batch))
            if ours is None or any(k is None or k.shape != ours.shape for k in probe.outputs):
                return None
            theirs = sum(
                w * k.to(ours.device) for w, k in zip(weights, probe.outputs, strict=True) if k is not None
            )
            assert isinstance(theirs, torch.Tensor)
            has_classes = has_classes and _is_classification(probe.batch, ours)
            if held_out is not None:
                counts = held_out[k].repeat_interleave(len(ours) // len(held_out[k])).to(ours.device)
                ours, theirs = ours[counts], theirs[counts]
            count += len(ours)
            if has_classes:
                other += float((ours.argmax(1) != theirs.argmax(1)).sum())
            angle += _angle(ours, theirs) * len(ours)
            error += float((ours.double() - theirs.double()).square().sum())
            size += float(theirs.double().square().sum())
    if not count:
        return None
    error = error / size if size else error
    return Disagreement(
        other / count if has_classes else None, angle / count, math.inf if math.isnan(error) else error
    )


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
