"""Rules of operations that pick positions: selecting, indexing by tensors, sorting, and routing to the top k.

A tensor of integers may hold *positions along a label* (the experts that a router's top k names): where it is
used to index an axis, that axis is united with the label, and both may move. An operation that does anything
else with such integers pins the label.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fastmatch.spec.labels import Label, pin, unify
from fastmatch.spec.rules import RULES, _dim, fresh, rule, tensors_in

if TYPE_CHECKING:
    from fastmatch.spec.trace import Tracer

__all__ = ["KEEPS_POSITIONS", "USES_POSITIONS"]

KEEPS_POSITIONS = frozenset(
    [
        "view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "unsqueeze", "squeeze",
        "expand", "slice", "select", "t", "transpose", "permute", "clone", "detach", "alias", "_to_copy",
        "contiguous", "repeat", "index_select",
    ]
)  # fmt: skip
"""Operations after which positions along a label are still that."""

USES_POSITIONS = frozenset(
    ["index", "gather", "scatter", "scatter_", "index_select", "zeros_like", "ones_like"]
)
"""Operations whose rules know what to do with positions along a label."""


@rule("select")
def _select(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = tr.labels(args[0])
    dim = args[1] % len(labels)
    tr.set(out, tr.inside(labels, dim, args[2] % labels[dim].size, name, out))


@rule("unbind")
def _unbind(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = tr.labels(args[0])
    dim = _dim(args, kwargs, 1, 0) % len(labels)
    for position, part in enumerate(out):
        tr.set(part, tr.inside(labels, dim, position, name, part))


@rule("index_select")
def _index_select(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = tr.labels(args[0])
    dim = args[1] % len(labels)
    tr.set(out, [*labels[:dim], _picked(tr, name, labels[dim], args[2])[0], *labels[dim + 1 :]])


def _picked(tr: Tracer, name: str, label: Label, index: torch.Tensor) -> list[Label]:
    """Labels of what an axis becomes when ``index`` picks its positions, one a dimension of the index."""
    along = tr.positions(index)
    if along is None:
        pin(label, name)
        return fresh(index.shape, name)
    unify(label, along, name)
    return tr.following(index, along)


@rule("index")
def _index(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels, indices = tr.labels(args[0]), list(args[1])
    used = [d for d, index in enumerate(indices) if index is not None]
    if any(indices[d].dtype in (torch.bool, torch.uint8) for d in used):
        flat = 0  # a mask covers as many dimensions as it has
        for d in used:
            for label in labels[d : d + max(indices[d].ndim, 1)]:
                pin(label, name)
            flat += indices[d].ndim - 1
        kept = [] if len(used) > 1 else labels[used[0] + indices[used[0]].ndim :]
        if len(used) > 1 or used[0] + len(kept) + 1 != out.ndim:
            raise NotImplementedError("several masks")
        tr.set(out, [*labels[: used[0]], Label(out.shape[used[0]], pinned=name), *kept])
        return
    constant = [d for d in used if indices[d].numel() == 1 and tr.positions(indices[d]) is None]
    if len(used) == 1 == len(constant):
        dim, index = used[0], indices[used[0]]
        rest = tr.inside(labels, dim, int(index) % labels[dim].size, name, out)
        tr.set(out, [*rest[:dim], *[Label(1) for _ in index.shape], *rest[dim:]])
        return
    picked: list[Label] = []
    ndim = max(indices[d].ndim for d in used)
    for d in used:
        new = _picked(tr, name, labels[d], indices[d])
        picked = (
            new if len(used) == 1 else fresh(torch.broadcast_shapes(*[indices[k].shape for k in used]), name)
        )
    together = used == list(range(used[0], used[-1] + 1))
    at = used[0] if together else 0
    kept = [label for d, label in enumerate(labels) if d not in used]
    assert len(picked) == ndim
    tr.set(out, [*kept[:at], *picked, *kept[at:]])


@rule("gather")
def _gather(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels, picks = tr.labels(args[0]), tr.labels(args[2])
    dim = args[1] % max(len(labels), 1)
    _align(tr, name, labels, picks, dim, args[2])
    tr.set(out, picks)


@rule("scatter", "scatter_", "scatter_add", "scatter_add_")
def _scatter(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels, picks = tr.labels(args[0]), tr.labels(args[2])
    dim = args[1] % max(len(labels), 1)
    _align(tr, name, labels, picks, dim, args[2])
    source = args[3] if len(args) > 3 else kwargs.get("src")
    if isinstance(source, torch.Tensor) and source.ndim == len(picks):
        for mine, label in zip(picks, tr.labels(source), strict=True):
            if mine.size == label.size:
                unify(mine, label, name)
            else:
                pin(mine, name)
                pin(label, name)
    if not tr.knows(out):
        tr.set(out, labels)


def _align(
    tr: Tracer, name: str, labels: list[Label], picks: list[Label], dim: int, index: torch.Tensor
) -> None:
    """Every axis of the data but ``dim`` is the index's axis; ``dim`` is what the index's values run along."""
    for d, (mine, label) in enumerate(zip(labels, picks, strict=True)):
        if d == dim:
            along = tr.positions(index)
            pin(mine, name) if along is None else unify(mine, along, name)
        elif mine.size == label.size:
            unify(mine, label, name)
        else:
            pin(mine, name)
            pin(label, name)


@rule("topk", "sort", "argsort")
def _sorted(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = list(tr.labels(args[0]))
    position = 2 if name.endswith("topk") else 1
    stable_form = len(args) > position and isinstance(args[position], bool)
    default = kwargs.get("dim", -1)
    dim = (default if stable_form or len(args) <= position else args[position]) % max(len(labels), 1)
    along = labels[dim]
    # The order is by value: the same whatever the order of the axis was.
    *values, index = tensors_in(out) if isinstance(out, (tuple, list)) else [out]
    labels[dim] = Label(index.shape[dim], pinned=name)
    for tensor in (*values, index):
        tr.set(tensor, labels)
    if len(values) or name.endswith("argsort"):
        tr.set_positions(index, along)


@rule("max", "min", "argmax", "argmin", "median")
def _extreme(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = tr.labels(args[0])
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if isinstance(dim, torch.Tensor):  # the larger of two tensors
        RULES["maximum"](tr, name, args, kwargs, out)
        return
    if dim is None:
        if out.ndim or name.endswith(("argmax", "argmin")):
            raise NotImplementedError("positions over all axes at once")
        tr.set(out, [])
        return
    dim %= len(labels)
    results = tensors_in(out)
    for tensor in results:
        kept = [Label(1)] if tensor.ndim == len(labels) else []
        tr.set(tensor, [*labels[:dim], *kept, *labels[dim + 1 :]])
    if len(results) > 1 or "arg" in name:
        tr.set_positions(results[-1], labels[dim])


@rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "flip", "roll", "diff")
def _along(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = list(tr.labels(args[0]))
    position = 2 if name.endswith("roll") else 1
    dims = args[position] if len(args) > position else kwargs.get("dims", kwargs.get("dim", []))
    dims = [dims] if isinstance(dims, int) else list(dims)
    for d in dims or range(len(labels)):
        pin(labels[d], name)
        tr.mixed(labels, {d % len(labels)})
    for tensor in tensors_in(out):
        tr.set(
            tensor,
            [x if x.size == n else Label(n, pinned=name) for x, n in zip(labels, tensor.shape, strict=True)],
        )


@rule("unfold")
def _unfold(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = list(tr.labels(args[0]))
    dim = args[1] % len(labels)
    pin(labels[dim], name)
    labels[dim] = Label(out.shape[dim], pinned=name)
    tr.set(out, [*labels, Label(out.shape[-1], pinned=name)])


@rule("index_add", "index_add_", "index_copy", "index_copy_")
def _index_add(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = tr.labels(args[0])
    dim = args[1] % len(labels)
    source = tr.labels(args[3])
    for d, (mine, label) in enumerate(zip(labels, source, strict=True)):
        if d == dim:
            pin(mine, name)
            pin(label, name)
        else:
            unify(mine, label, name)
    if not tr.knows(out):
        tr.set(out, labels)
