"""The passes that a model would run if numbers that it reads in Python were others.

A model that asks ``if h.norm() > 2`` runs one of several paths. Others may use the same parameters in another way, so a
trace follows them as well: the model is told another answer, and what that pass shows is joined with the first.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastmatch._internal.callers import warn_user
from fastmatch.spec.choices import INNER, Choices, Value
from fastmatch.spec.guards import PathLeft
from fastmatch.spec.other_answers import MOST_COMPARED, tries

__all__ = ["follow_others"]

MOST_PASSES = 48
"""Passes with other answers for one example."""

TOLD = 2
"""Answers of this rank and beyond are left out without a warning: every question was told two other answers."""

MOST_SELECTIONS = 8
"""Passes in which only lengths are others, for one example, beside those. More of them are no reason for a warning: models seldom
branch on a length, and often select."""

LONGEST_SECONDS = 5.0
"""How long a pass with another answer may take."""

MOST_SECONDS = 60.0
"""How long all of them may take for one example: far beyond what is usual, so that a trace does not depend on a machine's speed."""

BESIDE = 1e-6
"""How far beside the numbers that it is compared with a float is tried, in their size."""

FAILURES = 5
"""After so many passes that failed, and none that ended, a question is told nothing else: it asks for what fits the inputs."""


def follow_others(first: Choices, run: Callable[[Choices], None], unread: Callable[[], int]) -> None:
    """Run the passes that other answers lead to, one other answer at a time, then those that these lead to.

    Args:
        first: of a pass with the answers that were computed.
        run: runs a pass.
        unread: returns how many parameters were not read yet. Where a pass has read more, others like it are followed too.
    """
    tried: set[tuple[Any, ...]] = set()
    waiting = deque([(first, 0, False)])
    passes = selections = 0
    ended: set[tuple[Any, ...]] = set()
    failures: Counter[tuple[Any, ...]] = Counter()
    end = time.monotonic() + MOST_SECONDS
    compared = _compared(first, run)
    while waiting:
        before, start, more = waiting.popleft()
        for one in tries(before, start, more, compared if before is first else {}):
            if one.key in tried or failures[one.question] == FAILURES:
                continue
            if one.is_selection and selections == MOST_SELECTIONS:
                continue
            if passes == MOST_PASSES or time.monotonic() > end:
                if one.is_selection or one.is_argument or one.rank >= TOLD:
                    continue
                warn_user(
                    f"example_inputs: the model takes more paths than the {passes} that were tried, by numbers that it reads in "
                    "Python; the trace has not followed all of them. Give several inputs that take others, fm.Examples(x1, x2)"
                )
                return
            tried.add(one.key)
            selections += one.is_selection
            passes += not one.is_selection
            answers: dict[int, Value] = {k: x.value for k, x in enumerate(before.made[: one.position])}
            choices = Choices(
                {**answers, **one.answers}, repeated=one.repeated, ties=one.ties, limits=first.limits
            )
            left = unread()
            if not _runs(run, choices):
                failures[one.question] += one.question not in ended
            else:
                ended.add(one.question)
                found_more = unread() < left
                waiting.append((choices, one.position + (not found_more), found_more))


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


def _compared(first: Choices, run: Callable[[Choices], None]) -> dict[int, list[float]]:
    """Return what each number or list of numbers is compared with, by position, in a pass like the first; of floats, numbers beside."""
    if not any(isinstance(x.value, (int, float, list)) and not isinstance(x.value, bool) for x in first.made):
        return {}
    asked = Choices(asks=True, limits=first.limits)
    _runs(run, asked)
    return {
        position: _beside(found)
        if isinstance(asked.made[position].value, float)
        else sorted(found)[:MOST_COMPARED]
        for position, found in asked.compared.items()
    }


def _beside(numbers: set[float]) -> list[float]:
    """Return a float a little above and a little below each number: between any two that follow each other there is one."""
    few = sorted(numbers)[: MOST_COMPARED // 2]
    return [float(x + side * BESIDE * max(abs(x), 1.0)) for x in few for side in (1, -1)]


@contextmanager
def _limited() -> Iterator[None]:
    """Leave a pass after some seconds: another answer may make a loop endless that runs no operation."""
    if sys.gettrace() is not None:  # a debugger or a measure of coverage
        yield
        return
    end = time.monotonic() + LONGEST_SECONDS

    def look(frame: Any, _event: str, _arg: Any) -> Any:
        # In the model's own code only: the others call operations, or end; and labels may not be left half done.
        if frame.f_globals.get("__name__", "").partition(".")[0] in INNER:
            return None
        if time.monotonic() > end:
            raise PathLeft
        return look

    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(None)
