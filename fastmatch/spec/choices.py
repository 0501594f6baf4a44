"""Numbers that a model reads in Python, and the passes that it would run if they were others.

A model that asks ``if h.norm() > 2`` runs one of several paths. Others may use the same parameters in another way, so a
trace follows them as well: the model is told another answer, and what that pass shows is joined with the first.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch

from fastmatch._internal.callers import warn_user
from fastmatch.spec.asked import noting
from fastmatch.spec.record import Record, storage_id

__all__ = ["Choices", "PathLeft", "follow_others"]

MOST_PASSES = 32
"""Passes with other answers for one example."""

MOST_SELECTIONS = 8
"""Passes with other selections for one example, beside those. Nobody needs to be told that there are more: few models branch on them."""

MOST_COMPARED = 4
"""Numbers that one number is compared with, of which each is tried, and its neighbours."""

MOST_REPEATS = 2
"""After so many, the repeats of a question count as one: a loop is followed for none, one, two and some rounds."""

MANY = 8
"""Answers to one question that are other ones in the same pass, so that what is counted by them exceeds a threshold."""

FAR = 100
"""How far other answers to a question for a number are, so that they are above and below what a model compares with. Two more
are one away: a model may round the number and count by it."""

SOME: Selection = "some"
"""What a mask selects, as it was computed."""

LONGEST_SECONDS = 5.0
"""How long a pass with another answer may take."""

INNER = ("fastmatch", "torch", "contextlib")
"""Packages whose frames are not the model's."""

Selection: TypeAlias = Literal["some", "none", "all"]

Value: TypeAlias = "bool | int | float | list[Any] | np.ndarray | str"
"""What Python is given: one number, or those of a tensor as a list or an array, or a :data:`Selection`."""

Place: TypeAlias = "tuple[str, str, int, int]"
"""Where in the code, by which module: its name, the file, the line and the instruction."""


class PathLeft(BaseException):
    """A pass with another answer goes where it must not be followed. No ``Exception``, so that models cannot catch it."""


@dataclass(frozen=True)
class Choice:
    """What Python was given once: where, and which value."""

    place: Place
    value: Value


@dataclass(frozen=True)
class Pair:
    """Answers to a question and to the same one asked next: the lengths of two parts, of the same sum."""

    first: int
    second: int


@dataclass(frozen=True)
class Repeated:
    """An answer to a question each time that it is asked, MANY times at most."""

    place: Place
    value: bool


def _is_same(one: Value, other: Value) -> bool:
    """Whether two numbers, or two lists of them, are equal. Truth values say nothing: two questions have one answer often."""
    if type(one) is not type(other) or isinstance(one, (bool, str)):
        return False
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


