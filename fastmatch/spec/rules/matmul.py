"""Matrix products, linear layers and embedding tables."""

from __future__ import annotations

from fastmatch.spec.labels import Label, pin, unify
from fastmatch.spec.operations import Call
from fastmatch.spec.record import Record, fresh
from fastmatch.spec.rules.registry import rule, set_saved, unify_broadcast

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


@rule("vdot")
def _vdot(record: Record, call: Call) -> None:
    _vector_product(record, call, "other")


@rule("addmv")
def _addmv(record: Record, call: Call) -> None:
    matrix = record.labels(call["mat"])
    unify(matrix[-1], record.labels(call["vec"])[0], call.name)
    record.contract(matrix[-1])
    unify_broadcast(record, call["self"], matrix[:-1], call.name)
    record.set(call.out, matrix[:-1])


@rule("addr")
def _addr(record: Record, call: Call) -> None:
    labels = [record.labels(call["vec1"])[0], record.labels(call["vec2"])[0]]
    unify_broadcast(record, call["self"], labels, call.name)
    record.set(call.out, labels)


@rule("addbmm")
def _addbmm(record: Record, call: Call) -> None:
    a, b = record.labels(call["batch1"]), record.labels(call["batch2"])
    unify(a[0], b[0], call.name)
    unify(a[2], b[1], call.name)
    for label in [*a, *b]:
        record.contract(label)
    unify_broadcast(record, call["self"], [a[1], b[2]], call.name)
    record.set(call.out, [a[1], b[2]])


def _vector_product(record: Record, call: Call, vector: str) -> None:
    a, b = record.labels(call["self"]), record.labels(call[vector])
    unify(a[-1], b[0], call.name)
    record.contract(a[-1])
    record.set(call.out, a[:-1])


@rule("embedding")
def _embedding(record: Record, call: Call) -> None:
    weight, indices = record.labels(call["weight"]), record.labels(call["indices"])
    pin(weight[0], f"{call.name} (vocabulary)")
    labels = [*indices, *weight[1:]]
    record.mark_produced(call, labels, len(labels) - 1)
    record.set(call.out, labels)


@rule("_embedding_bag", "_embedding_bag_forward_only")
def _embedding_bag(record: Record, call: Call) -> None:
    """Sums of rows; which rows are in which bag is pinned."""
    weight = record.labels(call["weight"])
    pin(weight[0], f"{call.name} (vocabulary)")
    for name in ("indices", "offsets", "per_sample_weights"):
        for label in record.labels(call[name]) if call[name] is not None else ():
            pin(label, call.name)
    record.contract(weight[1])
    first, *saved = call.outputs
    labels = [*fresh(first.shape[:1], call.name), weight[1]]
    record.mark_produced(call, labels, 1)
    record.set(first, labels)
    set_saved(record, call, saved, weight)
