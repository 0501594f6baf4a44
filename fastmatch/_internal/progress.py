"""Progress bars: shown on a terminal, silent elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

__all__ = ["progress_bar"]

T = TypeVar("T")


def progress_bar(
    items: Iterable[T], title: str, *, show: bool | None = None, total: int | None = None
) -> Iterator[T]:
    """Yields ``items`` under a bar on standard error.

    Args:
        items: what to go through; its length is shown where it has one.
        title: what is being done.
        show: True or False to force it; None shows it only on a terminal, after a second.
        total: the number of items, where ``items`` does not know it.
    """
    if show is None:
        show = sys.stderr.isatty()
    yield from tqdm(items, desc=title, total=total, disable=not show, delay=1.0, leave=False)
