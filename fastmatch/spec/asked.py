"""Numbers that note what a model compares them with: one value alone may take another path (``if task == 7``)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

__all__ = ["noting"]


class AskedInt(int):
    """A whole number that notes each one that it is compared with. Results of arithmetic are plain numbers."""

    notes: set[float]

    def __new__(cls, value: int = 0, notes: set[float] | None = None) -> AskedInt:
        made = super().__new__(cls, value)
        made.notes = set() if notes is None else notes
        return made

    __hash__ = int.__hash__


class AskedFloat(float):
    """The same for a float, which is compared with whole numbers too."""

    notes: set[float]

    def __new__(cls, value: float = 0.0, notes: set[float] | None = None) -> AskedFloat:
        made = super().__new__(cls, value)
        made.notes = set() if notes is None else notes
        return made

    __hash__ = float.__hash__


def _noted(
    compare: Callable[[Any, Any], bool], plain: type, kinds: tuple[type, ...]
) -> Callable[[Any, Any], bool]:
    def noted(self: Any, other: Any) -> bool:
        if type(other) in kinds:
            self.notes.add(other)
        return compare(plain(self), other)

    return noted


for _compare in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge):
    setattr(AskedInt, f"__{_compare.__name__}__", _noted(_compare, int, (int,)))
    setattr(AskedFloat, f"__{_compare.__name__}__", _noted(_compare, float, (int, float)))


def noting(value: Any, notes: set[float]) -> Any:
    """Return a value in which numbers, also whole ones in lists, add to ``notes`` what they are compared with."""
    if isinstance(value, list):
        return [noting(x, notes) if type(x) in (int, list) else x for x in value]
    if type(value) is int:
        return AskedInt(value, notes)
    return AskedFloat(value, notes) if type(value) is float else value
