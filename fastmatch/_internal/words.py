"""Numbers and counts as text."""

from __future__ import annotations

__all__ = ["count_of", "printable", "short"]


def short(value: float, digits: int = 2) -> str:
    """Return a number with a fixed number of digits, and no minus sign before a zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def count_of(number: int, singular: str, plural: str = "") -> str:
    """Return a number and its noun: ``1 group``, ``2,048 groups``."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def printable(text: str) -> str:
    """Return a text that does nothing to a terminal but to be read: names in files may hold its commands."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
