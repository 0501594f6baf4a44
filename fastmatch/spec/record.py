"""What a traced forward pass shows: a label for every dimension of every tensor, and all that rules note."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fastmatch.spec.axes import Role
from fastmatch.spec.labels import (
    Label,
    find,
    has_segments,
    is_pinned,
    leaves,
    pin,
    product,
    segments,
    split_sum,
    sum_of,
    unify,
)
from fastmatch.spec.operations import Call
from fastmatch.spec.places import occurrences

__all__ = ["Joined", "RawSite", "Record", "Slice", "ValuesNeeded", "fresh", "storage_id"]


class ValuesNeeded(BaseException):
    """A trace needs numbers that it did not compute. No ``Exception``, so that models that catch those do not go on."""


def storage_id(tensor: torch.Tensor) -> int:
    """Return an identity of the memory behind a tensor, the same for all its views."""
    return tensor.untyped_storage()._cdata


def _view(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return where in its memory a tensor is."""
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def fresh(shape: Sequence[int], reason: str | None = None) -> list[Label]:
    """Return new labels; pinned if a reason is given."""
    return [Label(n, pinned=reason if n > 1 else None) for n in shape]


def _constant_label(tensor: torch.Tensor, dim: int) -> Label:
    if tensor.shape[dim] <= 1 or tensor._is_zerotensor():  # forward derivatives of constants have no memory
        return Label(tensor.shape[dim])
    first = tensor.detach().narrow(dim, 0, 1)
    uniform = bool((tensor.detach() == first).all())
    return Label(tensor.shape[dim], pinned=None if uniform else "constant")


@dataclass(frozen=True)
class RawSite:
    """An activation site before the groups are known: dimension ``dim`` of a tensor with ``labels``."""

    op: int
    op_name: str
    role: Role
    operand: int
    labels: tuple[Label, ...]
    dim: int
    spot: tuple[str, str, str, int] = ("", "", "", 0)


@dataclass(frozen=True)
class Slice:
    """``inside`` replaces ``leaf`` in the slice at ``position`` of the axis ``along``."""

    leaf: Label
    along: Label
    position: int
    inside: Label


@dataclass(frozen=True)
class Joined:
    """The labels of tensors that were put together along ``dim``; ``reason`` is the operation."""

    dim: int
    parts: tuple[tuple[Label, ...], ...]
    reason: str

    def unify(self) -> None:
        """Unite the parts' labels along all other dimensions."""
        first, *others = self.parts
        for part in others:
            for d, (mine, label) in enumerate(zip(first, part, strict=True)):
                if d != self.dim:
                    unify(mine, label, self.reason)


