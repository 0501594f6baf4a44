"""ATen operations as the tracer and the reader of activations see them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

__all__ = ["Call", "bind", "counts", "is_composite", "op_name", "tensors_in"]


def op_name(func: Any) -> str:
    """Return ``aten.relu`` for every overload of the operation."""
    return f"{func.namespace}.{func._schema.name.split('::')[1]}"


def counts(func: Any) -> bool:
    """Whether the operation is counted. torch adds a detach wherever a mode keeps a new tensor, so it is not."""
    return func is not torch.ops.aten.detach.default


@cache
def is_composite(func: Any) -> bool:
    """Whether torch defines the operation by others and nothing else.

    Modes see the others, except where tensors were made in inference mode: then they see the operation itself.
    """
    return func._can_decompose() and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors in nested lists, tuples and dicts, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors_in(v)]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_in(v)]
    return []


@cache
def _parameters(func: Any) -> tuple[tuple[str, bool, Any], ...]:
    """Return (name, whether keyword only, default) of every argument in the operation's schema."""
    return tuple((a.name, a.kwarg_only, a.default_value) for a in func._schema.arguments)


def bind(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments by the names of the operation's schema, in its order, with defaults filled in."""
    names = _parameters(func)
    positional = iter(args)
    return {
        name: kwargs[name] if name in kwargs else default if only_keyword else next(positional, default)
        for name, only_keyword, default in names
    }


@dataclass(frozen=True)
class Call:
    """One operation of a forward pass, after it ran.

    Rules read arguments by schema name: ``call["weight"]``, or ``call.get("dim")`` where only some overloads have it.

    Attributes:
        number: running number among the counted operations.
        name: ``aten.relu_``.
        arguments: by schema name, defaults included.
        out: the result.
        spot: what the operation belongs to in the pass.
    """

    number: int
    name: str
    arguments: dict[str, Any]
    out: Any
    spot: tuple[str, str, str, int] = ("", "", "", 0)

    @property
    def base(self) -> str:
        """The name without its namespace: ``relu_``."""
        return self.name.partition(".")[2]

    @property
    def first(self) -> Any:
        """The value of the first argument."""
        return next(iter(self.arguments.values()), None)

    @property
    def inputs(self) -> list[torch.Tensor]:
        """The tensors among the arguments, in order."""
        return tensors_in(self.arguments)

    @property
    def outputs(self) -> list[torch.Tensor]:
        """The tensors of the result, in order."""
        return tensors_in(self.out)

    def __getitem__(self, argument: str) -> Any:
        return self.arguments[argument]

    def get(self, argument: str) -> Any:
        """Return the argument; None if this overload does not have it."""
        return self.arguments.get(argument)

    def position(self, argument: str) -> int:
        """Return the position of an argument in the schema."""
        return list(self.arguments).index(argument)

    def dim(self, rank: int, argument: str = "dim") -> int:
        """Return a dimension argument as a number from 0 to ``rank`` - 1."""
        return self.arguments[argument] % max(rank, 1)
