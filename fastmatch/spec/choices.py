"""The values that a model reads in Python in one pass, and what it is told instead in a pass that takes another path."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch

from fastmatch.spec.asked import noting
from fastmatch.spec.guards import Limits
from fastmatch.spec.record import Record, storage_id

__all__ = ["ARGUMENT", "INNER", "SOME", "Choice", "Choices", "Place", "Repeated", "Selection", "Value"]

MANY = 8
"""Answers to one question that are other ones in the same pass, so that what is counted by them exceeds a threshold."""

ARGUMENT = "argument "
"""What begins the place of a number that was given to the model."""

INNER = ("fastmatch", "torch", "contextlib")
"""Packages whose frames are not the model's."""

Selection: TypeAlias = Literal["some", "none", "all"]

SOME: Selection = "some"
"""What a mask selects, as it was computed."""

Value: TypeAlias = "bool | int | float | list[Any] | np.ndarray | str"
"""What Python is given: one number, or those of a tensor as a list or an array, or a :data:`Selection`."""

Place: TypeAlias = "tuple[str, str, int, int]"
"""Where in the code, by which module: its name, the file, the line and the instruction."""


@dataclass(frozen=True)
class Choice:
    """What Python was given once: where, and which value."""

    place: Place
    value: Value


@dataclass(frozen=True)
class Repeated:
    """An answer to a question each time that it is asked, MANY times at most."""

    place: Place
    value: bool


class Choices:
    """The values that Python is given in one pass.

    Args:
        forced: position among them -> what is given instead of what was computed.
        repeated: what is given each time that a question is asked, from the last of these positions on.
        ties: whether a number that is told otherwise is told likewise where an equal one is read.
        asks: whether whole numbers note what they are compared with, in ``compared``.
        limits: what the first pass has needed; None in that pass.
    """

    def __init__(
        self,
        forced: Mapping[int, Value] | None = None,
        *,
        repeated: Repeated | None = None,
        ties: bool = True,
        asks: bool = False,
        limits: Limits | None = None,
    ) -> None:
        self.forced = forced or {}
        self.made: list[Choice] = []
        self.compared: dict[int, set[float]] = {}
        self.is_first = limits is None
        self.limits = limits or Limits()
        self._repeated, self._ties, self._asks = repeated, ties, asks
        self._operations = self._repeats = 0
        self._instead: list[tuple[Value, Value]] = []
        self._selected: dict[int, Selection] = {}
        self._held: list[torch.Tensor] = []  # so that their memory is not used again
        self._kept: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def before(self, record: Record, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at an operation that is about to run: but in the first pass, whether it may, and keep what it overwrites of the state."""
        self._operations += 1
        if self.is_first:
            return
        self.limits.check(self._operations, func, args, kwargs)
        if func._schema.is_mutable:
            for k, argument in enumerate(func._schema.arguments):
                tensor = kwargs.get(argument.name, args[k] if k < len(args) else None)
                if argument.is_write and isinstance(tensor, torch.Tensor) and record.is_state(tensor):
                    memory = tensor.untyped_storage()
                    self._kept.setdefault(storage_id(tensor), (memory, memory.clone()))

    def after(self, out: Any) -> None:
        """Note what an operation of the first pass has needed."""
        if self.is_first:
            self.limits.note(self._operations, out)

    def told(self, value: Value, module: str) -> Value:
        """Return what Python is given for a value that was computed."""
        place = (module, *_line())
        told = value
        if self._ties:  # h.split([int(n), 8 - int(n)])
            told = next((other for computed, other in self._instead if _is_same(computed, value)), value)
        if len(self.made) in self.forced:
            told = _copied(self.forced[len(self.made)])
        if self._is_repeated(place):
            assert self._repeated is not None
            told = self._repeated.value
            self._repeats += 1
        if told is not value and not _is_same(told, value):
            self._instead.insert(0, (_copied(value), told))
        self.made.append(Choice(place, _copied(told)))  # the model may change a list
        return self.noted(told)

    def noted(self, value: Value) -> Value:
        """Return the value that Python was given last so that it notes what it is compared with, if this pass asks for that."""
        last = len(self.made) - 1
        if not self._asks or last < 0 or not _is_same(self.made[last].value, value):
            return value
        return noting(value, self.compared.setdefault(last, set()))

    def _is_repeated(self, place: Place) -> bool:
        """Whether the answer here is one that is repeated."""
        if self._repeated is None or len(self.made) < max(self.forced):
            return False
        return place == self._repeated.place and self._repeats < MANY

    def told_selection(self, tensor: torch.Tensor, module: str) -> Selection:
        """Return how much of a tensor's memory the model is told to select: as much as it does, none or all."""
        key = storage_id(tensor)
        if key not in self._selected:
            self._selected[key] = cast("Selection", self.told(SOME, module))
            self._held.append(tensor)
        return self._selected[key]

    def may_count(self) -> bool:
        """Whether the other answer of this pass, its last, may have changed a number, and an axis be cut there.

        A truth value may if it is asked for again, as in ``while n > k``.
        """
        if not self.forced or len(self.made) <= max(self.forced):
            return False
        last = self.made[max(self.forced)]
        return not isinstance(last.value, bool) or sum(choice.place == last.place for choice in self.made) > 1

    def restore(self) -> None:
        """Give parameters and buffers the values that they had before the pass."""
        for memory, value in self._kept.values():
            memory.copy_(value)


def _is_same(one: Value, other: Value) -> bool:
    """Whether two numbers, or two lists of them, are equal. Truth values say nothing: two questions have one answer often."""
    if type(one) is not type(other) or isinstance(one, (bool, str)):
        return False
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


def _copied(value: Value) -> Value:
    """Return a value that shares no list and no array with the given one."""
    return copy.deepcopy(value) if isinstance(value, (list, np.ndarray)) else value


def _line() -> tuple[str, int, int]:
    """Return the file, the line and the instruction of the model's code that runs."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INNER:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno, frame.f_lasti
