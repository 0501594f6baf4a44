"""Where the leaves of a label are along an axis, and which leaves share every position with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fastmatch.spec.labels import Label, factors, find, pin

__all__ = ["NOWHERE", "Occurrence", "Place", "occurrences", "places", "pure_leaves"]

NOWHERE = -1
"""The start of a place that the fields of an Axis cannot describe."""


class Place(NamedTuple):
    """The positions of a leaf along an axis; see :class:`fastmatch.spec.Axis` for the fields.

    ``instead`` is the id of the leaf that this one replaces, or 0.
    """

    leaf: Label
    start: int
    outer: int
    stride: int
    inner: int
    instead: int = 0


def places(
    label: Label, fixed: Mapping[int, int] | None = None, swap: Mapping[int, Label] | None = None
) -> list[Place]:
    """Return the place of every leaf of an axis; pin the leaves that no place can describe.

    Args:
        label: the axis.
        fixed: leaf (by id) -> a fixed position along it; only that slice is searched.
        swap: leaf (by id) -> the label to read in its place.

    Raises:
        ValueError: the fixed positions do not form one strided range, so no Axis can describe them.
    """
    return list(_places(label, Place(label, 0, 1, 0, 1), fixed or {}, swap or {}))


def _places(label: Label, at: Place, fixed: Mapping[int, int], swap: Mapping[int, Label]) -> Iterator[Place]:
    _, start, outer, stride, inner, instead = at
    label = find(label)
    if id(label) in swap:
        label, instead = find(swap[id(label)]), id(label)
    if label.kind == "leaf":
        yield Place(label, start, outer, stride, inner, instead)
    elif label.kind == "sum":
        for part in label.parts:
            yield from _places(part, Place(part, start, outer, stride, inner, instead), fixed, swap)
            start += part.size * inner
    else:
        parts, step, steps = factors(label), label.size * inner, []
        for part in parts:
            step //= part.size
            steps.append(step)
        fixed_at = [fixed.get(id(find(part))) for part in parts]
        start += sum(f * step for f, step in zip(fixed_at, steps, strict=True) if f is not None)
        for k, part in enumerate(parts):
            if fixed_at[k] is not None:
                continue
            inside = Place(part, start, outer, stride, steps[k], instead)
            if all(f is None for f in fixed_at[k + 1 :]):
                yield from _places(part, inside, fixed, swap)
            else:  # a fixed factor is inside this one, so its units are not next to each other
                yield from (Place(x.leaf, NOWHERE, 1, 0, 1, instead) for x in occurrences(part))
            if outer > 1 and stride != part.size * steps[k]:
                # What follows is repeated at two strides; an Axis has only one.
                for rest in parts[k + 1 :]:
                    if fixed:
                        raise ValueError("a factor is repeated at two strides")
                    pin(rest, "a factor repeated at two strides")
            outer, stride = outer * part.size, steps[k]


@dataclass(frozen=True)
class Occurrence:
    """A leaf in one dimension and its companions there: the leaves that are factors of the same positions."""

    leaf: Label
    companions: tuple[Label, ...]


def pure_leaves(label: Label) -> list[Label]:
    """Return the leaves in which every position of ``label`` has a coordinate: its factors that are not sums."""
    followed = []
    while label.kind == "same":
        followed += [label.follows] if label.follows is not None else []
        label = label.parts[0]
    followed += [label.follows] if label.follows is not None else []
    leaves = [leaf for part in label.parts for leaf in pure_leaves(part)] if label.kind == "product" else []
    if label.kind == "leaf" and label.size > 1:
        leaves = [label]
    return leaves + [leaf for label in followed for leaf in pure_leaves(label)]


def occurrences(label: Label, companions: tuple[Label, ...] = ()) -> Iterator[Occurrence]:
    """Yield every leaf of one dimension with its companions, once for each segment that contains it."""
    label = find(label)
    if label.kind == "leaf":
        if label.size > 1:
            yield Occurrence(label, companions)
    elif label.kind == "sum":
        for part in label.parts:
            yield from occurrences(part, companions)
    else:
        for k, part in enumerate(label.parts):
            others = [x for j, other in enumerate(label.parts) if j != k for x in pure_leaves(other)]
            yield from occurrences(part, (*companions, *others))