def others(value: Value) -> list[Value]:
    """Return what else could have been given: for each kind of value as many, in one order."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        # Also so far below and above that a part of the number is another too: ``h[:, : n // 4]``.
        return [value - 1, value + 1, value // 4, 2 * value, 2 * value + 8, FAR * (abs(value) + 1)]
    if isinstance(value, float):
        far = FAR * (abs(value) + 1)
        return [-far, far, value - 1, value + 1] if far < float("inf") else [0.0]
    if isinstance(value, str):
        return ["none", "all"]
    if isinstance(value, list):
        if not value:
            return []
        changed = zip(*map(others, value), strict=False)
        return [value[::-1], value[1:] + value[:1], *_others_of_whole(value), *map(list, changed)]
    if value.dtype.kind not in "biuf":
        return [np.flip(value)]
    nested = others(value.tolist()) if value.size else []
    return [np.asarray(other).astype(value.dtype).reshape(value.shape) for other in nested]


def _all_and_one(value: Value, number: int) -> list[Value]:
    """Return a number in the place of another one, or of all numbers of a list and of its first."""
    if not isinstance(value, list):
        return [number] if number != value else []
    return [[number] * len(value), [number, *value[1:]]] if all(type(x) is int for x in value) else []


def _others_of_whole(values: list[Any]) -> list[list[Any]]:
    """Return whole numbers of the same sum, as lengths of parts have; equal ones; and distinct ones."""
    if len(values) < 2 or not all(type(value) is int for value in values):
        return []
    count = len(values)
    return [[values[0] + 1, *values[1:-1], values[-1] - 1], values[:1] * count, list(range(count))]


class Choices:
    """The values that Python is given in one pass.

    Args:
        forced: position among them -> what is given instead of what was computed.
        repeated: what is given each time that a question is asked, from the last of these positions on.
        operations: after so many, the pass is left: another answer may make a loop endless.
        asks: whether whole numbers note what they are compared with, in ``compared``.
    """

    def __init__(
        self,
        forced: Mapping[int, Value] | None = None,
        operations: float = float("inf"),
        repeated: Repeated | None = None,
        *,
        asks: bool = False,
    ) -> None:
        self.forced = forced or {}
        self.is_first = not self.forced and not asks
        self.compared: dict[int, set[int]] = {}
        self._asks = asks
        self._repeated, self._repeats = repeated, 0
        self._selected: dict[int, Selection] = {}
        self.made: list[Choice] = []
        self.operations = 0
        self._most = operations
        self._kept: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._instead: list[tuple[Value, Value]] = []
        self._held: list[torch.Tensor] = []  # so that their memory is not used again

    def before(self, record: Record, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count an operation that is about to run; but in the first pass, keep what it overwrites of the state."""
        self.operations += 1
        if self.operations > self._most:
            raise PathLeft
        if not self.is_first and func._schema.is_mutable:
            for k, argument in enumerate(func._schema.arguments):
                tensor = kwargs.get(argument.name, args[k] if k < len(args) else None)
                if argument.is_write and isinstance(tensor, torch.Tensor) and record.is_state(tensor):
                    memory = tensor.untyped_storage()
                    self._kept.setdefault(storage_id(tensor), (memory, memory.clone()))

    def told(self, value: Value, module: str) -> Value:
        """Return what Python is given for a value that was computed.

        A number that was told otherwise is told likewise where it is computed again: ``h.split([int(n), 8 - int(n)])``.
        """
        place = (module, *_line())
        likewise = next((told for computed, told in self._instead if _is_same(computed, value)), value)
        told = self.forced.get(len(self.made), likewise)
        if self._is_repeated(place):
            assert self._repeated is not None
            told = self._repeated.value
            self._repeats += 1
        if self.forced and told is not likewise and not _is_same(told, value):
            self._instead.insert(0, (value, told))
        self.made.append(Choice(place, told))
        return self.noted(told)

    def noted(self, value: Value) -> Value:
        """Return the value that Python was given last so that it notes what it is compared with, if this pass asks for that."""
        last = len(self.made) - 1
        if not self._asks or last < 0 or not _is_same(self.made[last].value, value):
            return value
        return noting(value, self.compared.setdefault(last, set()))

    def _is_repeated(self, place: Place) -> bool:
        """Whether the answer here is one that is repeated."""
        at = (
            self._repeated is not None
            and len(self.made) >= max(self.forced)
            and place == self._repeated.place
        )
        return at and self._repeats < MANY

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


