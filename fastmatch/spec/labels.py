"""The algebra of axes: labels with a size, united where an operation makes two axes the same.

Every dimension of every tensor in a forward pass has one label. A label is a *leaf* until something is
known about it. Then it is *defined* as another label (united), as a product of labels (a view splits 768
into 12 x 64), or as a sum of labels (a concatenation, a chunk). Definitions are never revoked, so a
label is a constraint, not a value: in-place writes and views need no bookkeeping, because a
view's labels are parts of its base's labels. What the algebra cannot express is pinned, which loses a
permutation but is never wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, TypeAlias

__all__ = [
    "Label", "factors", "find", "has_segments", "is_pinned", "leaves", "pin", "product", "segments", "split_product",
    "split_sum", "sum_of", "unify",
]  # fmt: skip

Kind: TypeAlias = Literal["leaf", "same", "product", "sum"]
"""How a label is defined: not yet, as one other label, by factors (outermost first), or by segments."""


@dataclass(eq=False)
class Label:
    """One axis or a part of one.

    Attributes:
        size: number of positions.
        kind: how the label is defined.
        parts: the labels that define it; empty for a leaf.
        pinned: why the label cannot move; None if it can.
        follows: for rows that an index tensor selected, the label that the indices point into.
    """

    size: int
    kind: Kind = "leaf"
    parts: list[Label] = field(default_factory=list)
    pinned: str | None = None
    follows: Label | None = None


def find(label: Label) -> Label:
    """Return the label that ``label`` was united with, or itself."""
    while label.kind == "same":
        label = label.parts[0]
    return label


def is_pinned(label: Label) -> bool:
    """Whether no part of ``label`` can move."""
    label = find(label)
    if label.kind == "leaf":
        return label.pinned is not None or label.size <= 1
    return all(is_pinned(part) for part in label.parts)


def _define(leaf: Label, kind: Kind, parts: list[Label]) -> None:
    leaf.kind, leaf.parts = kind, parts
    if leaf.pinned is not None:
        for part in parts:
            pin(part, leaf.pinned)


def pin(label: Label, reason: str) -> None:
    """Keep every leaf of ``label`` in its order; the first reason given is kept."""
    label = find(label)
    if label.pinned is None:
        label.pinned = reason
    for part in label.parts:
        pin(part, reason)


def factors(label: Label) -> list[Label]:
    """Return the factors of a label, outermost first: leaves and sums of more than one position."""
    label = find(label)
    if label.kind == "product":
        return [f for part in label.parts for f in factors(part)]
    return [] if label.size == 1 else [label]


def segments(label: Label) -> list[Label]:
    """Return the segments of a label in order: leaves and products that are not empty."""
    label = find(label)
    if label.kind == "sum":
        return [s for part in label.parts for s in segments(part)]
    return [] if label.size == 0 else [label]


def has_segments(label: Label) -> bool:
    """Whether a label, or a factor of it, is a concatenation."""
    label = find(label)
    return label.kind == "sum" or any(map(has_segments, label.parts))


def leaves(label: Label) -> list[Label]:
    """Return the leaves of a label, those of one position included."""
    label = find(label)
    return [leaf for part in label.parts for leaf in leaves(part)] if label.parts else [label]


def product(parts: Sequence[Label]) -> Label:
    """Return the product of labels, outermost first."""
    flat = [f for part in parts for f in factors(part)]
    if len(flat) == 1:
        return flat[0]
    return Label(math.prod(p.size for p in parts), "product" if flat else "leaf", flat)


def sum_of(parts: Sequence[Label]) -> Label:
    """Return the concatenation of labels."""
    flat = [s for part in parts for s in segments(part)]
    if len(flat) == 1:
        return flat[0]
    return Label(sum(p.size for p in parts), "sum" if flat else "leaf", flat)


def split_product(parts: Sequence[Label], sizes: Sequence[int]) -> list[Label] | None:
    """Return labels of the given sizes whose product is the product of ``parts``; None if there are none.

    A leaf is split if a boundary is inside it.
    """
    queue = [f for part in parts for f in factors(part)]
    result = []
    for size in sizes:
        taken: list[Label] = []
        need = size
        while need > 1:
            if not queue:
                return None
            head = find(queue.pop(0))
            if head.kind == "product":
                queue[:0] = factors(head)
                continue
            if need % head.size == 0:
                taken.append(head)
                need //= head.size
            elif head.size % need == 0 and head.kind == "leaf":
                outer, rest = Label(need), Label(head.size // need)
                _define(head, "product", [outer, rest])
                taken.append(outer)
                queue.insert(0, rest)
                need = 1
            else:
                return None
        result.append(product(taken) if taken else Label(size))
    return result if not queue else None


def split_sum(label: Label, sizes: Sequence[int]) -> list[Label] | None:
    """Return labels of the given sizes whose concatenation is ``label``; None if there are none."""
    queue = segments(label)
    result = []
    for size in sizes:
        taken: list[Label] = []
        need = size
        while need > 0:
            if not queue:
                return None
            head = queue.pop(0)
            if head.size <= need:
                taken.append(head)
                need -= head.size
                continue
            halves = _cut(head, need)
            if halves is None:
                return None
            taken.append(halves[0])
            queue.insert(0, halves[1])
            need = 0
        result.append(sum_of(taken) if taken else Label(0))
    return result if not queue else None


def _cut(head: Label, at: int) -> tuple[Label, Label] | None:
    """Cut a leaf or product into two segments; a product is cut through its outermost factor."""
    if head.kind == "leaf":
        first, second = Label(at), Label(head.size - at)
        _define(head, "sum", [first, second])
        return first, second
    outer, *inner = factors(head)
    width = math.prod(f.size for f in inner)
    if at % width:
        return None
    cut = split_sum(outer, [at // width, outer.size - at // width])
    if cut is None:
        return None
    return product([cut[0], *inner]), product([cut[1], *inner])


def _contains(label: Label, leaf: Label) -> bool:
    label = find(label)
    return label is leaf or any(_contains(part, leaf) for part in label.parts)


DEEPEST = 64
"""Parts within parts that are united. An axis beside itself, moved by one (``h[:, 1:] - h[:, :-1]``), has as many as positions."""


def unify(a: Label, b: Label, reason: str, depth: int = 0) -> None:
    """Make two labels of one size move together; if that cannot be expressed, pin both for ``reason``."""
    a, b = find(a), find(b)
    if a is b:
        return
    if depth == DEEPEST:
        pin(a, reason)
        pin(b, reason)
        return
    if a.size != b.size:
        raise ValueError(f"cannot unite axes of {a.size} and {b.size} ({reason})")
    if a.kind != "leaf" and b.kind == "leaf":
        a, b = b, a
    if a.kind == "leaf":
        if _contains(b, a):
            pin(b, reason)
            return
        pinned = a.pinned or (b.pinned if b.kind == "leaf" else None)
        a.kind, a.parts = "same", [b]
        if pinned is not None:
            pin(b, pinned)
        return
    pairs = _common_segments(a, b) if "sum" in (a.kind, b.kind) else _common_factors(a, b)
    if pairs is None:
        pin(a, reason)
        pin(b, reason)
        return
    for x, y in pairs:
        unify(x, y, reason, depth + 1)


def _common_segments(a: Label, b: Label) -> list[tuple[Label, Label]] | None:
    """Cut two labels, of which one is a sum, at the same boundaries."""
    if a.kind != "sum":
        a, b = b, a
    parts: list[Label] | None = segments(a)
    if b.kind == "sum":
        bounds = sorted(set(_bounds(segments(a))) | set(_bounds(segments(b))))
        parts = split_sum(a, [hi - lo for lo, hi in pairwise([0, *bounds])])
    others = split_sum(b, [p.size for p in parts]) if parts is not None else None
    return None if parts is None or others is None else list(zip(parts, others, strict=True))


def _common_factors(a: Label, b: Label) -> list[tuple[Label, Label]] | None:
    """Split two products into the coarsest factors that they have in common, splitting leaves if needed."""
    others = split_product([b], [f.size for f in factors(a)])
    parts: list[Label] | None = factors(a)  # again: where the two share a leaf, splitting b has split a
    if others is None or len(parts) != len(others):
        others = factors(b)
        parts = split_product([a], [f.size for f in others])
    return None if parts is None else list(zip(parts, others, strict=True))


def _bounds(parts: Sequence[Label]) -> list[int]:
    total, bounds = 0, []
    for part in parts:
        total += part.size
        bounds.append(total)
    return bounds
