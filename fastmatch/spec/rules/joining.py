"""Operations that join tensors along an axis or cut an axis into segments."""

from __future__ import annotations

from fastmatch.spec.labels import Label, pin, sum_of, unify
from fastmatch.spec.operations import Call
from fastmatch.spec.record import Joined, Record
from fastmatch.spec.rules.registry import cut, rule

__all__: list[str] = []


@rule("slice")
def _slice(record: Record, call: Call) -> None:
    labels = record.labels(call["self"])
    dim = call.dim(len(labels))
    length = labels[dim].size
    if call["step"] != 1:
        pin(labels[dim], call.name)
        labels[dim] = Label(call.out.shape[dim], pinned=call.name)
    elif call.out.shape[dim] != length:
        start, end, _ = slice(call["start"], call["end"]).indices(length)
        sizes = [start, max(end - start, 0), length - max(end, start)]
        part = cut(labels[dim], sizes, call.name)[1]
        record.mark_empty(part, labels[dim])
        labels[dim] = part
    record.set(call.out, labels)


@rule("split", "split_with_sizes", "unsafe_split")
def _split(record: Record, call: Call) -> None:
    labels = record.labels(call["self"])
    dim = call.dim(len(labels))
    segments = cut(labels[dim], [part.shape[dim] for part in call.out], call.name)
    for part, label in zip(call.out, segments, strict=True):
        record.set(part, [*labels[:dim], label, *labels[dim + 1 :]])


@rule("cat")
def _cat(record: Record, call: Call) -> None:
    parts = [t for t in call["tensors"] if t.ndim == call.out.ndim]  # an empty 1-d tensor may be among others
    dim = call.dim(call.out.ndim)
    found = tuple(tuple(record.labels(part)) for part in parts)
    labels = list(found[0])
    labels[dim] = sum_of([part[dim] for part in found])
    for part in found:
        record.mark_empty(part[dim], labels[dim])
    record.join(call.out, labels, Joined(dim, found, call.name))


@rule("stack")
def _stack(record: Record, call: Call) -> None:
    dim = call.dim(call.out.ndim)
    parts = [record.labels(part) for part in call["tensors"]]
    found = tuple((*part[:dim], Label(1), *part[dim:]) for part in parts)
    labels = list(found[0])
    labels[dim] = Label(call.out.shape[dim], pinned=call.name)
    record.join(call.out, labels, Joined(dim, found, call.name))


@rule("constant_pad_nd")
def _pad(record: Record, call: Call) -> None:
    labels, amounts = record.labels(call["self"]), call["pad"]
    for k in range(len(amounts) // 2):
        before, after = amounts[2 * k : 2 * k + 2]
        dim = call.out.ndim - 1 - k
        if before < 0 or after < 0:
            pin(labels[dim], call.name)
            labels[dim] = Label(call.out.shape[dim], pinned=call.name)
        elif before or after:
            padding = (Label(before, pinned=call.name), Label(after, pinned=call.name))
            labels[dim] = sum_of([padding[0], labels[dim], padding[1]])
    record.set(call.out, labels)


@rule("glu")
def _glu(record: Record, call: Call) -> None:
    labels = record.labels(call["self"])
    dim = call.dim(len(labels))
    first, second = cut(labels[dim], [call.out.shape[dim]] * 2, call.name)
    unify(first, second, call.name)
    labels[dim] = first
    record.set(call.out, labels)


@rule("slice_scatter")
def _slice_scatter(record: Record, call: Call) -> None:
    """Write a slice: the segment that is replaced is united with what replaces it."""
    labels, source = record.labels(call["self"]), record.labels(call["src"])
    dim = call.dim(len(labels))
    length = labels[dim].size
    for d, (mine, label) in enumerate(zip(labels, source, strict=True)):
        if d != dim:
            unify(mine, label, call.name)
    start, end, step = slice(call["start"], call["end"]).indices(length)
    if call["step"] != step:
        pin(labels[dim], call.name)
        pin(source[dim], call.name)
    else:
        segments = cut(labels[dim], [start, max(end - start, 0), length - max(end, start)], call.name)
        unify(segments[1], source[dim], call.name)
    record.set(call.out, labels)


@rule("select_scatter")
def _select_scatter(record: Record, call: Call) -> None:
    labels = record.labels(call["self"])
    dim = call.dim(len(labels))
    pin(labels[dim], call.name)
    rest = [label for d, label in enumerate(labels) if d != dim]
    for mine, label in zip(rest, record.labels(call["src"]), strict=True):
        unify(mine, label, call.name)
    record.set(call.out, labels)
