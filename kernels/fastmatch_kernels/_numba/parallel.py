"""Threads: blocks of rows on several cores, in which compiled kernels release the interpreter's lock.

The pool is our own. numba's threads change the number of torch's, hang in a forked child, and in one of numba's layers
two threads that call at once abort the process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from queue import SimpleQueue

import torch

__all__ = ["over_blocks", "over_rows", "threads"]

ENTRIES = 1 << 22
"""Entries of work that justify another thread: waking a core takes up to half a millisecond, in which a running core
reads a few million."""

BLOCKS_PER_THREAD = 4
"""Blocks, if there is work enough: a thread that comes late, or whose core is busy, holds up only one of them."""


def threads() -> int:
    """Return the number of cores that this process may use, or torch's number of threads if that is smaller.

    So ``torch.set_num_threads`` and ``OMP_NUM_THREADS`` limit kernels as they limit torch.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, torch.get_num_threads())


def over_rows(n: int, entries: int, work: Callable[[int, int], object], least: int = ENTRIES) -> None:
    """Call ``work(lo, hi)`` on blocks of n rows, on several cores if there is work enough.

    Args:
        n: number of rows.
        entries: in all rows.
        work: called on blocks of rows that cover all of them.
        least: entries of a block; kernels that do more than read can have smaller blocks.
    """
    workers = threads()
    count = 1 if workers == 1 else max(1, min(BLOCKS_PER_THREAD * workers, entries // least, n))
    over_blocks([n * k // count for k in range(count + 1)], work)


def over_blocks(edges: Sequence[int], work: Callable[[int, int], object]) -> None:
    """Call ``work(lo, hi)`` for each pair of neighbouring edges, in this thread and in those of the pool.

    After an error or Ctrl-C no further block is begun; what the calls raised is raised when those that run have ended.
    """
    if len(edges) == 2:
        work(edges[0], edges[1])
        return
    job = _Job(edges, work)
    _pool.offer(job, min(threads(), len(edges) - 1) - 1)
    job.finish()


class _Job:
    """Blocks that any thread may take.

    The caller takes blocks too, and waits only for those that another thread has begun. So it ends whatever becomes of the
    pool: if its threads are busy, in a forked child, where there are none, and at the interpreter's exit.
    """

    def __init__(self, edges: Sequence[int], work: Callable[[int, int], object]) -> None:
        self._blocks = pairwise(edges)
        self._work: Callable[[int, int], object] | None = work
        self._helpers = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition(threading.Lock())

    def finish(self) -> None:
        """Work on blocks, wait for the helpers and raise the first error."""
        try:
            self._take_blocks()
        finally:
            with self._changed:
                self._work = None  # a helper that comes late finds nothing, and keeps no arrays alive
                self._changed.wait_for(lambda: not self._helpers)
        if self._error is not None:
            raise self._error

    def help(self) -> None:
        """Work on blocks in a thread of the pool."""
        with self._changed:
            self._helpers += 1
        self._take_blocks()
        with self._changed:
            self._helpers -= 1
            self._changed.notify()

    def _take_blocks(self) -> None:
        try:
            while True:
                with self._changed:
                    work = self._work
                    block = None if work is None else next(self._blocks, None)
                if work is None or block is None:
                    return
                work(*block)
        except BaseException as error:
            with self._changed:
                self._work, self._error = None, self._error or error


class _Pool:
    """Threads that wait for jobs. They are started when they are first needed, and end with the process."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._lock = threading.Lock()
        self._started = 0

    def offer(self, job: _Job, helpers: int) -> None:
        """Ask as many threads to help with a job, or as many as can be started."""
        with self._lock:
            while self._started < helpers:
                try:
                    threading.Thread(target=self._serve, name="fastmatch", daemon=True).start()
                except RuntimeError:  # the interpreter ends, or the user may have no more threads
                    break
                self._started += 1
            helpers = min(helpers, self._started)
        for _ in range(helpers):
            self._jobs.put(job)

    def _serve(self) -> None:
        while True:
            self._jobs.get().help()


_pool = _Pool()


def _start_anew() -> None:
    """Forget the threads of the parent, which a forked child does not have."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
