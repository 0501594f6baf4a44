"""From labels to groups: which leaves move, which only inside the units of another, and where they lie.

A leaf is *inside* another when it never occurs without it: the channels of a head are there once a head, in every
tensor that has them, so they may be permuted in each head apart. Whether that holds is known only after the
whole forward pass, from every tensor that was seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

import torch

from fastmatch.spec.labels import NOWHERE, Label, Occurrence, find, occurrences, places, pure_leaves, unify
from fastmatch.spec.spec import ActivationSite, Axis, Group, PermutationSpec, Pin

if TYPE_CHECKING:
    from fastmatch.spec.trace import Slice, Tracer

__all__ = ["UNUSED", "spec_of"]

UNUSED = "not used in the traced forward pass"
MOST_BLOCKS = 4096
"""More blocks than this get no permutations of their own."""

Key: TypeAlias = "tuple[int, int]"
"""A group before it has a name: the id of its leaf, and the block it lies in (-1 for the whole)."""


@dataclass
class _Nesting:
    """What lies inside what; leaves by their ids.

    Attributes:
        parents: leaf -> the leaf inside whose units it lies, in each apart.
        slices: leaf -> (the pinned axis that cuts it, the label of each slice; None for those never read).
    """

    parents: dict[int, Label] = field(default_factory=dict)
    slices: dict[int, tuple[Label, list[Label | None]]] = field(default_factory=dict)


def _contexts(tracer: Tracer) -> dict[int, set[int]]:
    """Leaf -> the leaves that are beside it wherever it occurs."""
    found: dict[int, set[int]] = {}
    seen: set[tuple[int, ...]] = set()
    for labels in tracer.all_labels():
        key = tuple(map(id, labels))
        if key in seen:
            continue
        seen.add(key)
        pure = [[id(leaf) for leaf in pure_leaves(label)] for label in labels]
        for d, label in enumerate(labels):
            _meet(
                found,
                occurrences(label),
                [leaf for k, leaves in enumerate(pure) if k != d for leaf in leaves],
            )
    for label, beside in tracer.contractions:
        _meet(found, occurrences(label), [id(leaf) for other in beside for leaf in pure_leaves(other)])
    return found


def _meet(found: dict[int, set[int]], listed: Iterator[Occurrence], others: Sequence[int]) -> None:
    """Keeps what is beside a leaf here as well; a leaf that is there twice is not: which would be meant?"""
    for x in listed:
        every = [*others, *(id(y) for y in x.beside), id(x.leaf)]
        beside = {leaf for leaf in every if every.count(leaf) == 1} - {id(x.leaf)}
        found[id(x.leaf)] = found[id(x.leaf)] & beside if id(x.leaf) in found else beside


def _nest(tracer: Tracer, tensors: Sequence[Sequence[Label]]) -> _Nesting:
    """Decides what lies inside what; slices that cannot move apart are united with the whole."""
    tracer.forget_mixed_positions()
    while True:
        nesting, beside = _Nesting(), _contexts(tracer)
        whole = _decide_slices(tracer, beside, nesting)
        if not whole:
            _decide_parents(beside, nesting, tensors)
            whole = _inexpressible(nesting, tensors) & nesting.slices.keys()
        if not whole:
            return nesting
        for key, record in list(tracer.slices.items()):
            if id(find(record.leaf)) in whole:
                unify(record.leaf, record.inside, "a slice")
                del tracer.slices[key]


def _decide_slices(tracer: Tracer, beside: dict[int, set[int]], nesting: _Nesting) -> set[int]:
    """Notes the leaves that move apart in each slice; returns those that have slices and do not."""
    records: dict[int, list[Slice]] = {}
    for record in tracer.slices.values():
        records.setdefault(id(find(record.leaf)), []).append(record)
    whole = set()
    for key, listed in records.items():
        leaf, along = find(listed[0].leaf), find(listed[0].along)
        parts: list[Label | None] = [None] * along.size
        same_axis = all(find(r.along) is along for r in listed)
        if leaf.kind == "leaf" and leaf.pinned is None and same_axis and id(along) in beside.get(key, ()):
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
            _meet(beside, occurrences(part) if part is not None else iter(()), [*(beside[key] - {id(along)})])
    return whole


def _decide_parents(
    beside: dict[int, set[int]], nesting: _Nesting, tensors: Sequence[Sequence[Label]]
) -> None:
    """Chooses for every leaf the one whose units it lies inside, if any."""
    order: dict[int, Label] = {}
    for labels in [*tensors, *([part] for _, parts in nesting.slices.values() for part in parts if part)]:
        for label in labels:
            for x in occurrences(label):
                order.setdefault(id(x.leaf), x.leaf)
    rank = {key: k for k, key in enumerate(order)}
    above = {key: {b for b in beside.get(key, ()) if b in order} for key in order}
    for key, others in above.items():
        for other in [b for b in others if key in above[b] and rank[b] > rank[key]]:
            others.discard(other)  # always together: what comes first holds the other
    for key, leaf in order.items():
        roots = [order[b] for b in above[key] if not above[b] and order[b].size <= MOST_BLOCKS]
        if leaf.pinned is None and roots and key not in nesting.slices:
            nesting.parents[key] = min(roots, key=lambda x: (x.pinned is not None, rank[id(x)]))
    for leaf in _inexpressible(nesting, tensors) - nesting.slices.keys():
        nesting.parents.pop(leaf, None)


def _inexpressible(nesting: _Nesting, tensors: Sequence[Sequence[Label]]) -> set[int]:
    """Leaves inside others for which some tensor has no axis that says where they lie."""
    found = set()
    for labels in tensors:
        for d, label in enumerate(labels):
            for x in occurrences(label):
                try:
                    for _ in _located(nesting, labels, d, x.leaf, first_only=True):
                        pass
                except ValueError:
                    found |= {id(x.leaf)}
    return found


def _located(
    nesting: _Nesting, labels: Sequence[Label], dim: int, leaf: Label, *, first_only: bool = False
) -> Iterator[tuple[Label | None, int, Axis]]:
    """(leaf or None for a slice never read, block or -1, where it lies) of all that ``leaf`` is along ``dim``."""
    if id(leaf) not in nesting.slices:
        yield from _blocks(nesting, labels, dim, leaf, {}, {}, first_only)
        return
    along, parts = nesting.slices[id(leaf)]
    for position, part in enumerate(parts):
        held = {id(along): position}
        swap = {id(leaf): part if part is not None else Label(leaf.size, pinned=UNUSED)}
        inner = {id(x.leaf): x.leaf for x in occurrences(swap[id(leaf)])}
        for each in inner.values():
            found = False
            for item in _blocks(nesting, labels, dim, each, held, swap, first_only):
                found = True
                yield item
            if not found:
                raise ValueError("a slice lies in several pieces")


def _blocks(
    nesting: _Nesting,
    labels: Sequence[Label],
    dim: int,
    leaf: Label,
    held: Mapping[int, int],
    swap: Mapping[int, Label],
    first_only: bool,
) -> Iterator[tuple[Label, int, Axis]]:
    """The places of one leaf along ``dim``: all at once, or in every unit of its parent."""
    parent = nesting.parents.get(id(leaf))
    blocks = [-1] if parent is None else range(1 if first_only else parent.size)
    for block in blocks:
        wanted = dict(held) if parent is None else {**held, id(parent): block}
        along = [x for label in (labels[dim], *swap.values()) for x in occurrences(label)]
        here = {key for x in along for key in (id(x.leaf), *(id(y) for y in x.beside))}
        at = tuple(_at(labels, dim, key, position) for key, position in wanted.items() if key not in here)
        inside = {key: position for key, position in wanted.items() if key in here}
        instead = next(iter(swap), 0)
        found = [
            p for p in places(labels[dim], inside, swap) if find(p.leaf) is leaf and p.instead == instead
        ]
        if (inside and not found) or any(p.start == NOWHERE for p in found):
            raise ValueError("a block lies in several pieces")
        for p in found:
            yield leaf, block, Axis("", dim, p.start, p.outer, p.stride, p.inner, at)


def _at(labels: Sequence[Label], dim: int, key: int, position: int) -> tuple[int, int, int]:
    """(dimension, start, length) of one position of a leaf that lies along another dimension."""
    for d, label in enumerate(labels):
        for place in places(label) if d != dim else []:
            if id(find(place.leaf)) == key:
                if place.outer > 1:
                    raise ValueError("a block lies in several pieces of another axis")
                return d, place.start + position * place.inner, place.inner
    raise ValueError("the axis of the blocks is not there")


def spec_of(tracer: Tracer, state: Mapping[str, torch.Tensor]) -> PermutationSpec:
    """The groups that a traced forward pass leaves free to move, what is pinned, and where activations are."""
    labels = {name: tracer.labels(tensor) for name, tensor in state.items()}
    for listed in labels.values():
        for label in listed:
            places(label)  # pins what no axis can say
    nesting = _nest(tracer, list(labels.values()))
    members: dict[Key, list[Axis]] = {}
    leaves: dict[int, Label] = {}
    pins: list[Pin] = []
    for name, tensor in state.items():
        for dim in range(tensor.ndim):
            reasons: list[str] = []
            moves = False
            listed = {id(x.leaf): x.leaf for x in occurrences(labels[name][dim])}
            for whole in listed.values():
                for leaf, block, axis in _located(nesting, labels[name], dim, whole):
                    assert leaf is not None
                    if leaf.pinned is not None:
                        reasons.append(leaf.pinned)
                        continue
                    moves = True
                    leaves[id(leaf)] = leaf
                    members.setdefault((id(leaf), block), []).append(replace(axis, parameter=name))
            if tensor.shape[dim] > 1 and not moves:
                reasons = reasons or ["cut into single units"]
                # The blocks of a flatten and the positions of a kernel are no hidden units: not worth a line.
                if not reasons[0].endswith("(spatial)"):
                    pins += [Pin(name, dim, reason) for reason in dict.fromkeys(reasons)]
    order = _order(tracer, nesting, members)
    names = _names(order, members, state)
    groups = {}
    for key in order:
        parent = nesting.parents.get(key[0])
        within = names.get((id(parent), -1), "") if key[1] >= 0 and parent is not None else ""
        block = key[1] if within else -1
        groups[names[key]] = Group(names[key], leaves[key[0]].size, tuple(members[key]), within, block)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return PermutationSpec(groups, shapes, tuple(pins), _sites(tracer, nesting, names))


def _sites(tracer: Tracer, nesting: _Nesting, names: Mapping[Key, str]) -> tuple[ActivationSite, ...]:
    sites: dict[ActivationSite, None] = {}
    for raw in tracer.sites:
        for whole in {id(x.leaf): x.leaf for x in occurrences(raw.labels[raw.dim])}.values():
            try:
                located = list(_located(nesting, raw.labels, raw.dim, whole))
            except ValueError:  # rows that an index picked: the block is another in every row
                continue
            for leaf, block, axis in located:
                name = names.get((id(leaf), block))
                if name is not None:
                    sites[ActivationSite(raw.op, raw.op_name, raw.role, raw.operand, name, axis)] = None
    return tuple(sites)


def _order(tracer: Tracer, nesting: _Nesting, members: Mapping[Key, list[Axis]]) -> list[Key]:
    """Groups in the order in which the forward pass produces them, what lies inside a group behind it."""
    first: dict[int, None] = {}
    for raw in tracer.sites:
        if raw.role == "produced":
            for x in occurrences(raw.labels[raw.dim]):
                first[id(x.leaf)] = None
    by_leaf: dict[int, list[Key]] = {}
    for key in members:
        by_leaf.setdefault(key[0], []).append(key)
    ranked = [leaf for leaf in [*first, *by_leaf] if leaf in by_leaf]
    order: dict[Key, None] = {}
    for leaf in ranked:
        parent = nesting.parents.get(leaf)
        # A family of a group that moves comes behind it, whichever is produced first.
        root = id(parent) if parent is not None and (id(parent), -1) in members else leaf
        family = [k for k in ranked if k in nesting.parents and id(nesting.parents[k]) == root]
        for each in [root, *family] if (root, -1) in members else [leaf]:
            for key in sorted(by_leaf[each]):
                order[key] = None
    return list(order)


def _names(
    order: Sequence[Key], members: Mapping[Key, list[Axis]], state: Mapping[str, torch.Tensor]
) -> dict[Key, str]:
    """Each group named after the module of the first weight whose output side it is, with its block in brackets."""
    names: dict[Key, str] = {}
    bases: dict[int, str] = {}
    for key in order:
        if key[0] not in bases:
            first = min(members[key], key=lambda axis: (axis.dim != 0, state[axis.parameter].ndim < 2))
            base = first.parameter.rpartition(".")[0] or first.parameter
            name, count = base, 1
            while name in bases.values():
                count += 1
                name = f"{base}.{count}"
            bases[key[0]] = name
        names[key] = bases[key[0]] if key[1] < 0 else f"{bases[key[0]]}[{key[1]}]"
    return names
