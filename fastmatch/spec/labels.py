"""The algebra of axes: labels with a size, united where an operation makes two axes the same.

Every dimension of every tensor in a forward pass carries one label. A label is a *leaf* until something is
learned about it; then it is *defined* as another label (united), as a product of labels (a view splits 768
into 12 x 64), or as a sum of labels (a concatenation, a chunk). Definitions are never taken back, so a
label stands for a constraint, not for a value: in-place writes and views need no bookkeeping, because a
view's labels are parts of its base's labels. What cannot be expressed is pinned: less to gain, never wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

__all__ = [
    "NOWHERE", "Label", "Occurrence", "Place", "find", "is_pinned", "occurrences", "pin", "places", "product",
    "pure_leaves", "segments", "split_product", "split_sum", "sum_of", "unify",
]  # fmt: skip


@dataclass(eq=False)
class Label:
    """One axis, or a part of one; ``kind`` says whether and how it is defined."""

    size: int
    kind: str = "leaf"  # "leaf", "same", "product" (factors, outermost first) or "sum" (segments)
    parts: list[Label] = field(default_factory=list)
    pinned: str | None = None
    follows: Label | None = None  # rows picked by indices into this label: each row knows its position there


def find(label: Label) -> Label:
    """The label that ``label`` was united with, itself if none."""
    while label.kind == "same":
        label = label.parts[0]
    return label


def is_pinned(label: Label) -> bool:
    """Whether nothing of ``label`` can move."""
    label = find(label)
    if label.kind == "leaf":
        return label.pinned is not None or label.size <= 1
    return all(is_pinned(part) for part in label.parts)


def _define(leaf: Label, kind: str, parts: list[Label]) -> None:
    leaf.kind, leaf.parts = kind, parts
    if leaf.pinned is not None:
        for part in parts:
            pin(part, leaf.pinned)


def pin(label: Label, reason: str) -> None:
    """Holds every leaf of ``label`` where it is; the first reason stays."""
    label = find(label)
    if label.pinned is None:
        label.pinned = reason
    for part in label.parts:
        pin(part, reason)


def factors(label: Label) -> list[Label]:
    """The factors of a label, outermost first: leaves and sums of more than one position."""
    label = find(label)
    if label.kind == "product":
        return [f for part in label.parts for f in factors(part)]
    return [] if label.size == 1 else [label]


def segments(label: Label) -> list[Label]:
    """The segments of a label in order: leaves and products; empty ones left out."""
    label = find(label)
    if label.kind == "sum":
        return [s for part in label.parts for s in segments(part)]
    return [] if label.size == 0 else [label]


def product(parts: Sequence[Label]) -> Label:
    """One axis made of several, outermost first."""
    flat = [f for part in parts for f in factors(part)]
    if len(flat) == 1:
        return flat[0]
    return Label(math.prod(p.size for p in parts), "product" if flat else "leaf", flat)


def sum_of(parts: Sequence[Label]) -> Label:
    """One axis made of several, one after the other."""
    flat = [s for part in parts for s in segments(part)]
    if len(flat) == 1:
        return flat[0]
    return Label(sum(p.size for p in parts), "sum" if flat else "leaf", flat)


def split_product(parts: Sequence[Label], sizes: Sequence[int]) -> list[Label] | None:
    """Labels of the given sizes whose product is the product of ``parts``; None where that cannot be said.

    Leaves are split where a boundary falls inside them.
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
    """Labels of the given sizes, one after the other, that make up ``label``; None where that cannot be said."""
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
    """A leaf or product cut into two segments; a product is cut through its outermost factor."""
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


def unify(a: Label, b: Label, reason: str) -> None:
    """Makes two labels of one size move together; where they cannot, both are pinned for ``reason``."""
    a, b = find(a), find(b)
    if a is b:
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
    if a.kind == "sum" or b.kind == "sum":
        if a.kind != "sum":
            a, b = b, a
        parts_a = segments(a)
        if b.kind == "sum":
            bounds = sorted(set(_bounds(segments(a))) | set(_bounds(segments(b))))
            sizes = [hi - lo for lo, hi in pairwise([0, *bounds])]
            cut = split_sum(a, sizes)
            if cut is None:
                _pin_both(a, b, reason)
                return
            parts_a = cut
        parts_b = split_sum(b, [p.size for p in parts_a])
    else:
        # Cut both into the coarsest factors whose boundaries they share, then finer where one allows it.
        parts_b = split_product([b], [f.size for f in factors(a)])
        parts_a = factors(a)
        if parts_b is None or len(parts_a) != len(parts_b):
            parts_b = factors(b)
            split = split_product([a], [f.size for f in parts_b])
            if split is None:
                _pin_both(a, b, reason)
                return
            parts_a = split
    if parts_b is None:
        _pin_both(a, b, reason)
        return
    for x, y in zip(parts_a, parts_b, strict=True):
        unify(x, y, reason)


