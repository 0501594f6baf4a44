"""Operations that change the shape and keep the values: views, transposes, expansion, complex numbers."""

from __future__ import annotations

import math

from fastmatch.spec.labels import Label, pin, product, split_product
from fastmatch.spec.operations import Call
from fastmatch.spec.record import Record, fresh
from fastmatch.spec.rules.registry import rule

__all__: list[str] = []


@rule("view", "_unsafe_view", "_reshape_alias")
def _view(record: Record, call: Call) -> None:
    """Split and join axes in the smallest runs that have the same number of positions before and after."""
    labels, sizes = record.labels(call["self"]), list(call.out.shape)
    if 0 not in sizes:
        record.set(call.out, _viewed(labels, sizes, call.name))
        return
    # Of no rows, every row would be seen alike.
    at, to = [label.size for label in labels].index(0), sizes.index(0)
    before, after = [label.size for label in labels[:at]], sizes[:to]
    inner, rest = [label.size for label in labels[at + 1 :]], sizes[to + 1 :]
    if math.prod(inner) == math.prod(rest) > 0:
        alike = math.prod(before) == math.prod(after) > 0
        outside = _viewed(labels[:at], after, call.name) if alike else fresh(after)
        record.set(call.out, [*outside, Label(0), *_viewed(labels[at + 1 :], rest, call.name)])
        return
    same = min(len(inner), len(rest))
    if (
        same and inner[len(inner) - same :] == rest[len(rest) - same :]
    ):  # the others are rows, of which there are none
        record.set(call.out, [*fresh(sizes[: len(sizes) - same]), *labels[len(labels) - same :]])
        return
    for label in labels:
        pin(label, call.name)
    record.set(call.out, fresh(sizes, call.name))


def _viewed(labels: list[Label], sizes: list[int], name: str) -> list[Label]:
    result: list[Label] = []
    for before, after in _runs(labels, sizes):
        if len(before) == len(after) == 1:
            result += before
            continue
        split = split_product(before, after)
        if split is None:
            for label in before:
                pin(label, name)
            split = fresh(after, name)
        result += split
    return result


def _runs(labels: list[Label], sizes: list[int]) -> list[tuple[list[Label], list[int]]]:
    """Return the smallest runs of axes before and sizes after a view whose products are equal."""
    runs = []
    i = j = 0
    while i < len(labels) or j < len(sizes):
        before: list[Label] = []
        after: list[int] = []
        left = right = 1
        while left != right or not before or not after:
            if (left <= right and i < len(labels)) or j >= len(sizes):
                if i >= len(labels):
                    break
                before.append(labels[i])
                left *= labels[i].size
                i += 1
            else:
                after.append(sizes[j])
                right *= sizes[j]
                j += 1
        runs.append((before, after))
    return runs


@rule("unsqueeze", "squeeze", "unsqueeze_", "squeeze_")
def _singleton(record: Record, call: Call) -> None:
    kept = iter([label for label in record.labels(call["self"]) if label.size != 1])
    record.set(call.out, [Label(1) if n == 1 else next(kept) for n in call.out.shape])


@rule("as_strided", "as_strided_")
def _as_strided(record: Record, call: Call) -> None:
    """Accept new strides only for axes of one position: pooling marks its results as channels-last that way."""
    tensor = call["self"]
    labels = record.labels(tensor)
    wide = [(n, s) for n, s in zip(call["size"], call["stride"], strict=True) if n != 1]
    offset = call["storage_offset"]
    same = [label.size for label in labels] == list(call["size"]) and offset in (
        None,
        tensor.storage_offset(),
    )
    if not same or wide != [(n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1]:
        raise NotImplementedError("another view of the memory")
    record.set(call.out, labels)


@rule("t", "t_")
def _reverse(record: Record, call: Call) -> None:
    record.set(call.out, record.labels(call["self"])[::-1])


@rule("permute")
def _permute(record: Record, call: Call) -> None:
    labels = record.labels(call["self"])
    record.set(call.out, [labels[d % len(labels)] for d in call["dims"]])


@rule("transpose", "transpose_")
def _transpose(record: Record, call: Call) -> None:
    _swap(record, call, "dim0", "dim1")


def _swap(record: Record, call: Call, first: str, second: str) -> None:
    labels = record.labels(call["self"])
    if labels:
        i, j = call.dim(len(labels), first), call.dim(len(labels), second)
        labels[i], labels[j] = labels[j], labels[i]
    record.set(call.out, labels)


@rule("expand")
def _expand(record: Record, call: Call) -> None:
    labels = record.labels(call["self"])
    padded = [Label(1)] * (call.out.ndim - len(labels)) + labels
    record.set(
        call.out, [x if x.size == n else Label(n) for x, n in zip(padded, call.out.shape, strict=True)]
    )


@rule("repeat")
def _repeat(record: Record, call: Call) -> None:
    labels = record.labels(call["self"])
    padded = [Label(1)] * (call.out.ndim - len(labels)) + labels
    repeated = [product([Label(n // x.size), x]) for x, n in zip(padded, call.out.shape, strict=True)]
    record.set(call.out, repeated)


@rule("view_as_complex", "_conj")
def _complex(record: Record, call: Call) -> None:
    labels = record.labels(call["self"])
    for label in labels[call.out.ndim :]:
        pin(label, call.name)  # real and imaginary part
    record.set(call.out, labels[: call.out.ndim])


@rule("view_as_real")
def _real(record: Record, call: Call) -> None:
    record.set(call.out, [*record.labels(call["self"]), Label(2, pinned=call.name)])


@rule("unfold")
def _unfold(record: Record, call: Call) -> None:
    labels = record.labels(call["self"])
    dim = call.dim(len(labels), "dimension")
    pin(labels[dim], call.name)
    record.mix(labels, {dim})
    labels[dim] = Label(call.out.shape[dim], pinned=call.name)
    record.set(call.out, [*labels, Label(call.out.shape[-1], pinned=call.name)])
