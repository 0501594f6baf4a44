"""Whether an operation moves with its operands as its rule says: permute what the rule leaves free, and compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastmatch.spec.escapes import Escapes
from fastmatch.spec.labels import Label, find, unify
from fastmatch.spec.operations import tensors_in
from fastmatch.spec.record import fresh
from fastmatch.spec.trace import Tracer


@dataclass(frozen=True)
class Outcome:
    """What a comparison has shown.

    Attributes:
        free: the axes of the operands that moved.
        failed: whether a rule gave up, so that everything was pinned.
        error: the largest difference, relative to the largest value; 0 if nothing moved.
    """

    free: int
    failed: bool
    error: float


def order_of(label: Label, orders: dict[int, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    """Return the index that reorders an axis: a random order for every leaf that is free."""
    label = find(label)
    if label.kind == "leaf":
        if label.pinned is not None or label.size <= 1:
            return torch.arange(label.size)
        if id(label) not in orders:
            order = torch.randperm(label.size, generator=generator)
            still = torch.equal(order, torch.arange(label.size))
            orders[id(label)] = order.roll(1) if still else order
        return orders[id(label)]
    parts = [order_of(part, orders, generator) for part in label.parts]
    if label.kind == "sum":
        offsets = [sum(len(p) for p in parts[:k]) for k in range(len(parts))]
        return torch.cat([p + offset for p, offset in zip(parts, offsets, strict=True)])
    index = torch.zeros(1, dtype=torch.long)
    for part in parts:
        index = (index[:, None] * len(part) + part[None, :]).flatten()
    return index


def reordered(tensor: torch.Tensor, labels: Sequence[Label], orders: Any, generator: Any) -> torch.Tensor:
    for dim, label in enumerate(labels):
        tensor = tensor.index_select(dim, order_of(label, orders, generator))
    return tensor


def copied(value: Any, tensors: dict[int, torch.Tensor]) -> Any:
    """Return nested arguments with every tensor replaced."""
    if isinstance(value, torch.Tensor):
        return tensors[id(value)]
    if isinstance(value, (list, tuple)):
        return type(value)(copied(v, tensors) for v in value)
    return {k: copied(v, tensors) for k, v in value.items()} if isinstance(value, dict) else value


def compare(function: Callable[..., Any], args: Any, kwargs: Any, seed: int = 0) -> Outcome:
    """Trace one call, permute its operands along every axis that is free, call again and compare."""
    generator = torch.Generator().manual_seed(seed)
    given = tensors_in([args, kwargs])
    traced = {id(t): t.clone() for t in given}
    tracer = Tracer()
    record = tracer.record
    for tensor in traced.values():
        record.set(tensor, fresh(tensor.shape))
        record.mark_data(tensor)
    before = {key: record.labels(t) for key, t in traced.items()}
    with torch.no_grad(), Escapes(record), tracer:
        first = tensors_in([function(*copied(args, traced), **copied(kwargs, traced))])
    # A result that pins what it depends on when it is read shows nothing of the others; only slices are read here.
    opaque = [
        (len(first) > 1 and k > 0 and record.has_pins(t)) or record.tied(t) for k, t in enumerate(first)
    ]
    for tensor, hidden in zip(first, opaque, strict=True):
        if not hidden:
            record.labels(tensor)
    for part in list(record.slices.values()):
        unify(part.leaf, part.inside, "a slice")
    orders: dict[int, torch.Tensor] = {}
    moved = {id(t): reordered(t.clone(), before[id(t)], orders, generator) for t in given}
    free = sum(
        bool((order_of(x, orders, generator) != torch.arange(x.size)).any())
        for b in before.values()
        for x in b
    )
    with torch.no_grad():
        second = tensors_in([function(*copied(args, moved), **copied(kwargs, moved))])
    error = 0.0
    for one, other, hidden in zip(first, second, opaque, strict=True):
        if hidden:
            continue
        along = record.positions(one)
        expected = one
        if along is not None:
            expected = order_of(along, orders, generator).argsort()[one]
        expected = reordered(expected, record.labels(one), orders, generator)
        error = max(error, difference(expected, other))
    failed = any(
        label.pinned is not None and "rule failed" in label.pinned
        for labels in record.all_labels()
        for label in map(find, labels)
    )
    return Outcome(free, failed, error)


def difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    if expected.shape != found.shape:
        return math.inf
    kind = torch.complex128 if expected.is_complex() else torch.float64
    a, b = expected.to(kind).nan_to_num(), found.to(kind).nan_to_num()
    if not a.numel():
        return 0.0
    narrow = expected.dtype if expected.dtype.is_floating_point else torch.float64
    epsilons = (
        torch.finfo(narrow).eps / torch.finfo(torch.float64).eps
    )  # some operators make float32 of integers
    return float((a - b).abs().max() / a.abs().max().clamp_min(1.0)) / epsilons
