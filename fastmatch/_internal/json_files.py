"""Read JSON that others wrote: strictly, and with one kind of error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["parse_json", "read_json"]


def parse_json(text: str | bytes) -> dict[str, Any]:
    """Return the object that a text holds.

    Raises:
        ValueError: the text is not JSON in UTF-8, holds anything else, or has a name twice.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        data = json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(data, dict):
        raise ValueError(f"expected a JSON object, got {type(data).__name__}")
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"{twice!r} is there twice")
    return table


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file, in UTF-8 whatever the locale; see :func:`parse_json`. The error names the file."""
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
