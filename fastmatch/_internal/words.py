"""Numbers and counts as text."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["count_of", "error_line", "first_of", "printable", "short"]


def short(value: float, digits: int = 2) -> str:
    """Return a number with a fixed number of digits, and no minus sign before a zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def count_of(number: int, singular: str, plural: str = "") -> str:
    """Return a number and its noun: ``1 group``, ``2,048 groups``."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def first_of(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, and dots if there are more."""
    return ", ".join(names[:most]) + (", ..." if names[most:] else "")


def printable(text: str) -> str:
    """Return a text that does nothing to a terminal but to be read: names in files may hold its commands."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def error_line(error: BaseException, most: int = 300) -> str:
    """Return an error on one line: its class, without which the text of some (``KeyError: 105``) says nothing, and its text."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    return text if len(text) <= most else f"{text[:most]}..."
