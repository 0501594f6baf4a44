"""The check that ranks were given the same models and options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from fastmatch._internal.ranks import Ranks, is_divided
from fastmatch._internal.shared_data import checksum
from fastmatch._internal.states import State
from fastmatch.matching.matcher import Matcher, as_code

__all__ = ["check_same_on_ranks"]


def check_same_on_ranks(ranks: Ranks, matcher: Matcher, **states: State) -> None:
    """Raise ValueError if another rank has another matcher or model; the first difference is named.

    Of a divided tensor, which is another one on every rank, the division is compared.

    Cost: one pass over the models, if there are several ranks.
    """
    if ranks.size == 1:
        return
    tables = [getattr(matcher, field.name) for field in fields(matcher)]  # type: ignore[arg-type]
    start = checksum([table for table in tables if isinstance(table, Mapping)])
    marks: dict[str, object] = {"matcher": (as_code(matcher), start)}
    for argument, state in states.items():
        marks |= {f"{argument}: tensor {name!r}": _mark(tensor) for name, tensor in state.items()}
    for rank, found in enumerate(ranks.exchange(marks, "the arguments of align")):
        other = next((name for name in marks if found.get(name) != marks[name]), None)
        if other is not None:
            raise ValueError(
                f"{other} is not the same on ranks {ranks.rank} and {rank}; all ranks must be given the same models and "
                "options (fm.alone() keeps a call to one rank)"
            )


def _mark(tensor: torch.Tensor) -> object:
    if not is_divided(tensor):
        return checksum(tensor)
    divided: Any = tensor
    return tuple(divided.shape), str(divided.dtype), str(divided.placements)
