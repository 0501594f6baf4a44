"""Samples from all over the data, and the endpoints' outputs on them."""

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
    take_rows,
)

__all__ = [
    "SAMPLES",
    "Probe",
    "ProbeRecorder",
    "cuts_cleanly",
    "features",
    "joined",
    "part_of",
    "superfluous",
]

SAMPLES = 1024
"""Outputs are kept for this many samples, rounded up to a part of a batch."""
ROWS = 64
"""Rows of a part: a larger batch is cut, so that samples come from more batches. Loaders may be sorted by class."""
FEATURES = 4096
"""Of larger outputs, such as those of a language model, this many numbers per sample are kept, evenly spaced."""
TOLERANCE = 0.05
"""A part's outputs may differ from those of the whole batch by this fraction: half precision rounds by the batch's size."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A batch, and the endpoints' outputs on it.

    Attributes:
        batch: the item of the loader; tensors are copies.
        outputs: per endpoint, (samples, features) float32 on its device. None if its output is not a tensor of samples.
    """

    batch: Any
    outputs: tuple[torch.Tensor | None, ...]


class Place(NamedTuple):
    """Where a part of a batch is, by what is kept first.

    Attributes:
        part: rows ``part::parts`` of the batch. First parts of many batches come before second ones.
        order: spreads the batches: those with the lowest numbers are spaced evenly, however many there are.
        batch: its number.
    """

    part: int
    order: int
    batch: int


def _order(batch: int) -> int:
    return batch * 2654435769 % 2**32  # multiples of the golden section, without their whole part


class ProbeRecorder:
    """Keeps samples that are spread over a loader's batches, with the outputs of each endpoint.

    What is kept depends on the numbers and sizes of the batches alone, so ranks that read different ones find together what one
    process finds.
    """

    def __init__(self) -> None:
        self.next = 0
        """Number of the next batch."""
        self.kept: dict[Place, Probe] = {}
        self.whole: tuple[int, Probe] | None = None
        """The first batch that was cut, and its number."""
        self._highest: Place | None = None  # of the places, once there are enough samples

    def add(self, batch: Any, outputs: Sequence[Any]) -> None:
        """Add a batch and the endpoints' outputs on it, or the parts of it that belong to those that are kept."""
        number, self.next = self.next, self.next + 1
        whole = Probe(batch, tuple(features(output) for output in outputs))
        size = size_of(whole)
        parts = 1 if size is None else -(-size // ROWS)
        if parts > 1 and self.whole is None:
            self.whole = number, Probe(_copied(batch), whole.outputs)
        for part in range(parts):
            place = Place(part, _order(number), number)
            if self._highest is not None and place > self._highest:
                break
            probe = whole if size is None or parts == 1 else part_of(whole, range(part, size, parts), size)
            self.kept[place] = Probe(_copied(probe.batch), probe.outputs)
            self.trim()

    def sizes(self) -> dict[Place, int]:
        """Return the number of samples of every part that is kept."""
        return {place: _count(probe) for place, probe in self.kept.items()}

    def trim(self) -> None:
        """Leave out what the parts before it make superfluous."""
        sizes = self.sizes()
        for place in superfluous(sizes):
            del self.kept[place], sizes[place]
        self._highest = max(sizes) if sum(sizes.values()) >= SAMPLES else None

    def probes(self, model: nn.Module, forward: Forward) -> tuple[Probe, ...]:
        """Return what is kept, in the order of the data.

        If the first endpoint's outputs on a part are not those on the whole batch, samples depend on each other, as the nodes of
        a graph do. Then the first batch that was cut is returned alone, whole.
        """
        places = sorted(self.kept, key=lambda place: (place.batch, place.part))
        if self.whole is not None:
            whole = self.whole[1]
            size = size_of(whole)
            assert size is not None
            if not cuts_cleanly(model, part_of(whole, range(0, size, 2), size), forward):
                return (whole,)
        return tuple(self.kept[place] for place in places)


def superfluous(sizes: Mapping[Place, int]) -> list[Place]:
    """Return the places that are not needed for enough samples."""
    total, found = 0, []
    for place in sorted(sizes):
        if total >= SAMPLES:
            found.append(place)
        total += sizes[place]
    return found


def cuts_cleanly(model: nn.Module, part: Probe, forward: Forward) -> bool:
    """Return whether a model gives on a part of a batch what it gave on the whole: the part's first outputs."""
    expected = part.outputs[0]
    try:
        with evaluating(model):
            found = features(forward(model, part.batch))
    except Exception:  # whatever a forward function raises on a part of a batch
        return False
    if found is None or expected is None or found.shape != expected.shape:
        return False
    return bool((found - expected).norm() <= TOLERANCE * expected.norm())


def _count(probe: Probe) -> int:
    return max((len(k) for k in probe.outputs if k is not None), default=SAMPLES)


def size_of(probe: Probe) -> int | None:
    """Return the number of samples of a batch that can be cut: every output has a row, or as many rows, for each."""
    try:
        size = samples_in(probe.batch)
    except ValueError:
        return None
    fits = size > 0 and all(output is not None and len(output) % size == 0 for output in probe.outputs)
    return size if fits else None


def part_of(probe: Probe, rows: Sequence[int], size: int) -> Probe:
    """Return these samples of ``size``."""

    def chosen(output: torch.Tensor) -> torch.Tensor:
        return output.unflatten(0, (size, -1))[list(rows)].flatten(0, 1)

    outputs = tuple(None if output is None else chosen(output) for output in probe.outputs)
    return Probe(take_rows(collated(probe.batch), rows, size), outputs)


def joined(first: Sequence[Probe], second: Sequence[Probe]) -> tuple[Probe, ...]:
    """Return the outputs of both sets of endpoints; none if their batches differ."""
    if len(first) != len(second) or not all(
        _same(a.batch, b.batch) for a, b in zip(first, second, strict=True)
    ):
        return ()
    return tuple(Probe(a.batch, (*a.outputs, *b.outputs)) for a, b in zip(first, second, strict=True))


def features(output: Any) -> torch.Tensor | None:
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
