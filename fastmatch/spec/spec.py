"""The data a structure is described by: which axes of which parameters move together.

A *group* is a set of hidden units that must be permuted together; an :class:`Axis` says where the units
lie inside one dimension of one parameter. Everything else in the package (gains, apply, verify, files)
reads these classes; :mod:`fastmatch.spec.trace` makes them from a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch

__all__ = ["ActivationSite", "Axis", "Group", "PermutationSpec", "Permutations", "Pin"]

Permutations: TypeAlias = dict[str, torch.Tensor]
"""Group name -> LongTensor of shape (group size,), on the CPU; ``new_b[i] = b[perm[i]]``."""


@dataclass(frozen=True, order=True)
class Axis:
    """Where one group's units lie along one dimension of one parameter (or buffer).

    Unit ``i`` of a group of ``size`` occupies the positions
    ``start + o * stride + i * inner + k`` for ``o < outer`` and ``k < inner``. The plain case
    (``start=0, outer=1, inner=1``) is a dimension whose length is the group's size. ``inner`` is the
    block of a flatten (49 for 512x7x7), ``start`` the segment of a concatenation, ``outer`` and
    ``stride`` a factor that repeats in front (groups of a grouped convolution, heads). ``at`` holds
    (dimension, start, length) of other dimensions: the units lie only in that slice of the tensor
    (the hidden units of one expert, in a tensor that stacks all experts').
    """

    parameter: str
    dim: int
    start: int = 0
    outer: int = 1
    stride: int = 0
    inner: int = 1
    at: tuple[tuple[int, int, int], ...] = ()

    def slice_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of the parameter that the units lie in: a view with as many dimensions, the whole without ``at``."""
        for dim, start, length in self.at:
            tensor = tensor.narrow(dim, start, length)
        return tensor

    def positions(self, size: int) -> torch.Tensor:
        """LongTensor (outer, size, inner): the positions of every unit along the dimension."""
        o = torch.arange(self.outer)[:, None, None] * self.stride
        i = torch.arange(size)[None, :, None] * self.inner
        k = torch.arange(self.inner)[None, None, :]
        return self.start + o + i + k

    def fits(self, size: int, length: int) -> bool:
        """Whether a group of ``size`` units stays inside a dimension of ``length``."""
        last = self.start + (self.outer - 1) * self.stride + size * self.inner
        return self.start >= 0 and self.inner >= 1 and self.outer >= 1 and last <= length

    def is_whole(self, size: int, length: int) -> bool:
        """Whether the group is the whole dimension, one position a unit."""
        return self.start == 0 and self.outer == 1 and self.inner == 1 and size == length and not self.at

    def label(self) -> str:
        """Short form for tables: ``fc.weight:1`` or ``fc.weight:1[0+49]``."""
        text = f"{self.parameter}:{self.dim}"
        if self.start or self.inner > 1 or self.outer > 1:
            text += f"[start {self.start}"
            text += f", block {self.inner}" if self.inner > 1 else ""
            text += f", {self.outer} times every {self.stride}" if self.outer > 1 else ""
            text += "]"
        for dim, start, length in self.at:
            text += f" in {start}:{start + length} of axis {dim}"
        return text


@dataclass(frozen=True)
class Group:
    """Hidden units that move together: ``size`` units at every one of ``axes``.

    With ``within``, the units lie inside unit ``block`` of that group: channels inside a head. Their permutation is
    that of what lies there *after* the outer group has moved: block ``i`` of the result is block ``outer[i]`` of
    the model, its units in the order of this group's permutation.
    """

    name: str
    size: int
    axes: tuple[Axis, ...]
    within: str = ""
    block: int = -1


@dataclass(frozen=True)
class ActivationSite:
    """A place in the forward pass where a group's activations can be read.

    Sites are found by the running number of the ATen operation in the traced forward pass, so they do
    not depend on how the model is cut into modules.

    Attributes:
        op: running number of the ATen operation among all operations of one forward pass.
        op_name: its name (``aten.relu.default``), checked when data is read.
        role: ``"produced"`` (output of the matmul or convolution whose weight carries the units),
            ``"activation"`` (an elementwise nonlinearity: input = before, output = after), or
            ``"consumed"`` (the activations entering the matmul or convolution that contracts the units).
        operand: position of the activation tensor among the operation's positional arguments
            (``activation``, ``consumed``); -1 for ``produced``, which reads the output.
        group: the group's name.
        axis: where the units lie in that tensor (``axis.parameter`` is empty).
    """

    op: int
    op_name: str
    role: str
    operand: int
    group: str
    axis: Axis


@dataclass(frozen=True)
class Pin:
    """A dimension that stays as it is, and why (``"model output"``, ``"aten.sort.default"``)."""

    parameter: str
    dim: int
    reason: str


@dataclass(frozen=True)
class PermutationSpec:
    """Which axes of a network's parameters move together.

    Attributes:
        groups: group name -> :class:`Group`, in the order in which the forward pass meets them.
        shapes: parameter or buffer name -> shape, for every tensor of the state dict.
        pins: dimensions that no group moves, with the reason.
        sites: where activations can be read; empty for a spec that was not traced.
    """

    groups: dict[str, Group]
    shapes: dict[str, tuple[int, ...]]
    pins: tuple[Pin, ...] = ()
    sites: tuple[ActivationSite, ...] = ()
    _by_parameter: dict[str, tuple[tuple[Axis, str], ...]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        table: dict[str, list[tuple[Axis, str]]] = {}
        for name, group in self.groups.items():
            if name != group.name:
                raise ValueError(f"groups: key {name!r} does not match the group's own name {group.name!r}")
            if group.within and group.within not in self.groups:
                raise ValueError(f"group {name!r} lies within {group.within!r}, which is no group")
            for axis in group.axes:
                shape = self.shapes.get(axis.parameter)
                if shape is None:
                    raise ValueError(
                        f"group {name!r} names parameter {axis.parameter!r}, which is not among the spec's shapes"
                    )
                if not 0 <= axis.dim < len(shape) or not axis.fits(group.size, shape[axis.dim]):
                    raise ValueError(
                        f"group {name!r} of {group.size} units does not fit {axis.label()} of shape {shape}"
                    )
                table.setdefault(axis.parameter, []).append((axis, name))
        self._by_parameter.update({k: tuple(v) for k, v in table.items()})

    @classmethod
    def trace(
        cls,
        model: torch.nn.Module,
        example_inputs: Any,
        *,
        kwargs: Mapping[str, Any] | None = None,
        outputs: Sequence[str] | None = None,
    ) -> PermutationSpec:
        """The spec of ``model``, from the ATen operations it runs on ``example_inputs``.

        Example:
            >>> spec = PermutationSpec.trace(model, torch.randn(2, 3, 32, 32))

        Args:
            model: any torch module; it is run once in eval mode without gradients and left as it was.
            example_inputs: a tensor, or a tuple of positional inputs. A batch of 2 is enough.
            kwargs: keyword inputs.
            outputs: which of the model's outputs are held in place, by attribute or key (``["logits"]``); all of
                them where left out, the hidden states that some models return beside them included.

        Raises:
            ValueError: the model has no parameters, does not run on the example, or returns no such output.
        """
        from fastmatch.spec.trace import trace

        try:
            return trace(model, example_inputs, kwargs=kwargs, outputs=outputs)
        except RuntimeError as error:
            raise ValueError(f"example_inputs: the model does not run on them ({error})") from error

    def axes_of(self, parameter: str) -> tuple[tuple[Axis, str], ...]:
        """Every (axis, group name) of one parameter; empty when nothing moves in it."""
        return self._by_parameter.get(parameter, ())

    def has_slices(self, parameter: str) -> bool:
        """Whether some group moves in a slice of the parameter only."""
        return any(axis.at for axis, _ in self.axes_of(parameter))

    def neighbours(self, group: str) -> set[str]:
        """The groups that share a parameter with ``group``, without itself."""
        names = {g for axis in self.groups[group].axes for _, g in self.axes_of(axis.parameter)}
        return names - {group}

    def subgroups(self) -> dict[tuple[str, int], tuple[str, ...]]:
        """(outer group, running number) -> the groups within it, one for each of its units, in order.

        A group of heads may have several families: its query heads' channels, its value channels.
        """
        found: dict[tuple[str, int], list[str]] = {}
        counts: dict[str, int] = {}
        for name, group in self.groups.items():
            if group.within:
                counts[group.within] = counts.get(group.within, 0) + (group.block == 0)
                found.setdefault((group.within, counts[group.within] - 1), []).append(name)
        return {key: tuple(names) for key, names in found.items()}

    def top_level(self) -> list[str]:
        """The groups that lie within no other."""
        return [name for name, group in self.groups.items() if not group.within]

    def residual(self) -> tuple[str, ...]:
        """The groups that several layers with different inputs write to: residual streams, tied through all of them.

        Read from the sites, so empty for a spec that was not traced.
        """
        consumed: dict[int, set[str]] = {}
        produced: dict[str, set[int]] = {}
        for site in self.sites:
            if site.role == "consumed":
                consumed.setdefault(site.op, set()).add(site.group)
            elif site.role == "produced":
                produced.setdefault(site.group, set()).add(site.op)
        holding = {group.within for group in self.groups.values()}
        return tuple(
            name
            for name, group in self.groups.items()
            if not group.within
            and name not in holding
            and len({frozenset(consumed.get(op, ())) for op in produced.get(name, ())}) > 1
        )

    def without_residual(self) -> PermutationSpec:
        """Return the same spec with the residual streams held in place; they move nearly every weight at once."""
        residual = set(self.residual())
        return self.select([name for name in self.groups if name not in residual])

    def flat(self) -> PermutationSpec:
        """Without groups that hold others: what lies within them moves where it is, for methods that solve no pairs."""
        outer = {group.within for group in self.groups.values()}
        return self.select([name for name in self.groups if name not in outer])

    def select(self, names: list[str] | tuple[str, ...]) -> PermutationSpec:
        """The same spec with only the named groups free to move."""
        missing = [n for n in names if n not in self.groups]
        if missing:
            raise ValueError(f"groups: {missing} not in the spec; it has {list(self.groups)}")
        keep = {n: self.groups[n] for n in self.groups if n in set(names)}
        whole = {
            member
            for (outer, _), family in self.subgroups().items()
            if outer in keep and keep.keys() >= set(family)
            for member in family
        }
        keep = {n: g if n in whole else replace(g, within="", block=-1) for n, g in keep.items()}
        return replace(self, groups=keep, sites=tuple(t for t in self.sites if t.group in keep))

    def identity(self) -> Permutations:
        """The permutations that change nothing."""
        return {name: torch.arange(g.size) for name, g in self.groups.items()}

    def random(self, generator: torch.Generator | None = None) -> Permutations:
        """A random permutation for every group."""
        return {name: torch.randperm(g.size, generator=generator) for name, g in self.groups.items()}

    def to_json(self) -> str:
        """A text form that :meth:`from_json` reads back."""
        return json.dumps(
            {
                "format": "fastmatch-spec-1",
                "groups": [_group_to_dict(g) for g in self.groups.values()],
                "shapes": {k: list(v) for k, v in self.shapes.items()},
                "pins": [[p.parameter, p.dim, p.reason] for p in self.pins],
                "sites": [
                    [t.op, t.op_name, t.role, t.operand, t.group, _axis_to_list(t.axis)] for t in self.sites
                ],
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> PermutationSpec:
        """The spec that :meth:`to_json` wrote; ValueError when the text is something else."""
        try:
            data = json.loads(text)
            if data["format"] != "fastmatch-spec-1":
                raise ValueError(f"unknown format {data['format']!r}")
            groups = {
                g["name"]: Group(
                    g["name"],
                    int(g["size"]),
                    tuple(_axis_from_list(a) for a in g["axes"]),
                    *g.get("within", ()),
                )
                for g in data["groups"]
            }
            shapes = {k: tuple(int(n) for n in v) for k, v in data["shapes"].items()}
            pins = tuple(Pin(*p) for p in data["pins"])
            sites = tuple(ActivationSite(*[*t[:5], _axis_from_list(t[5])]) for t in data["sites"])
        except (KeyError, TypeError, IndexError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a fastmatch spec: {error!r}") from error
        return cls(groups, shapes, pins, sites)

    def table(self) -> str:
        """The groups, their sizes and axes, and what is pinned by which operation, as text."""
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


def _group_to_dict(g: Group) -> dict[str, Any]:
    table = {"name": g.name, "size": g.size, "axes": [_axis_to_list(a) for a in g.axes]}
    return {**table, "within": [g.within, g.block]} if g.within else table


def _axis_to_list(a: Axis) -> list[Any]:
    plain = [a.parameter, a.dim, a.start, a.outer, a.stride, a.inner]
    return [*plain, [list(x) for x in a.at]] if a.at else plain


def _axis_from_list(values: list[Any]) -> Axis:
    at = tuple((int(dim), int(start), int(length)) for dim, start, length in (values[6:] or [[]])[0])
    return Axis(*values[:6], at=at)
