"""Specs of other libraries, read and written: Git Re-Basin and its ports, C2M3, PLeaS, mergekit.

These formats name whole dimensions. They cannot express blocks, segments or factors of a dimension (flattened
convolutions, heads): writing such a spec raises an error that names the group, and ``spec.select`` removes it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any, NamedTuple

from fastmatch.spec.axes import Axis, Group
from fastmatch.spec.spec import PermutationSpec

__all__ = [
    "AxesSpec",
    "LayersAndAxesSpec",
    "SizedGroup",
    "from_axes",
    "from_mergekit",
    "from_pleas",
    "to_axes",
    "to_layers_and_axes",
    "to_mergekit",
    "to_pleas",
]

Shapes = Mapping[str, Sequence[int]]


class AxesSpec(NamedTuple):
    """Git Re-Basin's two tables: group -> [(parameter, axis)] and parameter -> (group or None for each axis)."""

    perm_to_axes: dict[str, list[tuple[str, int]]]
    axes_to_perm: dict[str, tuple[str | None, ...]]


class LayersAndAxesSpec(NamedTuple):
    """The two tables under C2M3's field names."""

    perm_to_layers_and_axes: dict[str, list[tuple[str, int]]]
    layer_and_axes_to_perm: dict[str, tuple[str | None, ...]]


@dataclass(eq=False)
class SizedGroup:
    """A group in PLeaS: an object that its axes share, compared by identity."""

    size: int


FIELDS = (("axes_to_perm", "perm_to_axes"), ("layer_and_axes_to_perm", "perm_to_layers_and_axes"))


def from_axes(source: Any, shapes: Shapes) -> PermutationSpec:
    """Read a spec written for Git Re-Basin, one of its ports or C2M3.

    Example:
        >>> from fastmatch.spec.formats import from_axes
        >>> shapes = {"fc1.weight": (8, 4), "fc2.weight": (3, 8)}
        >>> spec = from_axes({"fc1.weight": ("P", None), "fc2.weight": (None, "P")}, shapes)
        >>> spec.groups["P"].size
        8

    Args:
        source: an object with ``axes_to_perm`` or ``perm_to_axes`` (or C2M3's names for them), or the mapping
            of parameters to tuples itself. Parameters that the network does not have and entries beyond a
            tensor's rank are ignored; ``()`` means a scalar.
        shapes: parameter -> shape, such as ``{k: v.shape for k, v in model.state_dict().items()}``.

    Raises:
        TypeError: ``source`` has none of these forms.
        ValueError: the axes of a group have different lengths, or no axis is in ``shapes``.
    """
    axes_by_group: dict[str, list[tuple[str, int]]] = defaultdict(list)
    by_parameter, by_group = source if isinstance(source, Mapping) else None, None
    for first, second in FIELDS:
        by_parameter = getattr(source, first, by_parameter)
        by_group = getattr(source, second, by_group)
    if by_parameter is not None:
        for parameter, groups in by_parameter.items():
            for dim, group in enumerate(groups or ()):
                if group is not None:
                    axes_by_group[group].append((parameter, dim))
    elif by_group is not None:
        axes_by_group.update({group: list(axes) for group, axes in by_group.items()})
    else:
        raise TypeError(f"source: expected axes_to_perm or perm_to_axes, got {type(source).__name__}")
    return _spec({str(k): v for k, v in axes_by_group.items()}, shapes)


def from_pleas(source: Mapping[Any, Any], shapes: Shapes) -> PermutationSpec:
    """Read a PLeaS dictionary: (parameter, axis) -> group object, which axes that move together share.

    Raises:
        ValueError: a group's ``size`` is not the length of its axes, or no axis is in ``shapes``.
    """
    axes_by_group: dict[int, list[tuple[str, int]]] = defaultdict(list)
    objects: dict[int, Any] = {}
    for (parameter, dim), group in source.items():
        if group is not None:
            axes_by_group[id(group)].append((parameter, int(dim)))
            objects[id(group)] = group
    named: dict[str, list[tuple[str, int]]] = {}
    for count, (key, axes) in enumerate(axes_by_group.items()):
        name = str(getattr(objects[key], "name", None) or f"P{count}")
        for parameter, dim in axes:
            if _there(parameter, dim, shapes) and shapes[parameter][dim] != objects[key].size:
                raise ValueError(
                    f"source: group {name!r} has size {objects[key].size}, "
                    f"{parameter}:{dim} has length {shapes[parameter][dim]}"
                )
        named[name] = axes
    return _spec(named, shapes)


def from_mergekit(
    architecture: Mapping[str, Any], shapes: Shapes, *, layers: int = 0, head_dim: int | None = None
) -> PermutationSpec:
    """Read a mergekit architecture: each space that weights produce and consume becomes a group.

    A space that a weight splits into heads (``head_split``) becomes a group of the channels of one head, with the
    same order in every head. A space that no weight consumes is not a group: queries and keys, whose order rotary
    embeddings fix.

    Args:
        architecture: the parsed JSON with ``pre_weights``, ``layer_templates`` and ``post_weights``.
        shapes: parameter -> shape.
        layers: number of repeats of the layer templates.
        head_dim: channels per head; required if ``head_split`` is used.

    Raises:
        ValueError: lengths differ, ``head_dim`` is missing or does not divide a space, or no axis is in ``shapes``.
    """
    axes_by_group: dict[str, list[tuple[str, int]]] = defaultdict(list)
    produced, consumed, split = set(), set(), set()
    for weight in _weights(architecture, layers):
        name, into, out = weight["name"], weight.get("input_space"), weight.get("output_space")
        rank = len(shapes.get(name, ()))
        # Linear weights are (output, input); an embedding is (vocabulary, output); a vector has one axis.
        places = [(out, 1 if weight.get("is_embed") and rank == 2 else 0), (into, 1 if rank > 1 else 0)]
        for (space, dim), side in zip(places, ("output", "input"), strict=True):
            if space is None or not _there(name, dim, shapes):
                continue
            if (name, dim) not in axes_by_group[space]:
                axes_by_group[space].append((name, dim))
            (produced if side == "output" else consumed).add(space)
            if weight.get("head_split") == side:
                split.add(space)
    if split and not head_dim:
        raise ValueError("head_dim: needed, because the architecture splits spaces into heads")
    moving = {k: v for k, v in axes_by_group.items() if k in produced & consumed}
    return _spec(moving, shapes, dict.fromkeys(split, head_dim or 0))


