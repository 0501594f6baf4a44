"""Matrix products, linear layers and embedding tables."""

from __future__ import annotations

from fastmatch.spec.labels import Label, pin, unify
from fastmatch.spec.operations import Call
from fastmatch.spec.record import Record
from fastmatch.spec.rules.registry import rule, unify_broadcast

__all__: list[str] = []


def _product(record: Record, call: Call, left: str, right: str) -> list[Label]:
    """Return the labels of ``left @ right``; unite the contracted axes and the batch axes."""
    a, b = record.labels(call[left]), record.labels(call[right])
    unify(a[-1], b[-2], call.name)
    for x, y in zip(a[:-2], b[:-2], strict=True):
        unify(x, y, call.name)
    batch = [y if y.follows is not None else x for x, y in zip(a[:-2], b[:-2], strict=True)]
    # Rows and columns too are alike for every position that is summed over, even if that axis is one of theirs as well.
    for label in (a[-1], b[-2], a[-2], b[-1]):
        record.contract(label, batch)
    labels = [*batch, a[-2], b[-1]]
    from_left, from_right = record.is_data(call[left]), record.is_data(call[right])
    if from_left and not from_right:
        record.mark_contracted(b[-2])
        record.mark_consumed(call, left, len(a) - 1)
        record.mark_produced(call, labels, len(labels) - 1)
    elif from_right and not from_left:
        record.mark_contracted(a[-1])
        record.mark_consumed(call, right, len(b) - 2)
        record.mark_produced(call, labels, len(labels) - 2)
    return labels


@rule("mm", "bmm")
def _mm(record: Record, call: Call) -> None:
    record.set(call.out, _product(record, call, "self", "mat2"))


@rule("matmul")
def _matmul(record: Record, call: Call) -> None:
    record.set(call.out, _product(record, call, "self", "other"))


@rule("addmm")
def _addmm(record: Record, call: Call) -> None:
    labels = _product(record, call, "mat1", "mat2")
    unify_broadcast(record, call["self"], labels, call.name)
    record.set(call.out, labels)


@rule("baddbmm")
def _baddbmm(record: Record, call: Call) -> None:
    labels = _product(record, call, "batch1", "batch2")
    unify_broadcast(record, call["self"], labels, call.name)
    record.set(call.out, labels)


@rule("mv")
def _mv(record: Record, call: Call) -> None:
    _vector_product(record, call, "vec")


@rule("dot")
def _dot(record: Record, call: Call) -> None:
    _vector_product(record, call, "tensor")


def _vector_product(record: Record, call: Call, vector: str) -> None:
    a, b = record.labels(call["self"]), record.labels(call[vector])
    unify(a[-1], b[0], call.name)
    record.contract(a[-1])
    record.set(call.out, a[:-1])


@rule("linear")
def _linear(record: Record, call: Call) -> None:
    inputs, weight = record.labels(call["input"]), record.labels(call["weight"])
    unify(inputs[-1], weight[1], call.name)
    labels = [*inputs[:-1], weight[0]]
    if call["bias"] is not None:
        unify(weight[0], record.labels(call["bias"])[0], call.name)
    record.contract(inputs[-1])
    record.mark_contracted(weight[1])
    record.mark_consumed(call, "input", len(inputs) - 1)
    record.mark_produced(call, labels, len(labels) - 1)
    record.set(call.out, labels)


@rule("embedding")
def _embedding(record: Record, call: Call) -> None:
    weight, indices = record.labels(call["weight"]), record.labels(call["indices"])
    pin(weight[0], f"{call.name} (vocabulary)")
    labels = [*indices, *weight[1:]]
    record.mark_produced(call, labels, len(labels) - 1)
    record.set(call.out, labels)
