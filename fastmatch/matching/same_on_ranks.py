"""The checks that ranks were given the same whole models and options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from fastmatch._internal.ranks import Ranks
from fastmatch._internal.shared_data import checksum
from fastmatch._internal.states import State
from fastmatch.matching.matcher import Matcher, as_code

__all__ = ["check_same_on_ranks", "check_whole"]


def check_whole(state: State, argument: str) -> None:
    """Raise TypeError if a tensor is divided among ranks, as those of FSDP2 and of tensor parallelism are."""
    for name, tensor in state.items():
        if type(tensor).__name__ == "DTensor":
            raise TypeError(
                f"{argument}: tensor {name!r} is a DTensor, of which each rank has a part; expected whole tensors: give the "
                "state dict that torch.distributed.checkpoint.state_dict returns with full_state_dict=True"
            )


def check_same_on_ranks(ranks: Ranks, matcher: Matcher, **states: State) -> None:
    """Raise ValueError if another rank has another matcher or model; the first difference is named.

    Cost: one pass over the models, if there are several ranks.
    """
    if ranks.size == 1:
        return
    tables = [getattr(matcher, field.name) for field in fields(matcher)]  # type: ignore[arg-type]
    start = checksum([table for table in tables if isinstance(table, Mapping)])
    marks: dict[str, object] = {"matcher": (as_code(matcher), start)}
    for argument, state in states.items():
        marks |= {f"{argument}: tensor {name!r}": checksum(tensor) for name, tensor in state.items()}
    for rank, found in enumerate(ranks.exchange(marks, "the arguments of align")):
        other = next((name for name in marks if found.get(name) != marks[name]), None)
        if other is not None:
            raise ValueError(
                f"{other} is not the same on ranks {ranks.rank} and {rank}; all ranks must be given the same models and "
                "options (fm.alone() keeps a call to one rank)"
            )
