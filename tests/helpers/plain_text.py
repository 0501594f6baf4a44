"""Strings as UTF-8 can hold them."""

from __future__ import annotations

from typing import Any

__all__ = ["encodable"]


def encodable(data: Any) -> Any:
    """Return nested dicts, lists and tuples with every lone surrogate in a string escaped."""
    if isinstance(data, str):
        return data.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(data, dict):
        return {encodable(key): encodable(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return type(data)(map(encodable, data))
    return data
