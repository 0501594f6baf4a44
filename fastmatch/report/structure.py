"""What moves together, as a drawing: groups in the order of the forward pass, and arcs for the tensors between them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fastmatch.spec import PermutationSpec

__all__ = ["Arc", "Node", "Structure", "structure_of"]


@dataclass(frozen=True)
class Node:
    """A group of units, or a reason why axes are pinned.

    Attributes:
        name: of the group; the reason of a pin.
        units: of the group; 0 for a pin.
        role: ``"group"``, ``"residual"`` (a residual stream), ``"outer"`` (heads, experts) or ``"pin"``.
        tensors: labels of the axes that move with the group, or that are pinned for this reason.
        note: what else there is to say.
    """

    name: str
    units: int
    role: str
    tensors: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Arc:
    """Tensors with one axis in each of two nodes.

    Attributes:
        first, second: positions of the nodes.
        tensors: their names.
    """

    first: int
    second: int
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Structure:
    """The nodes in order, pins last, and the arcs between them."""

    nodes: tuple[Node, ...]
    arcs: tuple[Arc, ...]


def structure_of(spec: PermutationSpec) -> Structure:
    """Return the groups of a spec, with subgroups inside their group, and the reasons of its pins."""
    residual, inner = set(spec.residual()), Counter(group.within for group in spec.groups.values())
    nodes: list[Node] = []
    place: dict[str, int] = {}
    for name in spec.top_level():
        group = spec.groups[name]
        role = "residual" if name in residual else "outer" if inner[name] else "group"
        note = f"with {inner[name]} groups of units inside" if inner[name] else ""
        place[name] = len(nodes)
        nodes.append(Node(name, group.size, role, tuple(axis.label() for axis in group.axes), note))
    for group in spec.groups.values():
        if group.within:
            place[group.name] = place[group.within]
    pins: dict[str, list[str]] = {}
    for pin in spec.pins:
        length = spec.shapes[pin.parameter][pin.dim]
        pins.setdefault(pin.reason, []).append(f"{pin.parameter}:{pin.dim} of {length}")
    reasons: dict[str, int] = {}
    for reason, labels in pins.items():
        reasons[reason] = len(nodes)
        nodes.append(Node(reason, 0, "pin", tuple(labels)))
    touched: dict[str, set[int]] = {}
    for name in spec.shapes:
        touched[name] = {place[group] for _, group in spec.axes_of(name)}
    for pin in spec.pins:
        touched[pin.parameter].add(reasons[pin.reason])
    between: dict[tuple[int, int], list[str]] = {}
    for name, places in touched.items():
        order = sorted(places)
        for k, first in enumerate(order):
            for second in order[k + 1 :]:
                if not nodes[first].role == nodes[second].role == "pin":
                    between.setdefault((first, second), []).append(name)
    arcs = tuple(Arc(first, second, tuple(names)) for (first, second), names in between.items())
    return Structure(tuple(nodes), arcs)
