"""Tensors that are divided among ranks: DTensors, as FSDP2 and tensor parallelism make them.

A divided model is never gathered as a whole. A rank that needs a tensor asks for it, all ranks gather it, and those that did
not ask forget it at once.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn

from fastmatch._internal.ranks import Ranks, is_divided

__all__ = [
    "DividedState",
    "GatheringRanks",
    "check_in_parts",
    "check_undivided",
    "class_undivided",
    "divided_name",
    "division_of",
    "is_fsdp",
    "is_fsdp_class",
    "local_part",
    "on_whole",
    "undivided",
    "without_division",
]

T = TypeVar("T")
State: TypeAlias = Mapping[str, torch.Tensor]


FSDP1 = "torch's FullyShardedDataParallel (FSDP1)"
ZERO = "DeepSpeed's ZeRO-3"

WHOLE = {
    FSDP1: "divide it by torch.distributed.fsdp.fully_shard (FSDP2), or give the whole state dict of "
    "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))",
    ZERO: "give whole tensors: {name: p.detach().clone() for name, p in model.named_parameters()}, in a block "
    "with deepspeed.zero.GatheredParameters(list(model.parameters()))",
}
"""Who divides a model into flat parts, and what to give instead of it."""


def division_of(module: nn.Module) -> str | None:
    """Return who divides parameters of a module into flat parts that are no DTensors; None if nobody does.

    They are recognized by the names of their classes and attributes, so that nothing is imported. Only a forward pass, which
    all ranks run together, gathers such parameters.
    """
    for part in module.modules():
        if any(base.__name__ == "FullyShardedDataParallel" for base in type(part).__mro__):
            return FSDP1
    return ZERO if any(hasattr(parameter, "ds_id") for parameter in module.parameters()) else None


def check_in_parts(module: nn.Module, argument: str) -> None:
    """Raise TypeError if parameters are divided into flat parts, which have neither the names nor the shapes of the model's."""
    by = division_of(module)
    if by is not None:
        raise TypeError(f"{argument}: its parameters are divided among ranks by {by}; {WHOLE[by]}")


def divided_name(model: nn.Module | State) -> str | None:
    """Return the name of the first tensor that is divided; None if all of them are whole."""
    if "torch.distributed.tensor" not in sys.modules:
        return None
    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    return next((name for name, tensor in tensors.items() if is_divided(tensor)), None)


def check_undivided(model: nn.Module | State, argument: str) -> None:
    """Raise TypeError if a tensor of a module or state dict is divided among ranks; it is named."""
    if isinstance(model, nn.Module):
        check_in_parts(model, argument)
    name = divided_name(model)
    if name is not None:
        raise TypeError(
            f"{argument}: tensor {name!r} is a DTensor, of which each rank has a part; expected whole tensors: only fm.align by "
            "weights, Alignment.apply and fm.merge take models that are divided among ranks"
        )


def is_fsdp(module: nn.Module) -> bool:
    """Return whether torch's ``fully_shard`` divides some parameters of a module."""
    return any(is_fsdp_class(type(part)) for part in module.modules())


def is_fsdp_class(kind: type) -> bool:
    """Return whether a class is one that ``fully_shard`` makes."""
    return any(base.__name__ == "FSDPModule" for base in kind.__mro__)


