"""Whole numbers that note what a model compares them with: one value alone may take another path (``if task == 7``)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

__all__ = ["noting"]


class Asked(int):
    """A whole number that notes each one that it is compared with. Results of arithmetic are plain numbers."""

    notes: set[int]

    def __new__(cls, value: int = 0, notes: set[int] | None = None) -> Asked:
        made = super().__new__(cls, value)
        made.notes = set() if notes is None else notes
        return made

    __hash__ = int.__hash__


def _noted(compare: Callable[[int, Any], bool]) -> Callable[[Asked, Any], bool]:
    def noted(self: Asked, other: Any) -> bool:
        if type(other) is int:
            self.notes.add(other)
        return compare(int(self), other)

    return noted


for _compare in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge):
    setattr(Asked, f"__{_compare.__name__}__", _noted(_compare))


def noting(value: Any, notes: set[int]) -> Any:
    """Return a value in which whole numbers, also those in lists, add to ``notes`` what they are compared with."""
    if isinstance(value, list):
        return [noting(x, notes) for x in value]
    return Asked(value, notes) if type(value) is int else value
