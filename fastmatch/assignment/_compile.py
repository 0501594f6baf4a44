"""The line that says why the first call after an installation takes a while."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable

__all__ = ["prepared"]

LOG = logging.getLogger("fastmatch.assignment")

PATIENCE = 1.0
"""Seconds after which a user is told: what loads from numba's cache is done by then."""

_READY: set[Hashable] = set()


def prepared(what: str, key: Hashable, run_tiny: Callable[[], object]) -> None:
    """Compiles kernels, or loads them from numba's cache, by running them on a tiny problem; once a process.

    If that takes more than a second, a warning of the logger ``fastmatch.assignment`` says what is going on.
    """
    if key in _READY:
        return
    line = threading.Timer(
        PATIENCE, LOG.warning, (f"compiling {what} (some seconds, once per installation)",)
    )
    line.daemon = True
    line.start()
    try:
        run_tiny()
    finally:
        line.cancel()
    _READY.add(key)
