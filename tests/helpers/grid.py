"""The marker ``grid``: `make test` runs every value of every parameter, `make nightly` every combination."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

__all__ = ["mark_repeated_values_slow"]


def mark_repeated_values_slow(items: Iterable[pytest.Item]) -> None:
    """Mark as slow the cells of grids that bring no new value of a parameter. Cells that are slow already bring none."""
    seen: dict[str, set[tuple[str, int]]] = {}
    for item in items:
        if not isinstance(item, pytest.Function) or not item.get_closest_marker("grid"):
            continue
        if item.get_closest_marker("slow"):
            continue
        known = seen.setdefault(item.nodeid.partition("[")[0], set())
        values = {(name, id(value)) for name, value in item.callspec.params.items()}
        if values <= known:
            item.add_marker(pytest.mark.slow)
        known |= values
