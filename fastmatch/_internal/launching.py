"""Whether this process is one of several, and speaks for them. Ranks need torch (:mod:`fastmatch._internal.ranks`); this does not."""

from __future__ import annotations

import os
import sys
from typing import Any

__all__ = ["LAUNCHER", "RanksError", "initialized", "is_alone", "is_first", "is_launched"]

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and other launchers set for every process."""


class RanksError(RuntimeError):
    """Another rank failed, or does not answer. The message says which one, and why."""


def is_launched() -> bool:
    """Return whether a launcher started this process as one of several."""
    return all(os.environ.get(name) for name in LAUNCHER) and os.environ["WORLD_SIZE"] != "1"


def is_alone() -> bool:
    """Return whether no other process shares this one's work: no launcher started it, and no process group is initialized."""
    return initialized() is None and not is_launched()


def is_first() -> bool:
    """Return whether this process speaks for the run: it is rank 0, or alone."""
    dist = initialized()
    if dist is not None:
        return dist.get_rank() == 0
    return not is_launched() or os.environ["RANK"] == "0"


def initialized() -> Any:
    """Return the module torch.distributed if a process group is initialized; it is not imported for that."""
    dist = sys.modules.get("torch.distributed")
    # It lacks the function where torch was built without it, and while it is being loaded.
    is_initialized = getattr(dist, "is_initialized", None)
    return dist if is_initialized is not None and is_initialized() else None
