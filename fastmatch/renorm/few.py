"""Data of a few samples: their statistics fit them alone, and a network that has these statistics can be ruined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from fastmatch._internal.batches import samples_in
from fastmatch._internal.callers import warn_user
from fastmatch._internal.ranks import Ranks

__all__ = ["FEWEST", "SampleCount", "count_of", "no_variance", "warn_of_few"]

FEWEST = 8
"""Samples without which networks for classes are left alone by the automatic choice: statistics of fewer harm, and look perfect on
these same samples. With fewer, a method that was named is warned of."""

T = TypeVar("T")


def count_of(batch: Any) -> int | None:
    """Return the number of samples of a batch; None if they cannot be counted."""
    try:
        return samples_in(batch)
    except ValueError:
        return None


class SampleCount:
    """Counts the samples of the batches that pass.

    Attributes:
        samples: of the last read, or of this rank's part of it; None if a batch's cannot be counted.
    """

    def __init__(self) -> None:
        self.samples: int | None = 0

    def counted(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches; the count begins anew."""
        self.samples = 0
        for batch in batches:
            self.see(batch)
            yield batch

    def see(self, batch: Any) -> None:
        """Count a batch."""
        found = count_of(batch)
        self.samples = None if found is None or self.samples is None else self.samples + found

    def add_ranks(self, ranks: Ranks) -> None:
        """Add what the other ranks have counted of theirs."""
        found = ranks.exchange(self.samples, "the number of samples")
        self.samples = None if None in found else sum(k for k in found if k is not None)


def warn_of_few(samples: int | None, method: str) -> None:
    """Warn if a method calibrates on fewer samples than :data:`FEWEST`."""
    if samples is not None and samples < FEWEST:
        came = "1 sample came" if samples == 1 else f"{samples} samples came"
        warn_user(
            f'data: {came}, and "{method}" brings the network to the statistics of these alone, which can ruin it; give {FEWEST} at '
            "the least, and hundreds if you have them"
        )


def no_variance(where: str, layer: str) -> str:
    """Return the error for a method that needs a variance, and data that has none at a layer."""
    return (
        f"data: {where} has one sample, which gives one value for each channel at {layer!r}, so no variance; "
        'use larger batches, or mode="sequential" with several samples'
    )
