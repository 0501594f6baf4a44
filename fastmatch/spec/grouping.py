"""From labels to groups: the leaves that may move, their axes, their names and their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from fastmatch.spec.axes import ActivationSite, Axis, Group, Pin, UnreadAxis
from fastmatch.spec.labels import Label, leaves
from fastmatch.spec.nesting import UNUSED, Nesting, find_nesting, locate
from fastmatch.spec.places import occurrences, places
from fastmatch.spec.record import Record

__all__ = ["Found", "find_groups"]

Key: TypeAlias = "tuple[int, int]"
"""A group before it has a name: the id of its leaf, and its block (-1 for the whole leaf)."""

CUT = "cut into single units"


@dataclass(frozen=True)
class Found:
    """What a trace has found: the parts of a :class:`fastmatch.spec.PermutationSpec`, and where units enter.

    Attributes:
        groups, shapes, pins, sites: as in the spec.
        entries: the (parameter, dimension) pairs at which units enter; at other axes they leave.
        unread: axes that no traced operation read.
    """

    groups: dict[str, Group]
    shapes: dict[str, tuple[int, ...]]
    pins: tuple[Pin, ...]
    sites: tuple[ActivationSite, ...]
    entries: frozenset[tuple[str, int]]
    unread: tuple[UnreadAxis, ...] = ()


def find_groups(
    record: Record, state: Mapping[str, torch.Tensor], unread: Sequence[UnreadAxis] = ()
) -> Found:
    """Return the groups that a traced forward pass leaves free to move, the pins and the activation sites.

    Args:
        record: of the forward pass.
        state: name -> parameter or buffer.
        unread: axes that no operation read; slices that none read are added.
    """
    entries = frozenset((name, dim) for name, t in state.items() for dim in record.contracted(t))
    labels = {name: record.labels(tensor) for name, tensor in state.items()}
    for listed in labels.values():
        for label in listed:
            places(label)  # pins what no Axis can describe
    nesting = find_nesting(record, list(labels.values()))
    axes, pins, slices = _axes_and_pins(nesting, labels)
    order = _order(record, nesting, axes)
    names = _names(order, axes, state)
    groups = {}
    for key in order:
        leaf, block = key
        parent = nesting.parents.get(leaf)
        within = names.get((id(parent), -1), "") if block >= 0 and parent is not None else ""
        size = axes[key].size
        groups[names[key]] = Group(names[key], size, tuple(axes[key].axes), within, block if within else -1)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    sites = _sites(record, nesting, names)
    return Found(groups, shapes, tuple(pins), sites, entries, (*unread, *slices))


@dataclass(frozen=True)
class _Unnamed:
    """A group before it has a name."""

    size: int
    axes: list[Axis]


def _axes_and_pins(
    nesting: Nesting, labels: Mapping[str, Sequence[Label]]
) -> tuple[dict[Key, _Unnamed], list[Pin], list[UnreadAxis]]:
    """Return the axes of every group, the dimensions of which no part moves, and the slices that were not read."""
    axes: dict[Key, _Unnamed] = {}
    pins: list[Pin] = []
    unread: list[UnreadAxis] = []
    for name, listed in labels.items():
        for dim, label in enumerate(listed):
            reasons: list[str] = []
            moves = False
            for whole in {id(x.leaf): x.leaf for x in occurrences(label)}.values():
                for leaf, block, axis in locate(nesting, listed, dim, whole, name):
                    if leaf.pinned is not None:
                        reasons.append(leaf.pinned)
                        if leaf.pinned == UNUSED and axis.at:
                            unread.append(UnreadAxis(name, dim, leaf.size))
                        continue
                    moves = True
                    group = axes.setdefault((id(leaf), block), _Unnamed(leaf.size, []))
                    group.axes.append(axis)
            if label.size > 1 and not moves:
                reasons = reasons or [CUT]
                # The blocks of a flatten and the positions of a kernel are not hidden units: no pin for them.
                if not reasons[0].endswith("(spatial)"):
                    pins += [Pin(name, dim, reason) for reason in dict.fromkeys(reasons)]
    return axes, pins, unread


def _sites(record: Record, nesting: Nesting, names: Mapping[Key, str]) -> tuple[ActivationSite, ...]:
    sites: dict[ActivationSite, None] = {}
    chosen = record.chosen_leaves()
    for raw in record.sites:
        if _mixes_blocks(nesting, raw.labels):
            continue
        for whole in {id(x.leaf): x.leaf for x in occurrences(raw.labels[raw.dim])}.values():
            try:
                located = list(locate(nesting, raw.labels, raw.dim, whole))
            except ValueError:  # no Axis describes where the units are in this tensor
                continue
            for leaf, block, axis in located:
                name = names.get((id(leaf), block))
                if name is not None:
                    plain = ActivationSite(raw.op, raw.op_name, raw.role, raw.operand, name, axis)
                    _, module, weight, call = raw.spot
                    samples = [label for d, label in enumerate(raw.labels) if d != raw.dim]
                    of_own = not chosen.isdisjoint(id(x) for label in samples for x in leaves(label))
                    found = replace(
                        plain, module=module, weight=weight, call=call, rank=len(raw.labels), chosen=of_own
                    )
                    sites[found] = None
    return tuple(sites)


def _mixes_blocks(nesting: Nesting, labels: Sequence[Label]) -> bool:
    """Return whether an index has picked a block for every row. Then the order of the units inside depends on the row."""
    here = {id(x.leaf) for label in labels for x in occurrences(label)}
    containers = [nesting.parents[leaf] for leaf in here & nesting.parents.keys()]
    containers += [nesting.slices[leaf][0] for leaf in here & nesting.slices.keys()]
    return any(id(container) not in here for container in containers)


def _order(record: Record, nesting: Nesting, axes: Mapping[Key, _Unnamed]) -> list[Key]:
    """Sort groups as the forward pass produces them, each followed by its subgroups."""
    first: dict[int, None] = {}
    for raw in record.sites:
        if raw.role == "produced":
            for x in occurrences(raw.labels[raw.dim]):
                first[id(x.leaf)] = None
    by_leaf: dict[int, list[Key]] = {}
    for key in axes:
        by_leaf.setdefault(key[0], []).append(key)
    ranked = [leaf for leaf in [*first, *by_leaf] if leaf in by_leaf]
    order: dict[Key, None] = {}
    for leaf in ranked:
        parent = nesting.parents.get(leaf)
        # The subgroups of a group that moves follow it, whichever is produced first.
        outer = id(parent) if parent is not None and (id(parent), -1) in axes else leaf
        family = [k for k in ranked if k in nesting.parents and id(nesting.parents[k]) == outer]
        for each in [outer, *family] if (outer, -1) in axes else [leaf]:
            for key in sorted(by_leaf[each]):
                order[key] = None
    return list(order)


def _names(
    order: Sequence[Key], axes: Mapping[Key, _Unnamed], state: Mapping[str, torch.Tensor]
) -> dict[Key, str]:
    """Name each group after the module of the first weight that produces it, with its block in brackets."""
    names: dict[Key, str] = {}
    bases: dict[int, str] = {}
    for key in order:
        leaf, block = key
        if leaf not in bases:
            first = min(axes[key].axes, key=lambda axis: (axis.dim != 0, state[axis.parameter].ndim < 2))
            base = first.parameter.rpartition(".")[0] or first.parameter
            name, count = base, 1
            while name in bases.values():
                count += 1
                name = f"{base}.{count}"
            bases[leaf] = name
        names[key] = bases[leaf] if block < 0 else f"{bases[leaf]}[{block}]"
    return names
