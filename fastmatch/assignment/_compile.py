"""A warning that tells why the first call after an installation or an upgrade takes some seconds."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Hashable
from contextlib import suppress

__all__ = ["prepared"]

LOG = logging.getLogger("fastmatch.assignment")

SILENT_SECONDS = 1.0
"""Seconds before the warning: a small kernel is compiled by then."""

_READY: set[Hashable] = set()


def prepared(what: str, key: Hashable, run_tiny: Callable[[], object]) -> None:
    """Compile kernels, or load them from the cache of fastmatch_kernels, by running them on a tiny problem, once per process.

    If that takes more than a second, and some are not in the cache, the logger ``fastmatch.assignment`` warns that they are
    being compiled.

    Args:
        what: what is being compiled, for the warning.
        key: kernels with a key that was seen before are ready.
        run_tiny: runs the kernels.
    """
    if key in _READY:
        return
    before, done = _compiled(), threading.Event()

    def tell() -> None:
        while not done.wait(SILENT_SECONDS):
            if _compiled() > before:  # on a busy machine loading takes seconds too
                LOG.warning(
                    "compiling %s (6 to 25 s on a slow processor, once per installation and version of the sources; "
                    "fastmatch warm-up does it beforehand)",
                    what,
                )
                return

    with suppress(RuntimeError):  # no thread can be started while the interpreter ends
        threading.Thread(target=tell, daemon=True).start()
    try:
        run_tiny()
    finally:
        done.set()
    _READY.add(key)


def _compiled() -> int:
    """Return how many functions this process has begun to compile; none if it has not loaded the kernels."""
    cache = sys.modules.get("fastmatch_kernels._numba.cache")
    count = getattr(cache, "compiled", None)
    return 0 if count is None else count()
