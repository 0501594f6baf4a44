"""Operations that read or write at positions: selecting, indexing by tensors, gathering and scattering.

A tensor of integers may hold *positions along a label*, such as the experts in the indices of a router's top k.
Where it indexes an axis, that axis is united with the label, and both may move. An operation that does
anything else with such integers pins the label (see :func:`follow_positions`).
"""

from __future__ import annotations

import torch

from fastmatch.spec.labels import Label, is_pinned, pin, unify
from fastmatch.spec.operations import Call, tensors_in
from fastmatch.spec.record import Record
from fastmatch.spec.rules.elementwise import FACTORIES
from fastmatch.spec.rules.registry import broadcast_labels, rule, unify_broadcast

__all__ = ["follow_positions"]

KEEPS_POSITIONS = frozenset(
    [
        "view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "unsqueeze", "squeeze",
        "expand", "slice", "select", "t", "transpose", "permute", "clone", "detach", "alias", "_to_copy",
        "contiguous", "repeat", "index_select",
    ]
)  # fmt: skip
"""The results of these operations hold positions along the same label."""

INDEX_ARGUMENTS = {
    "_unsafe_index": "indices", "gather": "index", "index": "indices", "index_put": "indices",
    "index_put_": "indices", "index_select": "index", "scatter": "index", "scatter_": "index",
    "scatter_add": "index", "scatter_add_": "index", "scatter_reduce": "index", "scatter_reduce_": "index",
}  # fmt: skip
"""The rules of these operations know what to do with positions along a label, given in this argument."""


def follow_positions(record: Record, call: Call) -> None:
    """Give the result the positions that an operation keeps; pin their label if it computes with them."""
    if call.base in FACTORIES or not record.has_positions():
        return
    index = tensors_in(call.get(INDEX_ARGUMENTS.get(call.base, "")))
    for tensor in call.inputs:
        along = record.positions(tensor)
        if along is None:
            continue
        if call.base in KEEPS_POSITIONS and tensor is call.first:
            for result in call.outputs:
                if result.dtype in (torch.int32, torch.int64):
                    record.set_positions(result, along, record.tied(tensor))
                else:  # as numbers, or cut short
                    pin(along, call.name)
        elif record.tied(tensor) or not any(tensor is t for t in index):
            pin(along, call.name)
        else:
            record.contract(along)  # positions are counted in one order, the same for all that they index


@rule("select")
def _select(record: Record, call: Call) -> None:
    tensor = call["self"]
    dim = call.dim(tensor.ndim)
    position = call["index"] % tensor.shape[dim]
    part = record.slice_of_joined(tensor, dim, position)
    if part is not None:
        record.set(call.out, part)
        return
    labels = record.labels(tensor)
    record.set(call.out, record.select(labels, dim, position, call.name, call.out))


@rule("unbind")
def _unbind(record: Record, call: Call) -> None:
    labels = record.labels(call["self"])
    dim = call.dim(len(labels))
    for position, part in enumerate(call.out):
        record.set(part, record.select(labels, dim, position, call.name, part))


@rule("index_select")
def _index_select(record: Record, call: Call) -> None:
    labels = record.labels(call["self"])
    dim = call.dim(len(labels))
    picked = _picked(record, call, labels, dim, call["index"])
    labels[dim] = picked[0] if picked else Label(1)
    record.set(call.out, labels)


def _picked(record: Record, call: Call, labels: list[Label], dim: int, index: torch.Tensor) -> list[Label]:
    """Return the labels, one per dimension of ``index``, of an axis whose positions ``index`` picks."""
    along = record.positions(index)
    if along is None:
        pin(labels[dim], call.name)
        record.mix(labels, {dim})
        return record.labels(index)
    unify(labels[dim], along, call.name)
    return record.following(index, along)


@rule("index", "_unsafe_index")
def _index(record: Record, call: Call) -> None:
    labels = record.labels(call["self"])
    indices = {d: index for d, index in enumerate(call["indices"]) if index is not None}
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices.values()):
        result = _masked(record, call, labels, indices)
    elif _is_constant(record, indices):
        ((dim, index),) = indices.items()
        rest = record.select(labels, dim, int(index) % labels[dim].size, call.name, call.out)
        result = [*rest[:dim], *[Label(1) for _ in index.shape], *rest[dim:]]
    else:
        result = _gathered(record, call, labels, indices)
    record.set(call.out, result)


def _is_constant(record: Record, indices: dict[int, torch.Tensor]) -> bool:
    """Whether the one index is a single number that comes from neither the inputs nor the weights."""
    return len(indices) == 1 and all(
        index.numel() == 1 and not record.is_data(index) and not record.is_state(index)
        for index in indices.values()
    )


def _masked(record: Record, call: Call, labels: list[Label], indices: dict[int, torch.Tensor]) -> list[Label]:
    """Return the labels after a boolean mask, which pins as many dimensions as it has."""
    among = {d: record.labels(mask) for d, mask in indices.items()}
    are_samples = {d: all(map(is_pinned, found)) for d, found in among.items()}
    for d, mask in indices.items():
        for label in [*labels[d : d + max(mask.ndim, 1)], *record.labels(mask)]:
            pin(label, call.name)
    at = next(iter(indices))
    kept = [] if len(indices) > 1 else labels[at + indices[at].ndim :]
    if len(indices) > 1 or at + len(kept) + 1 != call.out.ndim:
        raise NotImplementedError("several masks")
    selected = Label(call.out.shape[at], pinned=call.name)
    record.mark_counted(selected)
    for d, mask in indices.items():
        if are_samples[d]:
            record.mark_chosen(selected, among[d], mask)
    return [*labels[:at], selected, *kept]


