"""Operations whose result is as long as values say, with other values: a model may branch on that length, or cut there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastmatch.spec.choices import SOME, Selection

__all__ = ["with_selections"]

NONZERO = frozenset(["aten.nonzero", "aten.nonzero_numpy"])
DISTINCT = frozenset(
    ["aten._unique", "aten._unique2", "aten.bincount", "aten.unique_consecutive", "aten.unique_dim"]
)
INDEXED = frozenset(["aten.index", "aten.index_put", "aten.index_put_"])


def with_selections(
    name: str,
    args: tuple[Any, ...],
    depends: Callable[[torch.Tensor], bool],
    told: Callable[[torch.Tensor], Selection],
) -> tuple[Any, ...]:
    """Return the arguments of an operation, with masks that select none or all of an axis if the model is told so.

    Args:
        name: of the operation.
        args: its arguments.
        depends: whether a tensor depends on data or weights.
        told: returns what the model is told of a tensor.
    """

    def replaced(tensor: torch.Tensor, by: Callable[[torch.Tensor, bool], torch.Tensor]) -> torch.Tensor:
        selected = told(tensor) if depends(tensor) else SOME
        return tensor if selected == SOME else by(tensor, selected == "all")

    def masked(mask: Any) -> Any:
        is_mask = isinstance(mask, torch.Tensor) and mask.dtype == torch.bool
        return replaced(mask, torch.full_like) if is_mask else mask

    if name in NONZERO:
        return (replaced(args[0], torch.full_like), *args[1:])
    if name in DISTINCT:
        return (replaced(args[0], _distinct), *args[1:])
    if name == "aten.masked_select":
        return (args[0], masked(args[1]), *args[2:])
    if name in INDEXED:
        return (args[0], [masked(index) for index in args[1]], *args[2:])
    return args


def _distinct(like: torch.Tensor, all_distinct: bool) -> torch.Tensor:
    """Return a tensor of equal values or, as far as its type has so many, of distinct ones."""
    if not all_distinct:
        return torch.zeros_like(like)
    return torch.arange(like.numel(), device=like.device).reshape(like.shape).to(like.dtype)
