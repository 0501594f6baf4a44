"""What two models have in common: of another size may be only axes that no group moves, such as the classes of a head."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from fastmatch._internal.states import State
from fastmatch.spec.spec import PermutationSpec

__all__ = ["moved_dimensions", "other_sizes", "resized", "restricted"]


def other_sizes(spec: PermutationSpec, a: State, b: State) -> list[str]:
    """Return the names of tensors that differ in size, but only along axes that no group moves.

    Args:
        spec: which axes move.
        a, b: tensors of two models by their names in the spec; only shapes are read.
    """
    moved = moved_dimensions(spec)

    def differs(name: str) -> bool:
        sizes, others = a[name].shape, b[name].shape
        axes = [d for d, (n, m) in enumerate(zip(sizes, others, strict=False)) if n != m]
        return len(sizes) == len(others) and bool(axes) and all((name, d) not in moved for d in axes)

    return [name for name in b if name in a and differs(name)]


def moved_dimensions(spec: PermutationSpec) -> set[tuple[str, int]]:
    """Return (parameter, dimension) of what groups move, and of what their slices are positions in."""
    axes = [axis for group in spec.groups.values() for axis in group.axes]
    return {(axis.parameter, dim) for axis in axes for dim in (axis.dim, *(d for d, _, _ in axis.at))}


def resized(spec: PermutationSpec, names: Collection[str], state: State) -> PermutationSpec:
    """Return a spec with the shapes that these tensors have in a state."""
    changed = {name: tuple(state[name].shape) for name in names if name in spec.shapes}
    return replace(spec, shapes={**spec.shapes, **changed}) if changed else spec


def restricted(spec: PermutationSpec, kept: Collection[str]) -> PermutationSpec:
    """Return a spec of only these tensors, without the groups that have none of them."""
    groups = {
        name: replace(group, axes=tuple(x for x in group.axes if x.parameter in kept))
        for name, group in spec.groups.items()
    }
    smaller = replace(
        spec,
        groups=groups,
        shapes={k: v for k, v in spec.shapes.items() if k in kept},
        pins=tuple(p for p in spec.pins if p.parameter in kept),
    )
    return smaller.select([name for name, group in smaller.groups.items() if group.axes])
