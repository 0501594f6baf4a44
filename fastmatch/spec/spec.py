"""The structure of a network: which axes of which parameters move together.

The classes here are read by everything else in the package: gains, apply, verify, files. This module imports the
tracer, and the tracer returns plain parts (:class:`fastmatch.spec.grouping.Found`), so that the two form no cycle.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastmatch._internal.checks import check_choice, check_integer, check_type
from fastmatch._internal.json_files import parse_json
from fastmatch.spec.axes import ActivationSite, Axis, Group, Permutations, Pin
from fastmatch.spec.running import examples_that_run
from fastmatch.spec.trace import Outputs, trace
from fastmatch.spec.unread import Unread, check_unread, hold_groups

__all__ = ["PermutationSpec"]

FORMAT = "fastmatch-spec-1"


@dataclass(frozen=True)
class PermutationSpec:
    """Which axes of a network's parameters move together.

    Attributes:
        groups: group name -> :class:`Group`, in the order in which the forward pass meets them.
        shapes: parameter or buffer name -> shape, for every tensor of the state dict.
        pins: dimensions that no group moves, with the reason.
        sites: where activations can be read; empty for a spec that was not traced.

    Raises:
        ValueError: a group does not match its key, its parameters or their shapes.
    """

    groups: dict[str, Group]
    shapes: dict[str, tuple[int, ...]]
    pins: tuple[Pin, ...] = ()
    sites: tuple[ActivationSite, ...] = ()
    _by_parameter: dict[str, tuple[tuple[Axis, str], ...]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )
    _subgroups: dict[tuple[str, int], tuple[str, ...]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        table: dict[str, list[tuple[Axis, str]]] = {}
        for name, group in self.groups.items():
            if name != group.name:
                raise ValueError(f"groups: key {name!r} does not match the group's own name {group.name!r}")
            if group.within:
                outer = self.groups.get(group.within)
                if outer is None:
                    raise ValueError(f"groups: {name!r} is within {group.within!r}, which is not a group")
                if outer.within or not 0 <= group.block < outer.size:
                    raise ValueError(
                        f"groups: {name!r} is in unit {group.block} of {group.within!r}, which has no such unit "
                        "or is within another group itself"
                    )
            for axis in group.axes:
                self._check_axis(group, axis)
                table.setdefault(axis.parameter, []).append((axis, name))
        self._by_parameter.update({k: tuple(v) for k, v in table.items()})
        self._subgroups.update(_families_of(self.groups))

    def __hash__(self) -> int:
        """A hash of the groups, whatever their order; the shapes and pins of two specs seldom differ alone."""
        return hash(frozenset(self.groups.items()))

    def _check_axis(self, group: Group, axis: Axis) -> None:
        shape = self.shapes.get(axis.parameter)
        if shape is None:
            raise ValueError(
                f"groups: {group.name!r} names parameter {axis.parameter!r}, which is not among the spec's shapes"
            )
        if not 0 <= axis.dim < len(shape) or not axis.fits(group.size, shape[axis.dim]):
            raise ValueError(
                f"groups: {group.name!r} of {group.size} units does not fit {axis.label()} of shape {shape}"
            )
        if any(dim >= len(shape) or start + length > shape[dim] for dim, start, length in axis.at):
            raise ValueError(
                f"groups: {group.name!r} is in {axis.label()}, which shape {shape} does not have"
            )

    @classmethod
    def trace(
        cls,
        model: torch.nn.Module,
        example_inputs: Any,
        *,
        kwargs: Mapping[str, Any] | None = None,
        outputs: Outputs = None,
        unread: Unread = "refuse",
    ) -> PermutationSpec:
        """Find the groups of ``model`` from the ATen operations of one forward pass, and of those that branches lead to.

        Example:
            >>> spec = fm.PermutationSpec.trace(model_a, x)
            >>> all(group.size > 1 for group in spec.groups.values())
            True

        Args:
            model: any torch module. It runs in eval mode without gradients and is left as it was: once, and again for
                every other answer to a question that Python asks of a tensor, such as ``if h.norm() > 2``.
            example_inputs: a tensor, a tuple of positional inputs, a mapping of keyword inputs, or several of
                these as :class:`Examples`, for a model that takes other branches on other inputs. A batch of 2 is
                enough.
            kwargs: keyword inputs.
            outputs: which of the model's outputs keep their order, by attribute or key (``["logits"]``), or a
                function that chooses the names from what the model returned. Default: all outputs, including
                hidden states that some models return in addition to the logits.
            unread: what to do about parameters that the model did not read on the examples, but may read on other
                inputs. ``"refuse"`` raises an error that names them; ``"hold"`` keeps every group in place that has
                room in one of them; ``"ignore"`` is for parameters that no forward pass reads.

        Raises:
            TypeError: ``model`` is not a torch module, or it is a TorchScript module.
            ValueError: the model has no parameters, does not run on the example, has no such output, or did not
                read parameters that could share a group.

        Warns:
            UserWarning: the model takes more paths than were followed.
        """
        check_choice("unread", unread, Unread)
        with examples_that_run():
            found = trace(model, example_inputs, kwargs=kwargs, outputs=outputs)
        if unread == "refuse":
            check_unread(found.groups, found.unread)
        spec = cls(found.groups, found.shapes, found.pins, found.sites)
        if unread == "hold" and found.unread:
            kept, pins = hold_groups(found.groups, found.unread)
            spec = replace(spec.select(kept), pins=(*found.pins, *pins))
        return spec

    def axes_of(self, parameter: str) -> tuple[tuple[Axis, str], ...]:
        """Return every (axis, group name) of one parameter; empty if no group moves it."""
        return self._by_parameter.get(parameter, ())

    def has_slices(self, parameter: str) -> bool:
        """Whether some group moves only a slice of the parameter."""
        return any(axis.at for axis, _ in self.axes_of(parameter))

    def neighbours(self, group: str) -> set[str]:
        """Return the other groups that share a parameter with ``group``."""
        names = {g for axis in self.groups[group].axes for _, g in self.axes_of(axis.parameter)}
        return names - {group}

    def subgroups(self) -> dict[tuple[str, int], tuple[str, ...]]:
        """Return (outer group, running number) -> its subgroups, one for each outer unit, in order.

        A group of heads may have several such families: the channels of its query heads, those of its values.
        """
        return dict(self._subgroups)

    def top_level(self) -> list[str]:
        """Return the groups that are not within another."""
        return [name for name, group in self.groups.items() if not group.within]

    def residual(self) -> tuple[str, ...]:
        """Return the residual streams: groups that several layers with different inputs write to.

        They are found from ``sites``, so there are none in a spec that was not traced.
        """
        consumed: dict[int, set[str]] = {}
        produced: dict[str, set[int]] = {}
        for site in self.sites:
            if site.role == "consumed":
                consumed.setdefault(site.op, set()).add(site.group)
            elif site.role == "produced":
                produced.setdefault(site.group, set()).add(site.op)
        outer = {group.within for group in self.groups.values()}
        return tuple(
            name
            for name, group in self.groups.items()
            if not group.within
            and name not in outer
            and len({frozenset(consumed.get(op, ())) for op in produced.get(name, ())}) > 1
        )

    def without_residual(self) -> PermutationSpec:
        """Return the spec in which residual streams keep their order.

        Example:
            >>> spec = fm.PermutationSpec.trace(model_a, x).without_residual()
        """
        streams = self.residual()
        return self.select([name for name in self.groups if name not in streams])

    def flat(self) -> PermutationSpec:
        """Return the spec without the groups that contain subgroups; the subgroups become top-level groups.

        For methods that cannot solve outer groups and subgroups together.
        """
        outer = {group.within for group in self.groups.values()}
        return self.select([name for name in self.groups if name not in outer])

    def select(self, names: Sequence[str]) -> PermutationSpec:
        """Return the spec in which only the named groups move.

        Raises:
            ValueError: a name is not a group of the spec.
        """
        if isinstance(names, str):
            raise TypeError(f"names: expected a list of groups' names, such as [{names!r}]; got one text")
        if not isinstance(names, Iterable):
            raise TypeError(f"names: expected a list of groups' names, got {type(names).__name__}")
        names = list(names)
        missing = [n for n in names if n not in self.groups]
        if missing:
            raise ValueError(f"names: {missing} not in the spec; it has {list(self.groups)}")
        wanted = set(names)
        keep = {n: group for n, group in self.groups.items() if n in wanted}
        complete = {
            name
            for (outer, _), family in self.subgroups().items()
            if outer in keep and keep.keys() >= set(family)
            for name in family
        }
        keep = {n: g if n in complete else replace(g, within="", block=-1) for n, g in keep.items()}
        return replace(self, groups=keep, sites=tuple(s for s in self.sites if s.group in keep))

    def identity(self) -> Permutations:
        """Return the permutations that change nothing."""
        return {name: torch.arange(g.size, device="cpu") for name, g in self.groups.items()}

    def random(self, generator: torch.Generator | None = None) -> Permutations:
        """Return a random permutation for every group."""
        return {
            name: torch.randperm(g.size, generator=generator, device="cpu") for name, g in self.groups.items()
        }

    def to_json(self) -> str:
        """Return the spec as text, which :meth:`from_json` reads."""
        return json.dumps(
            {
                "format": FORMAT,
                "groups": [_group_to_dict(g) for g in self.groups.values()],
                "shapes": {k: list(v) for k, v in self.shapes.items()},
                "pins": [[p.parameter, p.dim, p.reason] for p in self.pins],
                "sites": [_site_to_list(s) for s in self.sites],
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> PermutationSpec:
        """Read the text that :meth:`to_json` wrote.

        Example:
            >>> spec = fm.PermutationSpec.trace(model_a, x)
            >>> fm.PermutationSpec.from_json(spec.to_json()) == spec
            True

        Raises:
            ValueError: the text is not a spec.
        """
        try:
            data = parse_json(text)
            if data["format"] != FORMAT:
                raise ValueError(f"unknown format {data['format']!r}")
            groups = {g["name"]: _group_from_dict(g) for g in data["groups"]}
            if len(groups) < len(data["groups"]):
                raise ValueError("a group is there twice")
            shapes = {k: tuple(_size(n) for n in v) for k, v in data["shapes"].items()}
            pins = tuple(_pin_from_list(p, shapes) for p in data["pins"])
            sites = tuple(_site_from_list(s) for s in data["sites"])
            return cls(groups, shapes, pins, sites)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise ValueError(f"not a fastmatch spec: {error!r}") from error

    def table(self) -> str:
        """Return the groups with their sizes and axes, and the pinned axes with the reasons, as text."""
        width = max([5, *(len(n) for n in self.groups)])
        lines = [f"{'group':<{width}}  {'size':>7}  (parameter, axis)"]
        for g in self.groups.values():
            axes = ", ".join(a.label() for a in g.axes)
            lines.append(f"{g.name:<{width}}  {g.size:>7}  {axes}")
        if self.pins:
            lines += ["", "pinned"]
            lines += [
                f"  {p.parameter}:{p.dim} of {self.shapes[p.parameter][p.dim]}: {p.reason}" for p in self.pins
            ]
        return "\n".join(lines)


def _size(value: Any) -> int:
    """Return a size or position; no fraction, and nothing that torch cannot count to."""
    check_integer("size", value)
    if value >= 1 << 62:
        raise ValueError(f"size: {value} is too large")
    return value


def _text(value: Any) -> str:
    check_type("name", value, str)
    return value


def _group_to_dict(g: Group) -> dict[str, Any]:
    table = {"name": g.name, "size": g.size, "axes": [_axis_to_list(a) for a in g.axes]}
    return {**table, "within": [g.within, g.block]} if g.within else table


def _group_from_dict(table: dict[str, Any]) -> Group:
    axes = tuple(_axis_from_list(a) for a in table["axes"])
    outer = (
        [(_text(name), _size(block)) for name, block in [table["within"]]]
        if "within" in table
        else [("", -1)]
    )
    return Group(_text(table["name"]), _size(table["size"]), axes, *outer[0])


def _pin_from_list(values: list[Any], shapes: Mapping[str, tuple[int, ...]]) -> Pin:
    parameter, dim, reason = values
    if _size(dim) >= len(shapes[parameter]):
        raise ValueError(f"pins: {parameter!r} has no dimension {dim}")
    return Pin(parameter, dim, _text(reason))


def _site_to_list(s: ActivationSite) -> list[Any]:
    what = [s.op, s.op_name, s.role, s.operand, s.group, _axis_to_list(s.axis)]
    return [*what, s.module, s.weight, s.call, s.rank, *([True] if s.chosen else [])]


def _site_from_list(values: list[Any]) -> ActivationSite:
    op, op_name, role, operand, group, axis, module, weight, call, rank, *chosen = values
    if operand != -1:
        _size(operand)
    what = _size(op), _text(op_name), role, operand, _text(group), _axis_from_list(axis)
    return ActivationSite(*what, _text(module), _text(weight), _size(call), _size(rank), chosen == [True])


def _axis_to_list(a: Axis) -> list[Any]:
    plain = [a.parameter, a.dim, a.start, a.outer, a.stride, a.inner]
    return [*plain, [list(x) for x in a.at]] if a.at else plain


def _axis_from_list(values: list[Any]) -> Axis:
    at = tuple((_size(dim), _size(start), _size(length)) for dim, start, length in (values[6:] or [[]])[0])
    parameter, dim, start, outer, stride, inner = values[:6]
    return Axis(_text(parameter), _size(dim), _size(start), _size(outer), _size(stride), _size(inner), at=at)


def _families_of(groups: Mapping[str, Group]) -> dict[tuple[str, int], tuple[str, ...]]:
    """Return what :meth:`PermutationSpec.subgroups` does."""
    found: dict[tuple[str, int], list[str]] = {}
    counts: dict[str, int] = {}
    for name, group in groups.items():
        if group.within:
            counts[group.within] = counts.get(group.within, 0) + (group.block == 0)
            found.setdefault((group.within, counts[group.within] - 1), []).append(name)
    return {key: tuple(names) for key, names in found.items()}
