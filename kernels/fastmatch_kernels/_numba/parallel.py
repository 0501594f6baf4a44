"""Passes over rows on all cores; the compiled kernels release the interpreter's lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

__all__ = ["over_rows", "threads"]

WORTH_A_THREAD = 1 << 22
"""Entries of work below which another thread costs more than it saves: to wake a sleeping core takes up to half a
millisecond, in which another reads a few million."""


def threads() -> int:
    """Workers for passes over rows: the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def over_rows(n: int, entries: int, work: Callable[[int, int], None]) -> None:
    """``work(lo, hi)`` over blocks of n rows with ``entries`` entries of work in all; on one core where there are few."""
    workers = min(threads(), max(1, entries // WORTH_A_THREAD), max(1, n))
    if workers == 1:
        work(0, n)
        return
    edges = [n * k // workers for k in range(workers + 1)]
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(work, lo, hi) for lo, hi in pairwise(edges)]:
            done.result()
