"""Parameters that the traced forward passes never read, and the groups that they could share.

A branch that no example takes may read the units of any group through such a parameter. Nothing that was traced
tells which, so the groups cannot be moved without the caller's word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fastmatch._internal.allowed import Unread
from fastmatch.spec.axes import Group, Pin, UnreadAxis
from fastmatch.spec.labels import Label, is_pinned, pin
from fastmatch.spec.nesting import UNUSED
from fastmatch.spec.places import occurrences
from fastmatch.spec.record import Record

__all__ = ["Unread", "check_unread", "hold_groups", "pin_unread"]

MOST_NAMED = 5


def pin_unread(record: Record, state: Mapping[str, torch.Tensor]) -> list[UnreadAxis]:
    """Pin the axes that no operation read, and return those that units of some group may be along.

    The rest of an axis whose other part stays in place, such as the later rows of a table of positions, stays in
    place as well and is not returned.
    """
    read = record.leaves_read()
    found = []
    for name, tensor in state.items():
        for dim, label in enumerate(record.labels(tensor)):
            leaves = {id(x.leaf): x.leaf for x in occurrences(label)}
            unread = [leaf for key, leaf in leaves.items() if key not in read]
            others = [leaf for key, leaf in leaves.items() if key in read]
            if unread and not (others and all(map(is_pinned, others))):
                size = label.size if not others else sum(_lengths(label, unread))
                found.append(UnreadAxis(name, dim, size))
            for leaf in unread:
                pin(leaf, UNUSED)
    return found


def _lengths(label: Label, leaves: list[Label]) -> list[int]:
    """Return how many positions of an axis each leaf is part of."""
    lengths = []
    for leaf in leaves:
        parts = label.parts if label.kind == "sum" else [label]
        lengths += [part.size for part in parts if any(x.leaf is leaf for x in occurrences(part))]
    return lengths


def _shared(group: Group, unread: Sequence[UnreadAxis]) -> UnreadAxis | None:
    """Return an axis that was not read and has room for the units of a group, as a whole or as a part."""
    return next((axis for axis in unread if axis.size >= group.size), None)


def check_unread(groups: Mapping[str, Group], unread: Sequence[UnreadAxis]) -> None:
    """Raise ValueError if a group could be along an axis that no operation read."""
    names = list(dict.fromkeys(axis.parameter for axis in unread))
    if not any(_shared(group, unread) for group in groups.values()):
        return
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    raise ValueError(
        f"example_inputs: the forward pass on them does not read all of {', '.join(map(repr, names[:MOST_NAMED]))}{more}, so "
        "what moves with these parameters is unknown. Give several inputs that together reach all of them, "
        "fm.Examples(x1, x2); or PermutationSpec.trace(..., unread='hold'), which keeps the groups that they could "
        "share in place; or unread='ignore', if no forward pass ever reads them"
    )


def hold_groups(groups: Mapping[str, Group], unread: Sequence[UnreadAxis]) -> tuple[list[str], list[Pin]]:
    """Return the names of the groups that share no unread axis, and a pin for every axis of the others."""
    held = {name: axis for name, group in groups.items() if (axis := _shared(group, unread))}
    outer = {groups[name].within for name in held} - {""}
    kept = [name for name in groups if name not in held and name not in outer]
    pins: dict[tuple[str, int], Pin] = {}
    for name in groups:
        if name not in kept:
            for axis in groups[name].axes:
                other = held.get(name) or unread[0]
                reason = f"could move with {other.parameter}, which was not read"
                pins.setdefault((axis.parameter, axis.dim), Pin(axis.parameter, axis.dim, reason))
    moved = {(axis.parameter, axis.dim) for name in kept for axis in groups[name].axes}
    return kept, [pin for key, pin in pins.items() if key not in moved]
