"""What else a model could be told where it reads a number, and the passes in which it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastmatch.spec.choices import ARGUMENT, Choices, Place, Repeated, Value

__all__ = ["Try", "others", "tries"]

MOST_REPEATS = 2
"""After so many, the repeats of a question count as one: a loop is followed for none, one, two and some rounds."""

MOST_COMPARED = 16
"""Numbers that one number is compared with, of which each is tried, and of the first MOST_NEAR the neighbours too."""

MOST_NEAR = 4

FAR = 100
"""How far other answers to a question for a number are, so that they are above and below what a model compares with. Two more
are one away: a model may round the number and count by it."""

LONG = 64
"""Numbers in a list from which fewer other lists are tried: a model may loop over it."""

LAST = 2
"""By how many ranks the arguments come after what a model computes."""


@dataclass(frozen=True)
class Try:
    """One pass with other answers.

    Attributes:
        position: of the first other answer.
        answers: position -> other answer, for one or two positions.
        key: the place, and what else it has in common with those that need not be tried again.
        rank: tries of a low rank come first, so that each question has one answer before any has its second.
        repeated, ties: as of :class:`Choices`.
    """

    position: int
    answers: Mapping[int, Value]
    key: tuple[Any, ...]
    rank: int = 0
    repeated: Repeated | None = None
    ties: bool = True
    is_selection: bool = False
    is_argument: bool = False

    @property
    def question(self) -> tuple[Any, ...]:
        """The question that is answered: where it is asked, and how often it was asked before."""
        return self.key[:2]


def others(value: Value) -> list[Value]:
    """Return what else could have been given: for each kind of value as many, in one order."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        # Also so far below and above that a part of the number is another too: ``h[:, : n // 4]``.
        return [
            value + 1,
            value - 1,
            2 * value + 8,
            value // 4,
            FAR * (abs(value) + 1),
            2 * value,
            value // 2,
        ]
    if isinstance(value, float):
        far = FAR * (abs(value) + 1)
        return [far, -far, value - 1, value + 1] if far < float("inf") else [0.0]
    if isinstance(value, str):
        return ["all", "none"]
    if isinstance(value, list):
        if not value:
            return []
        changed: list[Value] = [list(other) for other in zip(*map(others, value), strict=False)]
        if len(value) > LONG:
            return [*changed[:4], value[::-1]]
        return [*changed[:2], *_others_of_whole(value), value[::-1], *changed[2:], value[1:] + value[:1]]
    if value.dtype.kind not in "biuf" or not value.size:
        return []
    nested = others(value.tolist())
    return [np.asarray(other).astype(value.dtype).reshape(value.shape) for other in nested]


def _others_of_whole(values: list[Any]) -> list[list[Any]]:
    """Return whole numbers of the same sum, as lengths of parts have; equal ones; and distinct ones."""
    if len(values) < 2 or not all(type(value) is int for value in values):
        return []
    count = len(values)
    return [[values[0] + 1, *values[1:-1], values[-1] - 1], values[:1] * count, list(range(count))]


def _all_and_one(value: Value, number: float) -> list[Value]:
    """Return a number in the place of another one, or of all numbers of a list and of its first."""
    if isinstance(value, float) is not isinstance(number, float):
        return []
    if not isinstance(value, list):
        return [number] if number != value else []
    return [[number] * len(value), [number, *value[1:]]] if all(type(x) is int for x in value) else []


def tries(choices: Choices, start: int, found_more: bool, compared: Mapping[int, list[float]]) -> list[Try]:
    """Return the passes that other answers from position ``start`` on lead to, one other answer at a time, by rank.

    Args:
        choices: of a pass that was run.
        start: the first position that is told otherwise.
        found_more: whether that pass has read more parameters: then answers that were tried elsewhere are tried here, too.
        compared: position -> whole numbers that the number there is compared with, or numbers beside those of a float.
    """
    return sorted(_tries(choices, start, found_more, compared), key=lambda one: one.rank)


def _tries(
    choices: Choices, start: int, found_more: bool, compared: Mapping[int, list[float]]
) -> Iterator[Try]:
    counts: Counter[Place] = Counter()
    first: dict[Place, int] = {}
    for position, choice in enumerate(choices.made):
        place, value = choice.place, choice.value
        repeat = min(counts[place], MOST_REPEATS)
        counts[place] += 1
        if isinstance(value, bool):
            first.setdefault(place, position)
        if position < start:
            continue
        is_argument = place[0].startswith(ARGUMENT)
        rank = LAST * is_argument
        for near in (0, -1, 1):
            for number in compared.get(position, [])[: MOST_NEAR if near else None]:
                for other in _all_and_one(value, number + near):
                    key = place, "compared", repr(other)
                    yield Try(position, {position: other}, key, rank + abs(near), is_argument=is_argument)
        for number, other in enumerate(others(value)):
            if isinstance(value, list) and other == value:
                continue
            alike = other if isinstance(other, bool) else -1 - number
            key = (place, counts[place], repr(other)) if found_more else (place, repeat, alike)
            yield Try(
                position,
                {position: other},
                key,
                rank + number,
                is_selection=isinstance(value, str),
                is_argument=is_argument,
            )
            if number == 0 and _comes_again(choices, position):
                yield Try(
                    position,
                    {position: other},
                    (*key, "alone"),
                    rank + number,
                    ties=False,
                    is_argument=is_argument,
                )
        following = choices.made[position + 1 : position + 2]
        if type(value) is int and [x.place for x in following] == [
            place
        ]:  # lengths of parts, of the same sum
            after = following[0].value
            assert isinstance(after, int)
            pair: dict[int, Value] = {position: value + 1, position + 1: after - 1}
            yield Try(position, pair, (place, repeat, "pair"), ties=False)
    for place, position in first.items():
        if counts[place] > MOST_REPEATS:
            for rank, answer in enumerate((True, False)):
                yield Try(
                    position,
                    {position: answer},
                    (place, "repeated", answer),
                    rank,
                    repeated=Repeated(place, answer),
                )


def _comes_again(choices: Choices, position: int) -> bool:
    """Whether an equal number is read later, by chance or because it is the same."""
    value = choices.made[position].value
    if isinstance(value, (bool, str, np.ndarray)):
        return False
    return any(type(x.value) is type(value) and x.value == value for x in choices.made[position + 1 :])
