"""Sorting, the top k, and largest or smallest values along an axis: their indices are positions along it."""

from __future__ import annotations

from fastmatch.spec.labels import Label
from fastmatch.spec.operations import Call
from fastmatch.spec.record import Record
from fastmatch.spec.rules.elementwise import elementwise
from fastmatch.spec.rules.registry import rule

__all__: list[str] = []


@rule("topk", "sort")
def _sorted(record: Record, call: Call) -> None:
    """The order is by value, the same whatever the order of the axis was before."""
    labels = record.labels(call["self"])
    dim = call.dim(len(labels))
    along = labels[dim] if labels else Label(1)
    index = call.outputs[-1]
    tied = _tied(record, call, dim)
    if labels:
        labels[dim] = Label(index.shape[dim], pinned=call.name)
    for tensor in call.outputs:
        record.set(tensor, labels)
    if labels:  # values are in the same order in every network; what their positions select are other samples
        labels[dim] = Label(index.shape[dim], pinned=call.name)
        record.set(index, labels)
        if not record.is_order(along):  # the order of an order is the way back
            record.mark_chosen(labels[dim], [along], call["self"])
        if call.base == "sort":
            record.mark_order(labels[dim])
    record.set_positions(index, along, tied)


def _tied(record: Record, call: Call, dim: int) -> bool:
    """Whether equal values may decide what is first: by where they come from, or because these ones do."""
    values = call["self"].detach()
    if record.is_level(values) or not values.is_floating_point() or call.base == "mode":
        return True
    if not record.real_values:
        return False
    record.need_values(values, call.name)
    ordered = values.sort(dim, descending=call.get("largest") is not False and "min" not in call.base).values
    kept = call["k"] + 1 if call.base == "topk" else values.shape[dim]
    if call.base in ("max", "min", "argmax", "argmin"):
        kept = 2
    ordered = ordered.narrow(dim, 0, min(kept, values.shape[dim]))
    return bool((ordered.diff(dim=dim) == 0).any())


@rule("max", "min", "argmax", "argmin", "median", "kthvalue", "mode", "nanmedian")
def _extreme(record: Record, call: Call) -> None:
    if call.get("other") is not None:  # the larger of two tensors
        elementwise(record, call)
        return
    labels = record.labels(call["self"])
    is_index = call.base in ("argmax", "argmin")
    if call.get("dim") is None:
        if call.out.ndim or is_index:
            raise NotImplementedError("positions over all axes at once")
        record.set(call.out, [])
        return
    dim = call.dim(len(labels))
    for tensor in call.outputs:
        kept = [Label(1)] if tensor.ndim == len(labels) else []
        record.set(tensor, [*labels[:dim], *kept, *labels[dim + 1 :]])
    if is_index or len(call.outputs) > 1:
        along = labels[dim] if labels else Label(1)
        record.set_positions(call.outputs[-1], along, bool(labels) and _tied(record, call, dim))