def _line() -> tuple[str, int, int]:
    """Return the file, the line and the instruction of the model's code that runs."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INNER:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno, frame.f_lasti


def follow_others(first: Choices, run: Callable[[Choices], None], unread: Callable[[], int]) -> None:
    """Run the passes that other answers lead to, one other answer at a time, then those that these lead to.

    Args:
        first: of a pass with the answers that were computed.
        run: runs a pass.
        unread: returns how many parameters were not read yet. Where a pass has read more, others like it are followed too.
    """
    tried: set[tuple[Any, ...]] = set()
    waiting = deque([(first, 0, False)])
    most = 1000 + 4 * first.operations
    passes = selections = 0
    compared = _compared(first, run, most)
    while waiting:
        before, start, more = waiting.popleft()
        for position, other, key in _others(before, start, more, compared if before is first else {}):
            if key in tried:
                continue
            if isinstance(other, str):
                if selections == MOST_SELECTIONS:
                    continue
                selections += 1
            elif passes == MOST_PASSES:
                warn_user(
                    f"example_inputs: the model takes more than {MOST_PASSES} paths, by numbers that it reads in Python; "
                    "the trace has not followed all of them. Give several inputs that take others, fm.Examples(x1, x2)"
                )
                return
            tried.add(key)
            passes += not isinstance(other, str)
            answers: dict[int, Value] = {k: choice.value for k, choice in enumerate(before.made[:position])}
            repeated = other if isinstance(other, Repeated) else None
            if isinstance(other, Pair):
                answers |= {position: other.first, position + 1: other.second}
            else:
                answers[position] = other.value if isinstance(other, Repeated) else other
            choices, left = Choices(answers, most, repeated), unread()
            if not _runs(run, choices):
                continue
            found_more = unread() < left
            waiting.append((choices, position + (not found_more), found_more))


def _runs(run: Callable[[Choices], None], choices: Choices) -> bool:
    """Run a pass with other answers and undo what it writes; return whether it ended."""
    try:
        with _limited():
            run(choices)
    except (Exception, PathLeft, SystemExit):  # the model's own code may raise on what cannot be
        return False
    finally:
        choices.restore()
    return True


def _compared(first: Choices, run: Callable[[Choices], None], most: float) -> dict[int, list[int]]:
    """Return the whole numbers that each whole number or list of them is compared with, by position, in a pass like the first."""
    if not any(isinstance(choice.value, (int, list)) and choice.value is not True for choice in first.made):
        return {}
    asked = Choices(operations=most, asks=True)
    _runs(run, asked)
    return {position: sorted(found)[:MOST_COMPARED] for position, found in asked.compared.items()}


@contextmanager
def _limited() -> Iterator[None]:
    """Leave a pass after some seconds: another answer may make a loop endless that runs no operation."""
    if sys.gettrace() is not None:  # a debugger or a measure of coverage
        yield
        return
    end = time.monotonic() + LONGEST_SECONDS

    def look(_frame: Any, _event: str, _arg: Any) -> Any:
        if time.monotonic() > end:
            raise PathLeft
        return look

    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(None)


def _others(
    choices: Choices, start: int, found_more: bool, compared: Mapping[int, list[int]]
) -> Iterator[tuple[int, Value | Repeated | Pair, tuple[Any, ...]]]:
    """Yield (position, other answer, what it has in common with those that need not be tried again)."""
    counts: Counter[Place] = Counter()
    first: dict[Place, int] = {}
    for position, choice in enumerate(choices.made):
        repeat = counts[choice.place]
        counts[choice.place] += 1
        if isinstance(choice.value, bool):
            first.setdefault(choice.place, position)
        for near in (0, -1, 1):
            for number in compared.get(position, ()):
                for other in _all_and_one(choice.value, number + near):
                    yield position, other, (choice.place, "compared", repr(other))
        for number, other in enumerate(others(choice.value) if position >= start else ()):
            if found_more:
                yield position, other, (choice.place, repeat, repr(other))
            else:
                alike = other if isinstance(other, bool) else -1 - number
                yield position, other, (choice.place, min(repeat, MOST_REPEATS), alike)
        following = choices.made[position + 1 : position + 2]
        if position >= start and type(choice.value) is int and [x.place for x in following] == [choice.place]:
            pair = Pair(choice.value + 1, following[0].value - 1)  # type: ignore[operator]
            yield position, pair, (choice.place, min(repeat, MOST_REPEATS), "pair")
    for place, position in first.items():
        if counts[place] > MOST_REPEATS:
            for answer in (True, False):
                yield position, Repeated(place, answer), (place, "repeated", answer)
