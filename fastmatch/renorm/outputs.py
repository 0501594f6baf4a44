"""Outputs of the endpoints on a few samples, and how far a merge's outputs are from theirs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from fastmatch._internal.batches import (
    Forward,
    collated,
    evaluating,
    prediction_of,
    samples_in,
    split_batch,
)

__all__ = ["PREFERENCE", "Disagreement", "Probe", "ProbeRecorder", "disagreement", "joined"]

SAMPLES = 1024
"""Outputs are kept for this many samples from the front of the data, rounded up to a batch."""
PREFERENCE = 0.9
"""Another method than the first one must have an angle smaller by this factor. Angles of equally good methods differ by
some percent (bench/results/renormalization_choice.md)."""
FEATURES = 4096
"""Of larger outputs, such as those of a language model, this many numbers per sample are kept, evenly spaced."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A batch, and the endpoints' outputs on it.

    Attributes:
        batch: the item of the loader; tensors are copies.
        outputs: per endpoint, (samples, features) float32 on its device. None if its output is not a tensor of samples.
    """

    batch: Any
    outputs: tuple[torch.Tensor | None, ...]


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


class ProbeRecorder:
    """Keeps the first batches of a loader with the outputs of each endpoint."""

    def __init__(self) -> None:
        self.probes: list[Probe] = []
        self._samples = 0

    def add(self, batch: Any, outputs: Sequence[Any]) -> None:
        """Add a batch and the endpoints' outputs on it, until there are enough samples."""
        if self._samples >= SAMPLES:
            return
        kept = tuple(_features(output) for output in outputs)
        self._samples += max((len(k) for k in kept if k is not None), default=SAMPLES)
        self.probes.append(Probe(_copied(batch), kept))


def joined(first: Sequence[Probe], second: Sequence[Probe]) -> tuple[Probe, ...]:
    """Return the outputs of both sets of endpoints; none if their batches differ."""
    if len(first) != len(second) or not all(
        _same(a.batch, b.batch) for a, b in zip(first, second, strict=True)
    ):
        return ()
    return tuple(Probe(a.batch, (*a.outputs, *b.outputs)) for a, b in zip(first, second, strict=True))


def disagreement(
    model: nn.Module, probes: Sequence[Probe], weights: Sequence[float], forward: Forward, *, after: int = 0
) -> Disagreement | None:
    """Return how far a merge's outputs are from the endpoints' on the probes; None if outputs cannot be compared.

    The first ``after`` samples are left out.
    """
    count, other, angle = 0, 0.0, 0.0
    with evaluating(model):
        for probe in probes:
            size = samples_in(probe.batch) if after > 0 else 1
            skipped = min(max(after, 0), size)
            after -= size if after > 0 else 0
            if skipped == size:
                continue
            ours = _features(forward(model, probe.batch))
            if ours is None or any(k is None or k.shape != ours.shape for k in probe.outputs):
                return None
            theirs = sum(
                w * k.to(ours.device) for w, k in zip(weights, probe.outputs, strict=True) if k is not None
            )
            assert isinstance(theirs, torch.Tensor)
            has_classes = _is_classification(probe.batch, ours)
            first = len(ours) * skipped // size
            ours, theirs = ours[first:], theirs[first:]
            count += len(ours)
            if has_classes:
                other += float((ours.argmax(1) != theirs.argmax(1)).sum())
            angle += _angle(ours, theirs) * len(ours)
    return Disagreement(other / count, angle / count) if count else None


def _features(output: Any) -> torch.Tensor | None:
    """Return (samples, features) float32 of an output, or of the logits or the first tensor in it."""
    output = prediction_of(output)
    if isinstance(output, Mapping):
        output = next(iter(output.values()), None)
    elif isinstance(output, (tuple, list)):
        output = output[0] if output else None
    if not isinstance(output, torch.Tensor) or not output.is_floating_point() or output.ndim == 0:
        return None
    rows = output.detach().reshape(len(output), -1)
    if rows.shape[1] > FEATURES:
        rows = rows[:, :: -(-rows.shape[1] // FEATURES)]
    return rows.to(dtype=torch.float32, copy=True)


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


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and bool((a == b.to(a.device)).all())
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping):
        return type(a) is type(b) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return a is b or (type(a) is type(b) and bool(a == b))


def _copied(batch: Any) -> Any:
    """Return a batch whose tensors are copies, since a loader may write its next batch into the same memory."""
    if isinstance(batch, torch.Tensor):
        return batch.detach().clone()
    if type(batch) in (tuple, list):
        return type(batch)(_copied(part) for part in batch)
    if type(batch) is dict:
        return {key: _copied(part) for key, part in batch.items()}
    return copy.copy(batch)
