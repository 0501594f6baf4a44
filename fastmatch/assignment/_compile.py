"""A warning that tells why the first call after an installation or an upgrade takes some seconds."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from contextlib import suppress

__all__ = ["prepared"]

LOG = logging.getLogger("fastmatch.assignment")

SILENT_SECONDS = 1.0
"""Seconds before the warning: kernels that load from the cache of fastmatch_kernels are ready by then."""

_READY: set[Hashable] = set()


def prepared(what: str, key: Hashable, run_tiny: Callable[[], object]) -> None:
    """Compile kernels, or load them from the cache of fastmatch_kernels, by running them on a tiny problem, once per process.

    If that takes more than a second, the logger ``fastmatch.assignment`` warns that they are being compiled.

    Args:
        what: what is being compiled, for the warning.
        key: kernels with a key that was seen before are ready.
        run_tiny: runs the kernels.
    """
    if key in _READY:
        return
    line = threading.Timer(
        SILENT_SECONDS,
        LOG.warning,
        (f"compiling {what} (some seconds, once per installation and version of the sources)",),
    )
    line.daemon = True
    with suppress(RuntimeError):  # no thread can be started while the interpreter ends
        line.start()
    try:
        run_tiny()
    finally:
        line.cancel()
    _READY.add(key)
