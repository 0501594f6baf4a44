"""Where hidden units are: axes of parameters, groups of axes that move together, sites of activations, pins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from fastmatch._internal.checks import check_choice, check_integer

__all__ = ["ActivationSite", "Axis", "Group", "Permutations", "Pin", "Role", "UnreadAxis"]

Permutations: TypeAlias = dict[str, torch.Tensor]
"""Group name -> LongTensor of shape (group size,), on the CPU; ``new_b[i] = b[perm[i]]``."""

Role: TypeAlias = Literal["produced", "activation", "consumed", "value"]
"""What an :class:`ActivationSite` reads; ``"value"`` names a node of a traced graph."""


@dataclass(frozen=True, order=True)
class Axis:
    """The positions of one group's units along one dimension of one parameter (or buffer).

    Unit ``i`` of a group of ``size`` occupies the positions
    ``start + o * stride + i * inner + k`` for ``o < outer`` and ``k < inner``.

    Example:
        >>> axis = fm.Axis("fc.weight", 1, inner=49)  # the flatten of (channels, 7, 7)
        >>> axis.positions(512).shape
        torch.Size([1, 512, 49])

    Attributes:
        parameter: name in the state dict; empty for the axis of an activation tensor.
        dim: dimension of the parameter.
        start: first position; the offset of a segment in a concatenation.
        outer: number of repeats of the whole group (groups of a grouped convolution, heads).
        stride: distance between two repeats, in positions.
        inner: positions per unit, next to each other (49 for a flatten of 512 x 7 x 7).
        at: (dimension, start, length) of other dimensions. The units are only in that slice of the tensor:
            the hidden units of one expert, in a tensor that stacks the experts.

    Raises:
        ValueError: a number is negative, ``outer`` or ``inner`` is less than 1, or one is not a whole number.
    """

    parameter: str
    dim: int
    start: int = 0
    outer: int = 1
    stride: int = 0
    inner: int = 1
    at: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        for name in ("dim", "start", "stride"):
            check_integer(name, getattr(self, name))
        for name in ("outer", "inner"):
            check_integer(name, getattr(self, name), least=1)

    def slice_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a view of the part of ``tensor`` that holds the units; all of it without ``at``.

        The view has as many dimensions as ``tensor``.
        """
        for dim, start, length in self.at:
            tensor = tensor.narrow(dim, start, length)
        return tensor

    def positions(self, size: int) -> torch.Tensor:
        """Return the positions of every unit along the dimension, a LongTensor (outer, size, inner)."""
        o = torch.arange(self.outer, device="cpu")[:, None, None] * self.stride
        i = torch.arange(size, device="cpu")[None, :, None] * self.inner
        k = torch.arange(self.inner, device="cpu")[None, None, :]
        return self.start + o + i + k

    def fits(self, size: int, length: int) -> bool:
        """Whether a group of ``size`` units stays inside a dimension of ``length``, without a position in two units."""
        last = self.start + (self.outer - 1) * self.stride + size * self.inner
        apart = self.outer == 1 or self.stride >= size * self.inner
        return self.start >= 0 and self.inner >= 1 and self.outer >= 1 and apart and last <= length

    def is_whole(self, size: int, length: int) -> bool:
        """Whether the group fills the whole dimension with one position per unit."""
        return self.start == 0 and self.outer == 1 and self.inner == 1 and size == length and not self.at

    def label(self) -> str:
        """Return a short form for tables, such as ``fc.weight:1``."""
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
    """Hidden units that are permuted together: ``size`` units on every one of ``axes``.

    A *subgroup* has ``within`` and ``block``: its units are inside one unit of another group, as the channels inside
    a head. Its permutation applies after the outer group has moved: block ``i`` of the result is block ``outer[i]``
    of the model, with its units in the order of the subgroup's permutation.

    Attributes:
        name: unique in the spec.
        size: number of units.
        axes: where the units are.
        within: name of the outer group; empty for a top-level group.
        block: unit of the outer group that holds these units; -1 for a top-level group.

    Raises:
        ValueError: ``size`` is not a whole number of at least 1.
    """

    name: str
    size: int
    axes: tuple[Axis, ...]
    within: str = ""
    block: int = -1

    def __post_init__(self) -> None:
        check_integer("size", self.size, least=1)


@dataclass(frozen=True)
class ActivationSite:
    """A place in the forward pass where a group's activations can be read.

    A site is found again by what its operation belongs to: the module that runs it, and the parameter that it reads or
    that was the last on the way of its operand. So another pass may run other operations elsewhere.

    Attributes:
        op: running number of the ATen operation in the traced forward pass; sites are ordered by it.
        op_name: name of the operation (``aten.relu``).
        role: ``"produced"`` (output of the product or convolution whose weight carries the units),
            ``"activation"`` (an elementwise nonlinearity: its input is "pre", its output "post"), or
            ``"consumed"`` (input of the product or convolution that contracts the units).
        operand: position of the activation tensor among the operation's positional arguments
            (``activation``, ``consumed``); -1 for ``produced``, which reads the output.
        group: name of the group.
        axis: where the units are in that tensor (``axis.parameter`` is empty).
        module, weight, call: see :class:`fastmatch.spec.spots.Spot`.
        rank: number of dimensions of that tensor in the traced pass.
        chosen: whether the network itself chooses the samples there, as a router chooses the tokens of an expert. Then those of
            two networks are not the same ones.
    """

    op: int
    op_name: str
    role: Role
    operand: int
    group: str
    axis: Axis
    module: str = ""
    weight: str = ""
    call: int = 0
    rank: int = 0
    chosen: bool = False

    def __post_init__(self) -> None:
        check_choice("role", self.role, Role)


@dataclass(frozen=True)
class Pin:
    """A dimension that no group moves, and the reason (``"model output"``, ``"aten.sort"``)."""

    parameter: str
    dim: int
    reason: str


@dataclass(frozen=True)
class UnreadAxis:
    """Positions along dimension ``dim`` of a parameter that no traced operation read; ``size`` of them."""

    parameter: str
    dim: int
    size: int
