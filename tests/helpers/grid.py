"""What `make test` runs of many cases, and `make nightly` of all: the marker ``grid``, and samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["mark_repeated_values_slow", "sampled"]


def mark_repeated_values_slow(items: Iterable[pytest.Item]) -> None:
    """Mark as slow the cells of grids that are not needed to run each value of each parameter once.

    Cells are chosen one after the other, each time one with the most values that no chosen cell has, and of these one with the
    values that are chosen least: of 3 x 4 cells four, along a diagonal. Cells that are slow already are not chosen.
    """
    grids: dict[str, list[tuple[pytest.Function, set[tuple[str, int]]]]] = {}
    for item in items:
        if not isinstance(item, pytest.Function) or not item.get_closest_marker("grid"):
            continue
        if not item.get_closest_marker("slow"):
            values = {(name, id(value)) for name, value in item.callspec.params.items()}
            grids.setdefault(item.nodeid.partition("[")[0], []).append((item, values))
    for cells in grids.values():
        uses = Counter({value: 0 for _, values in cells for value in values})
        while 0 in uses.values():
            ranked = [
                (-sum(not uses[v] for v in values), sum(uses[v] for v in values)) for _, values in cells
            ]
            _, values = cells.pop(ranked.index(min(ranked)))
            uses.update(values)
        for item, _ in cells:
            item.add_marker(pytest.mark.slow)


def sampled(argument: str, values: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize a test with values that have a ``name``: `make test` runs every third of them."""
    cases = [
        value if k % 3 == 0 else pytest.param(value, marks=pytest.mark.slow) for k, value in enumerate(values)
    ]
    return pytest.mark.parametrize(argument, cases, ids=lambda value: value.name)
