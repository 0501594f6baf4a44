"""The marker ``grid``: `make test` runs every value of every parameter, `make nightly` every combination."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest

__all__ = ["mark_repeated_values_slow"]


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
