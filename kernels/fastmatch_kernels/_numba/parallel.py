"""Threads: passes over rows on all cores, in which compiled kernels release the interpreter's lock, and numba's own."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch

__all__ = ["over_rows", "start_threads", "threads"]

ENTRIES_PER_THREAD = 1 << 22
"""Entries of work that justify another thread: waking a core takes up to half a millisecond, in which a running core
reads a few million."""


def threads() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def over_rows(n: int, entries: int, work: Callable[[int, int], None]) -> None:
    """Call ``work(lo, hi)`` on blocks of n rows that have ``entries`` entries in all, on one core if those are few."""
    workers = min(threads(), max(1, entries // ENTRIES_PER_THREAD), max(1, n))
    if workers == 1:
        work(0, n)
        return
    edges = [n * k // workers for k in range(workers + 1)]
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(work, lo, hi) for lo, hi in pairwise(edges)]:
            done.result()


@functools.cache
def start_threads() -> None:
    """Start numba's threads once. numba then sets the number of OpenMP's threads, which torch shares: it is set back."""
    import numba  # here, because importing fastmatch must not load it

    count = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(count)
