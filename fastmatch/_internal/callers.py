"""Whose code it is: warnings that point at the user's line, and errors of this library or of what it calls."""

from __future__ import annotations

import sys
import warnings

__all__ = ["is_own_error", "warn_user"]

INNER = ("fastmatch", "torch", "contextlib")
"""Packages whose frames are not the user's."""


def warn_user(message: str) -> None:
    """Give a UserWarning at the innermost line that is neither of this library nor of torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INNER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def is_own_error(error: BaseException) -> bool:
    """Return whether this library raised an error itself, not a model or torch that it has called."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    package = "" if place is None else str(place.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    return package in ("fastmatch", "fastmatch_kernels")
