"""What can be measured on data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastmatch._internal.batches import split_batch

__all__ = ["has_targets"]


def has_targets(data: Iterable[Any]) -> bool:
    """Return whether the first batch is a pair of inputs and targets, on which a loss can be measured."""
    return split_batch(next(iter(data), None))[1] is not None
