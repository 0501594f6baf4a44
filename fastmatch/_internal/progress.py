"""Progress bars: shown on a terminal and silent elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from tqdm import tqdm

from fastmatch._internal.launching import is_first

__all__ = ["no_progress", "progress_bar"]

T = TypeVar("T")

_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


@contextmanager
def no_progress(hidden: bool = True) -> Iterator[None]:
    """Show no progress bar inside unless one is asked for by ``show=True``."""
    token = _hidden.set(hidden)
    try:
        yield
    finally:
        _hidden.reset(token)


def progress_bar(
    items: Iterable[T], title: str, *, show: bool | None = None, total: int | None = None
) -> Iterator[T]:
    """Yield ``items`` and show a progress bar on standard error.

    Args:
        items: the items to iterate over.
        title: the text in front of the bar.
        show: True shows the bar, False hides it, None shows it only on a terminal. It appears after one second,
            and only on the first of several ranks.
        total: number of items, for ``items`` without a length.
    """
    if show is None:
        show = sys.stderr.isatty() and not _hidden.get()
    yield from tqdm(items, desc=title, total=total, disable=not (show and is_first()), delay=1.0, leave=False)