def _gathered(
    record: Record, call: Call, labels: list[Label], indices: dict[int, torch.Tensor]
) -> list[Label]:
    """Return the labels after integer indices; the indexed axes are replaced by those of the indices."""
    tensors = list(indices.values())
    each = [_picked(record, call, labels, d, index) for d, index in indices.items()]
    picked = each[0]
    if len(indices) > 1:
        shape = torch.broadcast_shapes(*[index.shape for index in tensors])
        picked = broadcast_labels(record, tensors, shape, call.name)
    used = list(indices)
    adjacent = used == list(range(used[0], used[-1] + 1))
    at = used[0] if adjacent else 0
    kept = [label for d, label in enumerate(labels) if d not in indices]
    return [*kept[:at], *picked, *kept[at:]]


@rule("gather")
def _gather(record: Record, call: Call) -> None:
    record.set(call.out, _unite_with_index(record, call))


@rule("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_")
def _scatter(record: Record, call: Call) -> None:
    picks = _unite_with_index(record, call)
    if call.get("reduce") is None and "add" not in call.base:
        pin(picks[call.dim(len(picks))], call.name)  # of two values for one position, the order chooses one
    source = call.get("src")
    if isinstance(source, torch.Tensor):
        for mine, label in zip(picks, record.labels(source), strict=True):
            _unify_or_pin(mine, label, call.name)
    if not record.knows(call.out):
        record.set(call.out, record.labels(call["self"]))


def _unite_with_index(record: Record, call: Call) -> list[Label]:
    """Unite the data's axes with the index's; ``dim`` is the axis that the index's values are positions along."""
    labels, picks = record.labels(call["self"]), record.labels(call["index"])
    dim = call.dim(len(labels))
    for d, (mine, label) in enumerate(zip(labels, picks, strict=True)):
        if d == dim:
            along = record.positions(call["index"])
            if along is None:
                pin(mine, call.name)
                record.mix(labels, {dim})
            else:
                unify(mine, along, call.name)
        else:
            _unify_or_pin(mine, label, call.name)
    return picks


def _unify_or_pin(a: Label, b: Label, reason: str) -> None:
    if a.size == b.size:
        unify(a, b, reason)
    else:
        pin(a, reason)
        pin(b, reason)


@rule(
    "index_add", "index_add_", "index_copy", "index_copy_", "index_fill", "index_fill_", "index_reduce",
    "index_reduce_",
)  # fmt: skip
def _index_add(record: Record, call: Call) -> None:
    labels = record.labels(call["self"])
    dim = call.dim(len(labels))
    for label in [*labels[dim : dim + 1], *record.labels(call["index"])]:
        pin(label, call.name)
    record.mix(labels, {dim})
    source = call.get("source")
    if source is not None:
        for d, (mine, label) in enumerate(zip(labels, record.labels(source), strict=True)):
            pin(label, call.name) if d == dim else unify(mine, label, call.name)
    if not record.knows(call.out):
        record.set(call.out, labels)


@rule("index_put", "index_put_")
def _index_put(record: Record, call: Call) -> None:
    labels = record.labels(call["self"])
    indices = {d: index for d, index in enumerate(call["indices"]) if index is not None}
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices.values()):
        if len(indices) > 1:
            raise NotImplementedError("several masks")
        _put_masked(record, call, labels, *next(iter(indices.items())))
    else:
        written = _gathered(record, call, labels, indices)
        if not call["accumulate"]:
            for index in indices.values():
                for label in record.labels(index):
                    pin(label, call.name)  # of two values for one position, the order chooses one
        unify_broadcast(record, call["values"], written, call.name)
    if not record.knows(call.out):
        record.set(call.out, labels)


def _put_masked(record: Record, call: Call, labels: list[Label], at: int, mask: torch.Tensor) -> None:
    """Unite the values with the axes beside the mask; one value per chosen position depends on their order."""
    if at:
        raise NotImplementedError("a mask of later axes")
    values, rest = call["values"], labels[mask.ndim :]
    for mine, label in zip(labels, record.labels(mask), strict=False):
        unify(mine, label, call.name)
    chosen = record.labels(values)[: max(values.ndim - len(rest), 0)]
    for label in [*labels[: mask.ndim], *chosen] if any(x.size > 1 for x in chosen) else []:
        pin(label, call.name)
    for mine, label in zip(reversed(rest), reversed(record.labels(values)), strict=False):
        if mine.size == label.size:
            unify(mine, label, call.name)


@rule("take")
def _take(record: Record, call: Call) -> None:
    for label in record.labels(call["self"]):
        pin(label, call.name)
    record.set(call.out, record.labels(call["index"]))


@rule("isin")
def _isin(record: Record, call: Call) -> None:
    """Whether each element is in a set, whose own order does not count."""
    elements = call.get("elements")
    record.set(call.out, record.labels(elements) if isinstance(elements, torch.Tensor) else [])


@rule("bucketize", "searchsorted")
def _searched(record: Record, call: Call) -> None:
    """The boundaries are in order; what is looked up among them is not."""
    values = call["self"]
    if not isinstance(values, torch.Tensor):
        raise NotImplementedError("a number looked up")
    labels = record.labels(values)
    for name in ("boundaries", "sorted_sequence", "sorter"):
        for d, label in enumerate(record.labels(call[name]) if call.get(name) is not None else ()):
            if d < call[name].ndim - 1:
                unify(label, labels[d], call.name)
            else:
                pin(label, call.name)
    record.set(call.out, labels)
