"""Lists and tuples of other parts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["sequence_like"]


def sequence_like(value: list[Any] | tuple[Any, ...], parts: Iterable[Any]) -> Any:
    """Return ``parts`` as a list or tuple of the class of ``value``, which may be a named tuple."""
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