class Record:
    """The labels of every tensor seen, and the facts about them that operations have shown.

    Attributes:
        exchangeable: whether random numbers are alike at every position, as in training, where only their
            distribution counts. Otherwise each position has its own.
        real_values: whether the tensors hold what the model computes; False where products were left out.
        uncomputed: memories (by :func:`storage_id`) whose numbers were left out: see :mod:`fastmatch.spec.uncomputed`.
        sites: where activations can be read.
        slices: (leaf, along, position), by ids -> the slice.
        contractions: (label summed over, labels of the axes for which that happens separately).
    """

    def __init__(self, real_values: bool = True) -> None:
        self.real_values = real_values
        self.exchangeable = False
        self.uncomputed: set[int] = set()
        # Tensors are kept alive while tracing, so that their ids stay unique.
        self._labels: dict[int, tuple[torch.Tensor, list[Label]]] = {}
        self._data: set[int] = set()
        self._contracted: set[int] = set()
        self._sliced: set[int] = set()
        self._unread: dict[int, tuple[list[Label], str]] = {}
        self._joined: dict[int, Joined] = {}
        self._positions: dict[int, tuple[torch.Tensor, Label, bool]] = {}
        self._state: set[int] = set()
        self._learned: set[int] = set()
        self._level: set[int] = set()
        self._read: set[int] = set()
        self._followers: dict[int, list[Label]] = {}
        self._passes: dict[int, int] = {}
        self._pass = 0
        self._inputs: list[Label] = []
        self._counted: list[Label] = []
        self._empty: list[tuple[Label, Label]] = []
        self._chosen: list[Label] = []
        self._orders: list[Label] = []
        self.sites: list[RawSite] = []
        self.slices: dict[tuple[int, int, int], Slice] = {}
        self.contractions: list[tuple[Label, tuple[Label, ...]]] = []

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor already has labels."""
        return id(tensor) in self._labels

    def labels(self, tensor: torch.Tensor) -> list[Label]:
        """Return the labels of a tensor's dimensions; an unknown tensor is a constant, pinned unless uniform."""
        if not self.knows(tensor):
            self.set(tensor, self._unknown(tensor))
        if id(tensor) in self._unread:
            along, reason = self._unread.pop(id(tensor))
            for label in along:
                pin(label, reason)
        if id(tensor) in self._joined:
            self._joined.pop(id(tensor)).unify()
        return list(self._labels[id(tensor)][1])

    def _unknown(self, tensor: torch.Tensor) -> list[Label]:
        """Return labels for a tensor that no operation made: a constant, or known memory as another object.

        ``nn.Parameter(h)`` makes such an object.
        """
        if self.is_data(tensor) or self.is_state(tensor):
            shared = [(t, x) for t, x in self._labels.values() if storage_id(t) == storage_id(tensor)]
            for other, labels in shared:
                if _view(other) == _view(tensor):
                    return labels
            if shared:
                self.pin_memory(tensor, "another view of its memory")
                return fresh(tensor.shape, "another view of its memory")
        self.need_values(tensor, "a constant")
        return [_constant_label(tensor, d) for d in range(tensor.ndim)]

    def need_values(self, tensor: torch.Tensor, reader: str) -> None:
        """Raise ValuesNeeded if the numbers of a tensor, which ``reader`` asks for, were not computed."""
        if self.uncomputed and storage_id(tensor) in self.uncomputed:
            raise ValuesNeeded(reader)

    def set(self, tensor: torch.Tensor, labels: Sequence[Label]) -> None:
        """Give a tensor its labels, one per dimension."""
        sizes = [label.size for label in labels]
        if sizes != list(tensor.shape):
            raise AssertionError(f"labels of sizes {sizes} for a tensor of shape {tuple(tensor.shape)}")
        self._labels[id(tensor)] = (tensor, list(labels))

    def all_labels(self) -> Iterator[list[Label]]:
        """Yield the labels of every tensor seen."""
        return (labels for _, labels in self._labels.values())

    def contract(self, label: Label, separately: Sequence[Label] = ()) -> None:
        """Note that an operation sums over ``label``, separately for every position of other axes."""
        self.contractions.append((label, tuple(separately)))

    def mix(self, labels: Sequence[Label], dims: set[int]) -> None:
        """Note that an operation mixes positions along ``dims``: other axes have one order for all of them."""
        for d, label in enumerate(labels):
            if d not in dims:
                self.contract(label, [x for k, x in enumerate(labels) if k not in dims and k != d])

    def select(
        self, labels: Sequence[Label], dim: int, position: int, name: str, out: torch.Tensor
    ) -> list[Label]:
        """Return the labels of one slice along ``dim``; ``dim`` is pinned once an operation reads the slice.

        The other axes get labels of their own in the slice: the three slices of a fused query, key and value may
        move separately. They are united with the whole tensor's labels again if they turn out not to.

        Args:
            labels: of the whole tensor.
            dim: the dimension that is removed.
            position: along ``dim``.
            name: of the operation, the reason of a pin.
            out: the slice.
        """
        along, rest = find(labels[dim]), [*labels[:dim], *labels[dim + 1 :]]
        cuttable = along.kind == "leaf" and along.size > 1
        if cuttable and (along.pinned is None or id(along) in self._sliced):
            self._sliced.add(id(along))
            rest = [self._slice(label, along, position) for label in rest]
        if along.kind == "sum":  # only the segment that contains the position
            for segment in segments(along):
                if position < segment.size:
                    along = segment
                    break
                position -= segment.size
            if along.size == 2:
                split_sum(along, [1, 1])
                return rest
        self.pin_if_read(out, [along], name)  # a slice that only gives its shape pins nothing
        return rest

    def pin_if_read(self, tensor: torch.Tensor, labels: Sequence[Label], reason: str) -> None:
        """Pin labels once an operation reads ``tensor``, which depends on their order in a way that is not followed."""
        self._unread[id(tensor)] = (list(labels), reason)

    def join(self, out: torch.Tensor, labels: Sequence[Label], joined: Joined) -> None:
        """Give a tensor that puts several together its labels; the parts' labels are united once it is read.

        A recurrent network stacks the last states of its layers, which most models throw away.
        """
        self.set(out, labels)
        self._joined[id(out)] = joined

    def slice_of_joined(self, tensor: torch.Tensor, dim: int, position: int) -> list[Label] | None:
        """Return the labels of one slice of a tensor that was joined along ``dim`` and not read yet, if one part has it."""
        joined = self._joined.get(id(tensor))
        if joined is None or joined.dim != dim:
            return None
        for part in joined.parts:
            size = part[dim].size
            if position < size:
                return [*part[:dim], *part[dim + 1 :]] if size == 1 else None
            position -= size
        return None

    def has_pins(self, tensor: torch.Tensor) -> bool:
        """Whether reading the tensor would pin something."""
        return id(tensor) in self._unread

    def _slice(self, label: Label, along: Label, position: int) -> Label:
        leaf = find(label)
        if leaf.size <= 1 or is_pinned(leaf):
            return label
        if leaf.kind != "leaf":
            parts = [self._slice(part, along, position) for part in leaf.parts]
            return product(parts) if leaf.kind == "product" else sum_of(parts)
        key = (id(leaf), id(along), position)
        if key not in self.slices:
            self.slices[key] = Slice(leaf, along, position, Label(leaf.size))
        return self.slices[key].inside

    def positions(self, tensor: torch.Tensor) -> Label | None:
        """Return the label that a tensor's integers are positions along; None if they are not known to be."""
        return self._positions[id(tensor)][1] if id(tensor) in self._positions else None

    def set_positions(self, tensor: torch.Tensor, along: Label, tied: bool = False) -> None:
        """Note that a tensor's integers are positions along a label; ``tied`` if equal values may have had to be ranked.

        Which of two equal values comes first depends on their order, so ``along`` is pinned where such integers are used.
        """
        self._positions[id(tensor)] = (tensor, along, tied)

    def has_positions(self) -> bool:
        """Whether any tensor is known to hold positions."""
        return bool(self._positions)

    def tied(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's positions may depend on the order of equal values."""
        return id(tensor) in self._positions and self._positions[id(tensor)][2]

    def following(self, index: torch.Tensor, along: Label) -> list[Label]:
        """Return the labels of rows selected by ``index``; with one dimension, rows know their position in ``along``."""
        labels = self.labels(index)
        if index.ndim != 1:
            return labels
        known = self._followers.setdefault(id(index), [])
        if not known:
            self._passes[id(index)] = self._pass
            known.append(Label(index.shape[0], "same", labels, follows=along))
        return known

    def forget_mixed_positions(self) -> None:
        """Forget the positions of rows that several indices of one pass selected along one axis: they cannot be distinguished."""
        by_axis: dict[int, list[tuple[int, Label]]] = {}
        for key, (label,) in self._followers.items():
            assert label.follows is not None
            by_axis.setdefault(id(find(label.follows)), []).append((self._passes[key], label))
        for found in by_axis.values():
            mixed = len({number for number, _ in found}) < len(found)
            for _, label in found if mixed else []:
                label.follows = None

    def begin_pass(self) -> None:
        """Note that another pass begins."""
        self._pass += 1

    def reads(self) -> set[int]:
        """Return what was read so far, for :meth:`forget_reads`."""
        return set(self._read)

    def forget_reads(self, kept: set[int]) -> None:
        """Forget what was read since then, in a pass that failed: it may not read the same as one that does not."""
        self._read = kept

    def mark_data(self, tensor: torch.Tensor) -> None:
        """Note that a tensor, and every view of its memory, depends on the model's inputs."""
        self._data.add(storage_id(tensor))

    def is_data(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor depends on the model's inputs."""
        return storage_id(tensor) in self._data

    def mark_state(self, tensor: torch.Tensor) -> None:
        """Note that a tensor, and every view of its memory, depends on parameters or buffers."""
        self._state.add(storage_id(tensor))

    def is_state(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor depends on parameters or buffers."""
        return storage_id(tensor) in self._state

    def mark_learned(self, tensor: torch.Tensor) -> None:
        """Note that a tensor, and every view of its memory, depends on parameters."""
        self._learned.add(storage_id(tensor))

    def is_learned(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor depends on parameters, so that it has other values in another network."""
        return storage_id(tensor) in self._learned

    def mark_level(self, tensor: torch.Tensor) -> None:
        """Note that a tensor may hold equal values at many positions, as a ReLU's zeros."""
        self._level.add(storage_id(tensor))

    def is_level(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor may hold equal values at many positions."""
        return storage_id(tensor) in self._level

    def mark_read(self, tensor: torch.Tensor) -> None:
        """Note that an operation computed with the tensor's values, or that the model returned them."""
        self._read.add(id(tensor))

    def leaves_read(self) -> set[int]:
        """Return the ids of the leaves along which values were read; a whole counts if any of its slices does."""
        read = [self._labels[key][1] for key in self._read if key in self._labels]
        distinct = {id(label): label for labels in read for label in map(find, labels)}
        found = {id(x.leaf) for label in distinct.values() for x in occurrences(label)}
        for part in self.slices.values():
            if any(id(x.leaf) in found for x in occurrences(part.inside)):
                found |= {id(x.leaf) for x in occurrences(part.leaf)}
        return found

    def unread_tensors(self, state: Mapping[str, torch.Tensor]) -> list[str]:
        """Return the names of the tensors of which no operation read anything."""
        read = self.leaves_read()
        return [
            name
            for name, tensor in state.items()
            if (leaves := {id(x.leaf) for label in self.labels(tensor) for x in occurrences(label)})
            and not leaves & read
        ]

    def pin_memory(self, tensor: torch.Tensor, reason: str) -> None:
        """Pin every axis of every tensor in the same memory, and what their integers are positions along."""
        memory = storage_id(tensor)
        for other, labels in list(self._labels.values()):
            if storage_id(other) == memory:
                for label in labels:
                    pin(label, reason)
                self.pin_positions(other, reason)

    def pin_positions(self, tensor: torch.Tensor, reason: str) -> None:
        """Pin the label that a tensor's integers are positions along, if any."""
        along = self.positions(tensor)
        if along is not None:
            pin(along, reason)

    def mark_counted(self, label: Label) -> None:
        """Note that how long an axis is depends on values, as that of what a mask selects does."""
        self._counted.append(label)

    def mark_chosen(self, label: Label, among: Sequence[Label], by: torch.Tensor) -> None:
        """Note the axis of samples that ``by`` chooses among those of other axes, if it depends on weights: another network chooses others.

        Axes of samples are held in place. What is chosen among units is no sample.
        """
        if self.is_learned(by) and all(map(is_pinned, among)):
            self._chosen.append(label)

    def mark_order(self, label: Label) -> None:
        """Note an axis along which a sort has put all that was there in another order."""
        self._orders.append(label)

    def is_order(self, label: Label) -> bool:
        """Whether an axis is one of those."""
        return any(find(label) is find(order) for order in self._orders)

    def mark_input(self, tensor: torch.Tensor) -> None:
        """Note a tensor that is given to the model: its axes are the same samples in every network."""
        self._inputs += self.labels(tensor)

    def chosen_leaves(self) -> set[int]:
        """Return the ids of the leaves along which a network has chosen the rows, but for those of inputs: rows may be put back."""
        given = {id(leaf) for label in self._inputs for leaf in leaves(label)}
        return {id(leaf) for label in self._chosen for leaf in leaves(label)} - given

    def mark_cut_elsewhere(self, uncut: list[Label]) -> None:
        """Note axes that were cut since they were :meth:`uncut`, in a pass that was told another answer."""
        self._counted += [label for label in uncut if label.kind == "product" or has_segments(label)]

    def uncut(self, state: Mapping[str, torch.Tensor]) -> list[Label]:
        """Return the leaves of parameters along which values were read; an operation that cuts one later makes a sum or a product of it."""
        read = self.leaves_read()
        every = {id(leaf): leaf for t in state.values() for label in self.labels(t) for leaf in leaves(label)}
        return [every[key] for key in read & every.keys()]

    def mark_empty(self, part: Label, whole: Label) -> None:
        """Note a part of an axis if it has no positions here, which the axis itself does not tell."""
        if not part.size:
            self._empty.append((part, whole))

    def pin_beside_counted(self) -> None:
        """Pin every axis of which such an axis is a part: on other inputs the boundary is elsewhere.

        Passes with other answers do not show that: a model that is told another count than its mask has fails.
        """
        if not self._counted:
            return
        counted = {id(leaf) for label in self._counted for leaf in leaves(label)}
        every = {id(find(label)): label for labels in self.all_labels() for label in labels}
        beside = [label for label in every.values() if not counted.isdisjoint(map(id, leaves(label)))]
        beside += [whole for part, whole in self._empty if id(find(part)) in counted]
        for label in beside:
            pin(label, "its length depends on values")

    def mark_contracted(self, label: Label) -> None:
        """Note that a product with data sums over this dimension of a parameter: units enter there."""
        self._contracted.add(id(label))

    def contracted(self, tensor: torch.Tensor) -> list[int]:
        """Return the dimensions of a parameter at which units enter."""
        return [d for d, label in enumerate(self.labels(tensor)) if id(label) in self._contracted]

    def mark_value(self, number: int, name: str, tensor: torch.Tensor) -> None:
        """Note the labels of a named value of the forward pass, as sites of role ``"value"``."""
        labels = tuple(self.labels(tensor))
        self.sites += [RawSite(number, name, "value", -1, labels, dim) for dim in range(tensor.ndim)]

    def mark_produced(self, call: Call, labels: Sequence[Label], dim: int) -> None:
        """Note that units leave an operation along dimension ``dim`` of its output."""
        self.sites.append(RawSite(call.number, call.name, "produced", -1, tuple(labels), dim, call.spot))

    def mark_consumed(self, call: Call, argument: str, dim: int) -> None:
        """Note that units enter an operation along dimension ``dim`` of an argument, if that is data."""
        self._mark_input(call, "consumed", argument, self.labels(call[argument]), [dim])

    def mark_activation(self, call: Call, labels: Sequence[Label]) -> None:
        """Note that a nonlinearity reads its first argument, with units along any of ``labels``."""
        self._mark_input(call, "activation", next(iter(call.arguments)), labels, range(len(labels)))

    def _mark_input(
        self, call: Call, role: Role, argument: str, labels: Sequence[Label], dims: Sequence[int]
    ) -> None:
        if self.is_data(call[argument]):
            at = call.position(argument)
            self.sites += [
                RawSite(call.number, call.name, role, at, tuple(labels), dim, call.spot) for dim in dims
            ]
