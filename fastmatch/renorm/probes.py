"""Batches from all over the data, and the endpoints' outputs on them."""

from __future__ import annotations

import copy
import dataclasses
import heapq
from collections import UserDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastmatch._internal.batches import Forward, evaluating, prediction_of, samples_in, take_rows
from fastmatch._internal.ranks import is_of_ranks
from fastmatch._internal.sequences import sequence_like

__all__ = [
    "SAMPLES",
    "Probe",
    "ProbeRecorder",
    "cuts_cleanly",
    "features",
    "joined",
    "kept_of",
    "part_of",
    "size_of",
    "spread",
]

SAMPLES = 1024
"""Outputs are kept for this many samples, rounded up to a batch."""
FEATURES = 4096
"""Of larger outputs, such as those of a language model, this many numbers per sample are kept, evenly spaced."""
TOLERANCE = 0.05
"""A part's outputs may differ from those of the whole batch by this fraction: half precision rounds by the batch's size."""


def spread(number: int) -> int:
    """Return a place below 2^32: a multiple of the golden section, without its whole part.

    The numbers with the lowest places are spaced evenly, however many there are, and whatever their period: loaders may be sorted by
    class, or take classes in turn.
    """
    return number * 2654435769 % 2**32


@dataclass(frozen=True, eq=False)
class Probe:
    """A batch, and the endpoints' outputs on it.

    Attributes:
        batch: the item of the loader; tensors are copies.
        outputs: per endpoint, (samples, features) float32 on its device. None if its output is not a tensor of samples.
    """

    batch: Any
    outputs: tuple[torch.Tensor | None, ...]


class ProbeRecorder:
    """Keeps batches that are spread over a loader's, with the outputs of each endpoint.

    What is kept depends on the numbers and sizes of the batches alone, so ranks that read different ones find together what one
    process finds.
    """

    def __init__(self) -> None:
        self.next = 0
        """Number of the next batch."""
        self.kept: dict[int, Probe] = {}
        """Number of a batch -> what is kept of it."""
        self._places: list[tuple[int, int]] = []  # a heap, the last place first
        self._samples = 0

    def add(self, batch: Any, outputs: Sequence[Any]) -> None:
        """Add a batch and the endpoints' outputs on it, if it belongs to those that are kept."""
        number, self.next = self.next, self.next + 1
        place = -spread(number)
        if self._samples >= SAMPLES and place < self._places[0][0]:
            return
        probe = Probe(_copied(batch), tuple(features(output) for output in outputs))
        self.kept[number] = probe
        self._samples += _count(probe)
        heapq.heappush(self._places, (place, number))
        while self._samples - (last := _count(self.kept[self._places[0][1]])) >= SAMPLES:
            self._samples -= last
            del self.kept[heapq.heappop(self._places)[1]]

    def sizes(self) -> dict[int, int]:
        """Return the number of samples of every batch that is kept."""
        return {number: _count(probe) for number, probe in self.kept.items()}

    def probes(self) -> tuple[Probe, ...]:
        """Return what is kept, in the order of the data."""
        return tuple(self.kept[number] for number in sorted(self.kept))


def kept_of(sizes: Mapping[int, int]) -> Iterable[int]:
    """Yield the numbers of the batches that are kept of all, whose sizes are given."""
    total = 0
    for number in sorted(sizes, key=spread):
        if total >= SAMPLES:
            return
        total += sizes[number]
        yield number


def cuts_cleanly(model: nn.Module, part: Probe, forward: Forward) -> bool:
    """Return whether a model gives on a part of a batch what it gave on the whole: the part's first outputs."""
    expected = part.outputs[0]
    try:
        with evaluating(model):
            found = features(forward(model, part.batch))
        if found is None or expected is None or found.shape != expected.shape:
            return False
        return bool((found - expected).norm() <= TOLERANCE * expected.norm())
    except Exception as error:  # whatever a forward function raises on a part of a batch
        if is_of_ranks(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        return False


def _count(probe: Probe) -> int:
    return max((len(k) for k in probe.outputs if k is not None), default=SAMPLES)


def size_of(probe: Probe) -> int | None:
    """Return the number of samples of a batch that may be cut; None if it may not.

    Every output has a row, or as many rows, for each. Integers with other rows may be indices into the samples, such as a graph's edges.
    """
    try:
        size = samples_in(probe.batch)
    except ValueError:
        return None
    fits = size > 0 and all(output is not None and len(output) % size == 0 for output in probe.outputs)
    return size if fits and not _may_hold_indices(probe.batch, size) else None


def _may_hold_indices(value: Any, size: int) -> bool:
    if isinstance(value, torch.Tensor):
        is_integer = not (value.is_floating_point() or value.is_complex() or value.dtype is torch.bool)
        return value.layout is not torch.strided or (is_integer and value.ndim > 0 and len(value) != size)
    parts = (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    )
    return any(_may_hold_indices(part, size) for part in parts)


def part_of(probe: Probe, rows: Sequence[int], size: int) -> Probe:
    """Return these samples of ``size``."""

    def chosen(output: torch.Tensor) -> torch.Tensor:
        return output.unflatten(0, (size, -1))[list(rows)].flatten(0, 1)

    outputs = tuple(None if output is None else chosen(output) for output in probe.outputs)
    return Probe(take_rows(probe.batch, rows, size), outputs)


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
    if isinstance(batch, (tuple, list)):
        return sequence_like(batch, map(_copied, batch))
    if isinstance(batch, (dict, UserDict)):
        found = copy.copy(batch)
        for key, part in batch.items():
            found[key] = _copied(part)
        return found
    return copy.deepcopy(batch) if dataclasses.is_dataclass(batch) else copy.copy(batch)
