"""The check that ranks were given the same models and options."""

from __future__ import annotations

import re
from dataclasses import is_dataclass

from fastmatch._internal.ranks import Ranks
from fastmatch._internal.shared_data import checksum
from fastmatch._internal.states import State
from fastmatch.matching.matcher import Matcher

__all__ = ["check_same_on_ranks"]

ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def check_same_on_ranks(ranks: Ranks, matcher: Matcher, **states: State) -> None:
    """Raise ValueError if another rank has another matcher or model; the first difference is named.

    Cost: one pass over the models, if there are several ranks.
    """
    if ranks.size == 1:
        return
    text = repr(matcher) if is_dataclass(matcher) else type(matcher).__name__
    marks: dict[str, object] = {"matcher": ADDRESS.sub("", text)}
    for argument, state in states.items():
        marks |= {f"{argument}: tensor {name!r}": checksum(tensor) for name, tensor in state.items()}
    for rank, found in enumerate(ranks.exchange(marks, "the arguments of align")):
        other = next((name for name in marks if found.get(name) != marks[name]), None)
        if other is not None:
            raise ValueError(
                f"{other} is not the same on ranks {ranks.rank} and {rank}; all ranks must be given the same models and "
                "options (fm.alone() keeps a call to one rank)"
            )
