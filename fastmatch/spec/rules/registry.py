"""The table of rules, and what rules of several kinds share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from fastmatch.spec.labels import Label, pin, split_product, split_sum, unify
from fastmatch.spec.operations import Call
from fastmatch.spec.record import Record, fresh

__all__ = ["RULES", "Rule", "cut", "pin_all", "rule", "split_groups", "unify_broadcast"]

Rule: TypeAlias = Callable[[Record, Call], None]

RULES: dict[str, Rule] = {}
"""Name of an operation without its namespace (``relu_``) -> its rule."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the operations with these names."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def pin_all(record: Record, call: Call, reason: str) -> None:
    """Pin every axis of the operation's inputs and outputs: the fallback where no rule applies."""
    for tensor in call.inputs:
        for label in record.labels(tensor):
            pin(label, reason)
    for tensor in call.outputs:
        known = record.knows(tensor)
        for label in record.labels(tensor) if known else []:
            pin(label, reason)
        # In place, an operation may also have changed the shape.
        if not known or [label.size for label in record.labels(tensor)] != list(tensor.shape):
            record.set(tensor, fresh(tensor.shape, reason))


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