def _bounds(parts: Sequence[Label]) -> list[int]:
    total, bounds = 0, []
    for part in parts:
        total += part.size
        bounds.append(total)
    return bounds


def _pin_both(a: Label, b: Label, reason: str) -> None:
    pin(a, reason)
    pin(b, reason)


NOWHERE = -1
"""The start of a place that the fields of an axis cannot describe."""


@dataclass(frozen=True)
class Place:
    """Where a leaf lies along an axis; the fields are those of :class:`fastmatch.spec.Axis`.

    ``instead`` is the id of the leaf in whose place this one was read, 0 if none.
    """

    leaf: Label
    start: int
    outer: int
    stride: int
    inner: int
    instead: int = 0


def places(
    label: Label, held: Mapping[int, int] | None = None, swap: Mapping[int, Label] | None = None
) -> list[Place]:
    """Every leaf of an axis and where it lies; leaves that no such place can describe are pinned.

    Args:
        label: of the axis.
        held: leaf (by id) -> a position along it: only what lies there.
        swap: leaf (by id) -> the label to read in its place.

    Raises:
        ValueError: something is held, and what lies there is no such place.
    """
    return list(_places(label, Place(label, 0, 1, 0, 1), held or {}, swap or {}))


def _places(label: Label, at: Place, held: Mapping[int, int], swap: Mapping[int, Label]) -> Iterator[Place]:
    label, instead = find(label), at.instead
    if id(label) in swap:
        label, instead = find(swap[id(label)]), id(label)
    if label.kind == "leaf":
        yield replace(at, leaf=label, instead=instead)
    elif label.kind == "sum":
        offset = 0
        for part in label.parts:
            inside = replace(at, leaf=part, start=at.start + offset * at.inner, instead=instead)
            yield from _places(part, inside, held, swap)
            offset += part.size
    else:
        parts, step, steps = factors(label), label.size * at.inner, []
        for part in parts:
            step //= part.size
            steps.append(step)
        fixed = [held.get(id(find(part))) for part in parts]
        start = at.start + sum(f * step for f, step in zip(fixed, steps, strict=True) if f is not None)
        outer, stride = at.outer, at.stride
        for k, part in enumerate(parts):
            if fixed[k] is not None:
                continue
            inside = Place(part, start, outer, stride, steps[k], instead)
            if all(f is None for f in fixed[k + 1 :]):
                yield from _places(part, inside, held, swap)
            else:  # its units lie apart from each other, inside what is held
                yield from (Place(x.leaf, NOWHERE, 1, 0, 1, instead) for x in occurrences(part))
            if outer > 1 and stride != part.size * steps[k]:
                # Two repeats with different strides in front of what follows: an Axis has only one.
                for rest in parts[k + 1 :]:
                    if held:
                        raise ValueError("a factor is repeated at two strides")
                    pin(rest, "a factor repeated at two strides")
            outer, stride = outer * part.size, steps[k]


@dataclass(frozen=True)
class Occurrence:
    """A leaf in one dimension, and the leaves that are factors of the same positions."""

    leaf: Label
    beside: tuple[Label, ...]


def pure_leaves(label: Label) -> list[Label]:
    """The leaves that every position of ``label`` has a coordinate in: its factors that are not sums."""
    followed = []
    while label.kind == "same":
        followed += [label.follows] if label.follows is not None else []
        label = label.parts[0]
    followed += [label.follows] if label.follows is not None else []
    leaves = [leaf for part in label.parts for leaf in pure_leaves(part)] if label.kind == "product" else []
    if label.kind == "leaf" and label.size > 1:
        leaves = [label]
    return leaves + [leaf for label in followed for leaf in pure_leaves(label)]


def occurrences(label: Label, beside: tuple[Label, ...] = ()) -> Iterator[Occurrence]:
    """Every leaf of one dimension with the leaves beside it, once for each segment that it lies in."""
    label = find(label)
    if label.kind == "leaf":
        if label.size > 1:
            yield Occurrence(label, beside)
    elif label.kind == "sum":
        for part in label.parts:
            yield from occurrences(part, beside)
    else:
        for k, part in enumerate(label.parts):
            others = [x for j, other in enumerate(label.parts) if j != k for x in pure_leaves(other)]
            yield from occurrences(part, (*beside, *others))
