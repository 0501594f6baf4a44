"""The table of rules, and what rules of several kinds share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch

from fastmatch.spec.labels import Label, pin, split_product, split_sum, unify
from fastmatch.spec.operations import Call
from fastmatch.spec.record import Record, fresh

__all__ = [
    "POINTWISE", "RULES", "Rule", "broadcast_labels", "cut", "pin_all", "rule", "rule_of", "set_saved", "split_groups",
    "unify_broadcast", "unite_broadcast",
]  # fmt: skip

Rule: TypeAlias = Callable[[Record, Call], None]

RESHAPES_MEMORY = frozenset(
    ["as_strided", "as_strided_", "as_strided_scatter", "resize_", "resize_as_", "set_"]
)
"""Operations that may reach the whole memory of a tensor, beyond its own axes."""

RULES: dict[str, Rule] = {}
"""Name of an operation without its namespace (``relu_``) -> its rule."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the operations with these names."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


POINTWISE = "pointwise"
"""The entry of the table for every operation that torch itself marks as pointwise and that has no entry of its own."""


@cache
def rule_of(func: Any) -> Rule | None:
    """Return the rule of an operation of torch (an overload); None if there is none, and every axis is pinned."""
    namespace, _, name = func._schema.name.partition("::")
    if namespace != "aten":
        return None
    if name in RULES:
        return RULES[name]
    if torch.Tag.view_copy in func.tags:
        return RULES.get(name.removesuffix("_copy"))
    random = torch.Tag.nondeterministic_seeded in func.tags
    return RULES[POINTWISE] if torch.Tag.pointwise in func.tags and not random else None


def pin_all(record: Record, call: Call, reason: str) -> None:
    """Pin every axis of the operation's inputs and outputs: the fallback where no rule applies."""
    for tensor in call.inputs:
        for label in record.labels(tensor):
            pin(label, reason)
        if call.base in RESHAPES_MEMORY:
            record.pin_memory(tensor, reason)
    for tensor in call.outputs:
        known = record.knows(tensor)
        for label in record.labels(tensor) if known else []:
            pin(label, reason)
        # In place, an operation may also have changed the shape.
        if not known or [label.size for label in record.labels(tensor)] != list(tensor.shape):
            record.set(tensor, fresh(tensor.shape, reason))


def set_saved(record: Record, call: Call, tensors: Sequence[torch.Tensor], labels: Sequence[Label]) -> None:
    """Label results that are kept for a backward pass: whoever reads them pins ``labels``, on whose order they depend."""
    for tensor in tensors:
        record.set(tensor, fresh(tensor.shape, call.name))
        record.pin_if_read(tensor, labels, call.name)


def cut(label: Label, sizes: Sequence[int], reason: str) -> list[Label]:
    """Cut a label into segments of the given sizes; pin it if it cannot be cut there."""
    parts = split_sum(label, sizes)
    if parts is None:
        pin(label, reason)
        parts = fresh(sizes, reason)
    return parts


def split_groups(label: Label, groups: int) -> list[Label] | None:
    """Split a label into (groups, positions per group); None if that cannot be expressed."""
    return split_product([label], [groups, label.size // groups])


def unify_broadcast(record: Record, tensor: torch.Tensor, labels: Sequence[Label], reason: str) -> None:
    """Unite the axes of ``tensor``, broadcast from the last one, with ``labels``."""
    for mine, label in zip(reversed(labels), reversed(record.labels(tensor)), strict=False):
        if label.size == mine.size:
            unify(mine, label, reason)


def broadcast_labels(
    record: Record, tensors: Sequence[torch.Tensor], shape: Sequence[int], reason: str
) -> list[Label]:
    """Unite the axes of tensors that are broadcast to ``shape``, and return the labels of the result."""
    return unite_broadcast([record.labels(tensor) for tensor in tensors], shape, reason)


def unite_broadcast(operands: Sequence[Sequence[Label]], shape: Sequence[int], reason: str) -> list[Label]:
    """Unite the labels of operands that are broadcast to ``shape``, and return those of the result."""
    labels: list[Label | None] = [None] * len(shape)
    for operand in operands:
        offset = len(shape) - len(operand)
        for dim, label in enumerate(operand):
            if label.size != shape[offset + dim]:
                continue  # broadcast: the same at every position of this axis
            seen = labels[offset + dim]
            if seen is not None:
                unify(seen, label, reason)
            if seen is None or label.follows is not None:
                labels[offset + dim] = label
    return [label if label is not None else Label(n) for label, n in zip(labels, shape, strict=True)]