def _weights(architecture: Mapping[str, Any], layers: int) -> list[Mapping[str, Any]]:
    """Return every weight with its layer index filled in."""

    def filled(weight: Mapping[str, Any], index: int) -> dict[str, Any]:
        def fill(value: Any) -> Any:
            return Template(value).safe_substitute(layer_index=index) if isinstance(value, str) else value

        return {key: fill(value) for key, value in weight.items()}

    templates = (architecture.get("layer_templates") or {}).get("weights") or []
    body = [filled(weight, k) for k in range(layers) for weight in templates]
    return [*(architecture.get("pre_weights") or []), *body, *(architecture.get("post_weights") or [])]


def _there(parameter: str, dim: int, shapes: Shapes) -> bool:
    return parameter in shapes and 0 <= dim < len(shapes[parameter])


def _spec(
    axes_by_group: Mapping[str, list[tuple[str, int]]], shapes: Shapes, heads: Mapping[str, int] | None = None
) -> PermutationSpec:
    """Build groups from the axes that the network has; ``heads`` gives the channels per head of split spaces."""
    groups = {}
    for name, axes in axes_by_group.items():
        there = [(p, d) for p, d in axes if _there(p, d, shapes)]
        if not there:
            continue
        first, dim = there[0]
        size = (heads or {}).get(name) or shapes[first][dim]
        found = []
        for parameter, d in there:
            length = shapes[parameter][d]
            if name in (heads or {}) and length % size == 0:
                repeated = length // size
                found.append(Axis(parameter, d, outer=repeated, stride=size if repeated > 1 else 0))
            elif length == size:
                found.append(Axis(parameter, d))
            else:
                raise ValueError(
                    f"source: group {name!r} has {size} units on {first}:{dim}, "
                    f"but {parameter}:{d} has length {length}"
                )
        groups[name] = Group(name, size, tuple(found))
    if not groups:
        raise ValueError("source: none of its parameters and axes are in shapes")
    return PermutationSpec(groups, {k: tuple(v) for k, v in shapes.items()})


def _plain(spec: PermutationSpec, form: str) -> None:
    for group in spec.groups.values():
        for axis in group.axes:
            if not axis.is_whole(group.size, spec.shapes[axis.parameter][axis.dim]):
                raise ValueError(
                    f"spec: group {group.name!r} moves a part of a dimension, {axis.label()}, which {form} cannot "
                    "express; remove the group with spec.select(...)"
                )


def to_axes(spec: PermutationSpec) -> AxesSpec:
    """Write the spec as Git Re-Basin's two tables.

    Raises:
        ValueError: a group moves a part of a dimension.
    """
    _plain(spec, "Git Re-Basin's form")
    by_group = {g.name: [(x.parameter, x.dim) for x in g.axes] for g in spec.groups.values()}
    by_parameter: dict[str, tuple[str | None, ...]] = {}
    for parameter, shape in spec.shapes.items():
        named = {axis.dim: group for axis, group in spec.axes_of(parameter)}
        by_parameter[parameter] = tuple(named.get(dim) for dim in range(len(shape)))
    return AxesSpec(by_group, by_parameter)


def to_layers_and_axes(spec: PermutationSpec) -> LayersAndAxesSpec:
    """Write the spec under C2M3's field names; see :func:`to_axes`."""
    return LayersAndAxesSpec(*to_axes(spec))


def to_pleas(spec: PermutationSpec) -> dict[tuple[str, int], SizedGroup]:
    """Write the spec as a PLeaS dictionary, (parameter, axis) -> shared group object."""
    _plain(spec, "PLeaS' form")
    return {
        (axis.parameter, axis.dim): shared
        for group in spec.groups.values()
        for shared in [SizedGroup(group.size)]
        for axis in group.axes
    }


def to_mergekit(spec: PermutationSpec, *, embeddings: Sequence[str] = ()) -> dict[str, Any]:
    """Write the spec as a mergekit architecture without templates.

    Args:
        spec: the spec.
        embeddings: names of the (vocabulary, hidden) tables.

    Raises:
        ValueError: a group moves a part of a dimension.
    """
    _plain(spec, "mergekit's form")
    weights = []
    for parameter, shape in spec.shapes.items():
        spaces = {axis.dim: group for axis, group in spec.axes_of(parameter)}
        weight: dict[str, Any] = {"name": parameter}
        if parameter in embeddings:
            weight |= {"is_embed": True, "output_space": spaces.get(1)}
        elif len(shape) == 1:
            weight |= {"input_space": spaces.get(0), "output_space": spaces.get(0)}
        else:
            weight |= {"input_space": spaces.get(1), "output_space": spaces.get(0)}
        weights.append({k: v for k, v in weight.items() if v is not None})
    return {
        "model_type": "", "architectures": [], "pre_weights": weights, "post_weights": [],
        "layer_templates": {"weights": []},
    }  # fmt: skip
