"""How far a merge's outputs are from its endpoints'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fastmatch._internal.batches import Forward, collated, evaluating, split_batch
from fastmatch.renorm.probes import Probe, features

__all__ = ["PREFERENCE", "Disagreement", "disagreement"]

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
    count, other, angle = 0, 0.0, 0.0
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
            has_classes = _is_classification(probe.batch, ours)
            if held_out is not None:
                counts = held_out[k].repeat_interleave(len(ours) // len(held_out[k])).to(ours.device)
                ours, theirs = ours[counts], theirs[counts]
            count += len(ours)
            if has_classes:
                other += float((ours.argmax(1) != theirs.argmax(1)).sum())
            angle += _angle(ours, theirs) * len(ours)
    return Disagreement(other / count, angle / count) if count else None


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
