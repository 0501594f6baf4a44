"""Numbers and counts as text."""

from __future__ import annotations

__all__ = ["count_of", "short"]


def short(value: float, digits: int = 2) -> str:
    """Return a number with a fixed number of digits, and no minus sign before a zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def count_of(number: int, singular: str, plural: str = "") -> str:
    """Return a number and its noun: ``1 group``, ``2,048 groups``."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"
