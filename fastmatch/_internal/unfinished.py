"""Whether this process has begun what it has to undo when it ends early: temporary files, journals, processes of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["is_unfinished", "unfinished"]

_blocks: dict[object, Callable[[], bool]] = {}
"""What each block that runs has given, in every thread."""


@contextmanager
def unfinished(has_begun: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Say that the block undoes something at its end, so that an exception has to end it and not the system.

    Args:
        has_begun: whether there is something to undo yet.
    """
    mark = object()
    _blocks[mark] = has_begun
    try:
        yield
    finally:
        del _blocks[mark]


def is_unfinished() -> bool:
    """Return whether something is to be undone."""
    return any(has_begun() for has_begun in list(_blocks.values()))
