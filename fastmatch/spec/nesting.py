"""Which leaves are inside the units of another.

A leaf is *inside* another if it never occurs without it: the channels of a head occur once per head, in every
tensor that has them, so they may be permuted in each head separately. This is known only after the whole forward
pass, from every tensor that was seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fastmatch.spec.axes import Axis
from fastmatch.spec.labels import Label, find, unify
from fastmatch.spec.places import NOWHERE, Occurrence, occurrences, places, pure_leaves
from fastmatch.spec.record import Record, Slice

__all__ = ["UNUSED", "Nesting", "find_nesting", "locate"]

UNUSED = "not used in the traced forward pass"
MOST_BLOCKS = 4096
"""A leaf with more units than this has no subgroups: each unit would be a group of its own."""


@dataclass
class Nesting:
    """Which leaf is inside which; leaves by their ids.

    Attributes:
        parents: leaf -> the leaf whose units contain it, separately in each unit.
        slices: leaf -> (the pinned axis that cuts it, the label of each slice; None for slices never read).
    """

    parents: dict[int, Label] = field(default_factory=dict)
    slices: dict[int, tuple[Label, list[Label | None]]] = field(default_factory=dict)


def _constant_companions(record: Record) -> dict[int, set[int]]:
    """Return leaf -> the leaves that are its companions wherever it occurs."""
    found: dict[int, set[int]] = {}
    seen: set[tuple[int, ...]] = set()
    for labels in record.all_labels():
        key = tuple(map(id, labels))
        if key in seen:
            continue
        seen.add(key)
        pure = [[id(leaf) for leaf in pure_leaves(label)] for label in labels]
        for d, label in enumerate(labels):
            others = [leaf for k, leaves in enumerate(pure) if k != d for leaf in leaves]
            _intersect(found, occurrences(label), others)
    for label, separately in record.contractions:
        others = [id(leaf) for other in separately for leaf in pure_leaves(other)]
        _intersect(found, occurrences(label), others)
    return found


def _intersect(found: dict[int, set[int]], listed: Iterator[Occurrence], others: Sequence[int]) -> None:
    """Keep the companions that a leaf has here as well; a leaf that is there twice is ambiguous and does not count."""
    for x in listed:
        every = [*others, *(id(y) for y in x.companions), id(x.leaf)]
        here = {leaf for leaf in every if every.count(leaf) == 1} - {id(x.leaf)}
        found[id(x.leaf)] = found[id(x.leaf)] & here if id(x.leaf) in found else here


def find_nesting(record: Record, tensors: Sequence[Sequence[Label]]) -> Nesting:
    """Decide which leaf is inside which; unite slices that cannot move separately with the whole.

    Args:
        record: of the whole forward pass.
        tensors: the labels of every parameter and buffer.
    """
    record.forget_mixed_positions()
    while True:
        nesting, companions = Nesting(), _constant_companions(record)
        whole = _decide_slices(record, companions, nesting)
        if not whole:
            _decide_parents(companions, nesting, tensors)
            whole = _inexpressible(nesting, tensors) & nesting.slices.keys()
        if not whole:
            return nesting
        for key, part in list(record.slices.items()):
            if id(find(part.leaf)) in whole:
                unify(part.leaf, part.inside, "a slice")
                del record.slices[key]


def _decide_slices(record: Record, companions: dict[int, set[int]], nesting: Nesting) -> set[int]:
    """Note the leaves that move separately in each slice; return those that have slices and do not."""
    by_leaf: dict[int, list[Slice]] = {}
    for part in record.slices.values():
        by_leaf.setdefault(id(find(part.leaf)), []).append(part)
    whole = set()
    for key, listed in by_leaf.items():
        leaf, along = find(listed[0].leaf), find(listed[0].along)
        parts: list[Label | None] = [None] * along.size
        same_axis = all(find(r.along) is along for r in listed)
        if leaf.kind == "leaf" and leaf.pinned is None and same_axis and id(along) in companions.get(key, ()):
            for r in listed:
                seen = parts[r.position]
                if seen is not None:
                    unify(seen, r.inside, "a slice")
                parts[r.position] = r.inside
            if len({id(find(part)) for part in parts if part is not None}) > 1:
                nesting.slices[key] = along, parts
                continue
        whole.add(key)
    for key, (along, parts) in nesting.slices.items():
        for part in parts:
            if part is not None:
                _intersect(companions, occurrences(part), [*(companions[key] - {id(along)})])
    return whole


def _decide_parents(
    companions: dict[int, set[int]], nesting: Nesting, tensors: Sequence[Sequence[Label]]
) -> None:
    """Choose for every leaf the one whose units contain it, if any."""
    order: dict[int, Label] = {}
    for labels in [*tensors, *([part] for _, parts in nesting.slices.values() for part in parts if part)]:
        for label in labels:
            for x in occurrences(label):
                order.setdefault(id(x.leaf), x.leaf)
    rank = {key: k for k, key in enumerate(order)}
    above = {key: {b for b in companions.get(key, ()) if b in order} for key in order}
    for key, others in above.items():
        for other in [b for b in others if key in above[b] and rank[b] > rank[key]]:
            others.discard(other)  # always together: the first contains the other
    for key, leaf in order.items():
        outermost = [order[b] for b in above[key] if not above[b] and order[b].size <= MOST_BLOCKS]
        if leaf.pinned is None and outermost and key not in nesting.slices:
            nesting.parents[key] = min(outermost, key=lambda x: (x.pinned is not None, rank[id(x)]))
    for leaf in _inexpressible(nesting, tensors) - nesting.slices.keys():
        nesting.parents.pop(leaf, None)


def _inexpressible(nesting: Nesting, tensors: Sequence[Sequence[Label]]) -> set[int]:
    """Return the leaves inside others that no Axis can describe in some tensor."""
    found = set()
    for labels in tensors:
        for d, label in enumerate(labels):
            for x in occurrences(label):
                try:
                    for _ in locate(nesting, labels, d, x.leaf, first_only=True):
                        pass
                except ValueError:
                    found |= {id(x.leaf)}
    return found


def locate(
    nesting: Nesting,
    labels: Sequence[Label],
    dim: int,
    leaf: Label,
    parameter: str = "",
    *,
    first_only: bool = False,
) -> Iterator[tuple[Label, int, Axis]]:
    """Yield (leaf, block or -1, axis) for every part of ``leaf`` along dimension ``dim`` of a tensor.

    Args:
        nesting: as found.
        labels: of the tensor's dimensions.
        dim: the dimension.
        leaf: one of its leaves.
        parameter: the name of the tensor, which the axes get.
        first_only: only the first block, which tells whether the others can be located.

    Raises:
        ValueError: the positions do not form one strided range.
    """
    if id(leaf) not in nesting.slices:
        yield from _blocks(nesting, labels, dim, leaf, {}, {}, parameter, first_only)
        return
    along, parts = nesting.slices[id(leaf)]
    for position, part in enumerate(parts):
        fixed = {id(along): position}
        swap = {id(leaf): part if part is not None else Label(leaf.size, pinned=UNUSED)}
        inner = {id(x.leaf): x.leaf for x in occurrences(swap[id(leaf)])}
        for each in inner.values():
            found = False
            for item in _blocks(nesting, labels, dim, each, fixed, swap, parameter, first_only):
                found = True
                yield item
            if not found:
                raise ValueError("a slice is in several parts")


def _blocks(
    nesting: Nesting,
    labels: Sequence[Label],
    dim: int,
    leaf: Label,
    fixed: Mapping[int, int],
    swap: Mapping[int, Label],
    parameter: str,
    first_only: bool,
) -> Iterator[tuple[Label, int, Axis]]:
    """Yield the places of one leaf along ``dim``: as a whole, or in every unit of its parent."""
    parent = nesting.parents.get(id(leaf))
    blocks = [-1] if parent is None else range(1 if first_only else parent.size)
    along = [x for label in (labels[dim], *swap.values()) for x in occurrences(label)]
    here = {key for x in along for key in (id(x.leaf), *(id(y) for y in x.companions))}
    for block in blocks:
        wanted = dict(fixed) if parent is None else {**fixed, id(parent): block}
        at = tuple(_at(labels, dim, key, position) for key, position in wanted.items() if key not in here)
        inside = {key: position for key, position in wanted.items() if key in here}
        instead = next(iter(swap), 0)
        found = [
            p for p in places(labels[dim], inside, swap) if find(p.leaf) is leaf and p.instead == instead
        ]
        if (inside and not found) or any(p.start == NOWHERE for p in found):
            raise ValueError("a block is in several parts")
        for p in found:
            yield leaf, block, Axis(parameter, dim, p.start, p.outer, p.stride, p.inner, at)


def _at(labels: Sequence[Label], dim: int, key: int, position: int) -> tuple[int, int, int]:
    """Return (dimension, start, length) of one position of a leaf along another dimension."""
    for d, label in enumerate(labels):
        for place in places(label) if d != dim else []:
            if id(find(place.leaf)) == key:
                if place.outer > 1:
                    raise ValueError("a block is in several parts of another axis")
                return d, place.start + position * place.inner, place.inner
    raise ValueError("the tensor does not have the axis of the blocks")
