"""Warnings that point at the user's line, however many functions of this library lie between."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn_user"]

INNER = ("fastmatch", "torch", "contextlib")
"""Packages whose frames are not the user's."""


def warn_user(message: str) -> None:
    """Give a UserWarning at the innermost line that is neither of this library nor of torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INNER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
