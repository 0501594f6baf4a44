"""Work on two cores: two calls at once, and the next of a row of results while the last one is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["IN_CACHE", "ahead", "both"]

IN_CACHE = 1 << 14
"""Numbers that are copied to float64 at a time. From twice as many on, torch divides the work among threads, which wait for each
other."""

S = TypeVar("S")
T = TypeVar("T")


def both(first: Callable[[], S], second: Callable[[], T]) -> tuple[S, T]:
    """Return the results of two functions that run at once. If both fail, the error is the first one's."""
    with ThreadPoolExecutor(1, "fastmatch-read") as pool:
        later = pool.submit(second)
        return first(), later.result()


def ahead(compute: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """Yield ``compute(item)`` of every item. While one is used, the next is computed in a thread."""
    with ThreadPoolExecutor(1, "fastmatch-ahead") as pool:
        later = None
        for item in items:
            ready, later = later, None
            if ready is not None:
                result = ready.result()
                later = pool.submit(compute, item)
                yield result
                del result
            else:
                later = pool.submit(compute, item)
        if later is not None:
            yield later.result()