def class_undivided(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before ``fully_shard``."""
    return next(base for base in type(module).__mro__ if not is_fsdp_class(base))


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this rank has; it shares the tensor's memory."""
    part: Any = tensor
    return part.to_local() if is_divided(tensor) else tensor


def on_whole(tensor: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return ``function(tensor)``, divided as the tensor is; all ranks of a divided one must make the call.

    The function must keep the shape.
    """
    if not is_divided(tensor):
        return function(tensor)
    from torch.distributed.tensor import distribute_tensor

    divided: Any = tensor
    whole = function(divided.full_tensor())
    part = distribute_tensor(whole, divided.device_mesh, divided.placements, src_data_rank=None)
    result = torch.empty_like(divided)  # with memory of its own: a part may be a view of the whole
    local_part(result).copy_(part.to_local())
    return result


def undivided(module: nn.Module) -> nn.Module:
    """Return a copy to trace, with divided parameters on the meta device and without the hooks that divide and gather.

    A module without divided parameters is returned as it is. Whole tensors and other attributes are shared.
    """
    if divided_name(module) is None:
        return module
    made: dict[int, nn.Parameter] = {}
    copies: dict[int, nn.Module] = {}

    def copied(old: nn.Module) -> nn.Module:
        if id(old) in copies:
            return copies[id(old)]
        kind = class_undivided(old)
        new = copies[id(old)] = kind.__new__(kind)
        new.__dict__.update({key: without_division(value) for key, value in vars(old).items()})
        new._parameters = {name: hollow(p) for name, p in old._parameters.items()}
        new._buffers = dict(old._buffers)
        new._modules = {name: None if m is None else copied(m) for name, m in old._modules.items()}
        return new

    def hollow(parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or not is_divided(parameter):
            return parameter
        if id(parameter) not in made:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            made[id(parameter)] = nn.Parameter(empty, requires_grad=False)
        return made[id(parameter)]

    return copied(module)


def without_division(value: Any) -> Any:
    """Return a table of hooks without those of torch.distributed; any other attribute as it is."""
    if not isinstance(value, OrderedDict):
        return value
    return OrderedDict((key, hook) for key, hook in value.items() if not _is_of_distributed(hook))


def _is_of_distributed(hook: Any) -> bool:
    function = getattr(hook, "hook", hook)  # torch wraps hooks of state dicts
    return str(getattr(function, "__module__", "")).startswith("torch.distributed.")


class DividedState(Mapping[str, torch.Tensor]):
    """A state dict whose divided tensors are gathered when they are asked for.

    Attributes:
        headers: name -> tensor on the meta device.
        device: where this rank's parts are, and the tensors that are gathered of them.
    """

    def __init__(self, state: State, gather: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.state, self.gather = state, gather

    @cached_property
    def headers(self) -> dict[str, torch.Tensor]:
        """Shapes and types."""
        return {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            for name, tensor in self.state.items()
        }

    @property
    def device(self) -> torch.device:
        return local_part(next(iter(self.state.values()))).device

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.state[name]
        return self.gather(tensor) if is_divided(tensor) else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


class GatheringRanks(Ranks):
    """Ranks that gather divided tensors for each other, while each does work of its own.

    A rank that asks for a tensor waits until every other one asks for one too, or comes to the next exchange. Then all
    gather what was asked for, one tensor after the other. So at most one tensor is whole on a rank that has no use for it.

    Args:
        ranks: the processes.
        states: the divided state dicts, in the same order on all ranks.
    """

    is_group = True

    def __init__(self, ranks: Ranks, states: Sequence[State]) -> None:
        self.ranks, self.rank, self.size = ranks, ranks.rank, ranks.size
        self.tensors = [tensor for state in states for tensor in state.values() if is_divided(tensor)]
        self.numbers = {id(tensor): k for k, tensor in enumerate(self.tensors)}
        self.states = [DividedState(state, self._ask) for state in states]

    def exchange(self, value: T, what: str) -> list[T]:
        while self._gather(None)[1]:
            pass
        return self.ranks.exchange(value, what)

    def broadcast(self, compute: Callable[[], T], what: str, source: int = 0) -> T:
        while self._gather(None)[1]:
            pass
        return self.ranks.broadcast(compute, what, source)

    @property
    def is_nested(self) -> bool:  # type: ignore[override]
        return self.ranks.is_nested

    @contextmanager
    def together(self) -> Iterator[None]:
        with self.ranks.together():
            yield

    def _ask(self, tensor: torch.Tensor) -> torch.Tensor:
        found = self._gather(self.numbers[id(tensor)])[0]
        assert found is not None
        return found

    def _gather(self, wanted: int | None) -> tuple[torch.Tensor | None, bool]:
        """Gather what the ranks want; return what this rank wants, and whether any of them wanted something."""
        asked = [k for k in self.ranks.exchange(wanted, "tensors of a divided model") if k is not None]
        found = None
        for k in dict.fromkeys(asked):
            whole = self.ranks.whole(self.tensors[k], "the gathering of a divided tensor")
            if k == wanted:
                found = whole
            del whole
        return found, bool(asked)
