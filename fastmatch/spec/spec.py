"""The data a structure is described by: which axes of which parameters move together.

A *group* is a set of hidden units that must be permuted together; an :class:`Axis` says where the units
lie inside one dimension of one parameter. Everything else in the package (gains, apply, verify, files)
reads these classes; :mod:`fastmatch.spec.trace` makes them from a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch

__all__ = ["Axis", "Group", "PermutationSpec", "Permutations", "Pin", "Tap"]

Permutations: TypeAlias = dict[str, torch.Tensor]
"""Group name -> LongTensor of shape (group size,), on the CPU; ``new_b[i] = b[perm[i]]``."""


@dataclass(frozen=True, order=True)
class Axis:
    """Where one group's units lie along one dimension of one parameter (or buffer).

    Unit ``i`` of a group of ``size`` occupies the positions
    ``start + o * stride + i * inner + k`` for ``o < outer`` and ``k < inner``. The plain case
    (``start=0, outer=1, inner=1``) is a dimension whose length is the group's size. ``inner`` is the
    block of a flatten (49 for 512x7x7), ``start`` the segment of a concatenation, ``outer`` and
    ``stride`` a factor that repeats in front (groups of a grouped convolution, heads).
    """

    parameter: str
    dim: int
    start: int = 0
    outer: int = 1
    stride: int = 0
    inner: int = 1

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
        return self.start == 0 and self.outer == 1 and self.inner == 1 and size == length

    def label(self) -> str:
        """Short form for tables: ``fc.weight:1`` or ``fc.weight:1[0+49]``."""
        text = f"{self.parameter}:{self.dim}"
        if self.start or self.inner > 1 or self.outer > 1:
            text += f"[start {self.start}"
            text += f", block {self.inner}" if self.inner > 1 else ""
            text += f", {self.outer} times every {self.stride}" if self.outer > 1 else ""
            text += "]"
        return text


@dataclass(frozen=True)
class Group:
    """Hidden units that move together: ``size`` units at every one of ``axes``."""

    name: str
    size: int
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Tap:
    """A place in the forward pass where a group's activations can be read.

    Taps are found by the running number of the ATen operation in the traced forward pass, so they do
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
        taps: where activations can be read; empty for a spec that was not traced.
    """

    groups: dict[str, Group]
    shapes: dict[str, tuple[int, ...]]
    pins: tuple[Pin, ...] = ()
    taps: tuple[Tap, ...] = ()
    _by_parameter: dict[str, tuple[tuple[Axis, str], ...]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        table: dict[str, list[tuple[Axis, str]]] = {}
        for name, group in self.groups.items():
            if name != group.name:
                raise ValueError(f"groups: key {name!r} does not match the group's own name {group.name!r}")
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
        cls, model: torch.nn.Module, example_inputs: Any, *, kwargs: Mapping[str, Any] | None = None
    ) -> PermutationSpec:
        """The spec of ``model``, from the ATen operations it runs on ``example_inputs``.

        Example:
            >>> spec = PermutationSpec.trace(model, torch.randn(2, 3, 32, 32))

        Args:
            model: any torch module; it is run once in eval mode without gradients and left as it was.
            example_inputs: a tensor, or a tuple of positional inputs. A batch of 2 is enough.
            kwargs: keyword inputs.

        Raises:
            ValueError: the model has no parameters, or does not run on the example.
        """
        from fastmatch.spec.trace import trace

        try:
            return trace(model, example_inputs, kwargs=kwargs)
        except RuntimeError as error:
            raise ValueError(f"example_inputs: the model does not run on them ({error})") from error

    def axes_of(self, parameter: str) -> tuple[tuple[Axis, str], ...]:
        """Every (axis, group name) of one parameter; empty when nothing moves in it."""
        return self._by_parameter.get(parameter, ())

    def neighbours(self, group: str) -> set[str]:
        """The groups that share a parameter with ``group``, without itself."""
        names = {g for axis in self.groups[group].axes for _, g in self.axes_of(axis.parameter)}
        return names - {group}

    def select(self, names: list[str] | tuple[str, ...]) -> PermutationSpec:
        """The same spec with only the named groups free to move."""
        missing = [n for n in names if n not in self.groups]
        if missing:
            raise ValueError(f"groups: {missing} not in the spec; it has {list(self.groups)}")
        keep = {n: self.groups[n] for n in self.groups if n in set(names)}
        return replace(self, groups=keep, taps=tuple(t for t in self.taps if t.group in keep))

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
                "groups": [
                    {"name": g.name, "size": g.size, "axes": [_axis_to_list(a) for a in g.axes]}
                    for g in self.groups.values()
                ],
                "shapes": {k: list(v) for k, v in self.shapes.items()},
                "pins": [[p.parameter, p.dim, p.reason] for p in self.pins],
                "taps": [
                    [t.op, t.op_name, t.role, t.operand, t.group, _axis_to_list(t.axis)] for t in self.taps
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
                g["name"]: Group(g["name"], int(g["size"]), tuple(Axis(*a) for a in g["axes"]))
                for g in data["groups"]
            }
            shapes = {k: tuple(int(n) for n in v) for k, v in data["shapes"].items()}
            pins = tuple(Pin(*p) for p in data["pins"])
            taps = tuple(Tap(*[*t[:5], Axis(*t[5])]) for t in data["taps"])
        except (KeyError, TypeError, IndexError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a fastmatch spec: {error!r}") from error
        return cls(groups, shapes, pins, taps)

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


def _axis_to_list(a: Axis) -> list[Any]:
    return [a.parameter, a.dim, a.start, a.outer, a.stride, a.inner]
