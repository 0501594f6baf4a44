"""Gain matrices of groups, rebuilt by a matrix product or updated by the units that moved.

A group's gain is the sum over its tensors of ``A_rows @ B_rows.T``, where the columns of B are ordered by the
groups on the tensor's other axes. If m of these units have moved since, the sum changes by
``A[:, moved] @ (B[:, now] - B[:, then]).T``: 2 n^2 m operations instead of 2 n^2 d.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import overload

import torch

from fastmatch._internal.ranks import ALONE, Ranks
from fastmatch._internal.shared_data import owner_of
from fastmatch._internal.states import State, device_of, headers_of
from fastmatch._internal.tree import MergeTree
from fastmatch.assignment.bounded_gain import (
    LARGEST_SHARE,
    BoundedGain,
    add_product,
    multiply,
    multiply_if_bounds_pay,
)
from fastmatch.matching.device_gain import FactorViews, factor_views
from fastmatch.permutations.apply import dimension_indices, permute_tensor
from fastmatch.spec import Axis, Group, Permutations, PermutationSpec
from fastmatch_kernels._dispatch import backend_of
from fastmatch_kernels.inner_product import moved_positions

__all__ = ["FactorsOf", "Gains", "Order", "block_count", "is_large", "owners_of", "unit_rows"]

REBUILD_FRACTION = 0.9
"""A gain is rebuilt if an update would take more than this fraction of the operations."""

MAX_UPDATES = 64
"""A gain is rebuilt after this many updates, to bound their float32 rounding. It grows with the square root of their
number and is twice that of a rebuilt gain after about 16 updates (measured on an MLP and VGG16)."""

BOUNDED_UNITS, BOUNDED_PRODUCTS = 512, 1 << 30
"""Units and products from which bounds are tried: below that, a proof takes as long as the gain."""

PAYING_SHARE = 0.25
"""Predicted share of the products up to which bounds are used in memory, where a whole gain would serve later solves too."""

MAX_BLOCKS, BLOCK_FEATURES = 8, 4
"""Blocks of a gain that are added up in a tree, at most, and their features in units of the gain, at least. The tree of eight takes
the memory of four gains, and an assignment that of three."""

HELD = 1 << 29
"""Bytes of factors in the order of B's other axes up to which they are held while a gain with bounds is solved."""

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the GPU kernel multiplies."""

AS_STORED = (*KERNEL_DTYPES, torch.float64)
"""Dtypes that are cast when they are multiplied; others, as of eight bits, are cast before."""

PRECISION = "fp16x3"
"""Of the GPU kernel's float32 products: about float32's own, on matrix units. Progress is checked in float64."""


def unit_rows(
    tensor: torch.Tensor, axis: Axis, size: int, dtype: torch.dtype, units: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the (units, features) matrix of one axis, with all weights of a unit in its row; all units for None."""
    front = axis.slice_of(tensor).movedim(axis.dim, 0)
    if axis.is_whole(size, front.shape[0]):
        front = front if units is None else front[units.to(tensor.device)]
        return front.to(dtype).reshape(len(front), -1)
    positions = axis.positions(size) if units is None else axis.positions(size)[:, units]
    picked = front[positions.to(tensor.device)].to(dtype)  # (outer, units, inner, rest...)
    return picked.movedim(1, 0).reshape(picked.shape[1], -1)


def _has_kernel(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the kernel multiplies them where they are: on one GPU, of one dtype of at most float32."""
    alike = a.device == b.device and a.dtype == b.dtype
    return a.is_cuda and alike and a.dtype in KERNEL_DTYPES and backend_of(a) == "triton"


def _multiply(out: torch.Tensor, views: FactorViews, *, accumulate: bool) -> None:
    """Write the sum of products to ``out``, or add it."""
    if _has_kernel(*views.pairs[0]) and out.dtype == torch.float32:
        from fastmatch_kernels import ops as kernels

        options = {"contraction_index": views.order, "accumulate": accumulate, "precision": PRECISION}
        kernels.gain(views.pairs, out=out, **options)
        return
    for a, b in views.pairs:
        add_product(out, a, b, accumulate=accumulate)
        accumulate = True


Order = Mapping[int, torch.Tensor]
"""Dimension -> the positions of B along it; dimensions that are omitted are unchanged."""


@dataclass(frozen=True)
class _Change:
    """The fraction of a tensor that moved (infinite if no update can follow it), the dimension, and the positions."""

    fraction: float
    dim: int
    units: torch.Tensor


@dataclass(frozen=True)
class _Move:
    """One axis, its change, and the order of B's columns before and after."""

    axis: Axis
    change: _Change
    then: Order
    now: Order


@dataclass
class _Kept:
    """A gain, the order of B's columns per axis when it was computed, and the number of updates since it was built."""

    gain: torch.Tensor
    orders: Mapping[Axis, Order]
    updates: int = 0


def is_large(size: int, elements: float) -> bool:
    """Return whether bounds may spare products of a gain, from its units and the elements of its tensors."""
    return size >= BOUNDED_UNITS and size * elements >= BOUNDED_PRODUCTS


def block_count(size: int, elements: float) -> int:
    """Return into how many blocks the gain of a group is divided, from its units and the elements of its tensors.

    A block has so many features that its products take far longer than adding its gain to another one.
    """
    if not is_large(size, elements):
        return 1
    return max(1, min(MAX_BLOCKS, int(elements // (BLOCK_FEATURES * size**2))))


def owners_of(blocks: Sequence[object], ranks: int) -> list[int]:
    """Return the rank of each block."""
    return [owner_of(k, len(blocks), ranks) for k in range(len(blocks))]


def _units_at(places: Mapping[Axis, Mapping[int, torch.Tensor]], size: int) -> torch.Tensor:
    """The units of a group at the moved positions of its axes: its own, or those of a group inside or around it."""
    found = torch.zeros(size, dtype=torch.bool, device="cpu")
    for axis, moved in places.items():
        if axis.dim in moved:
            found |= torch.isin(axis.positions(size), moved[axis.dim]).any(2).any(0)
    return found.nonzero().flatten()


class FactorsOf:
    """The factors of a group's gain as they are stored, read again whenever they are iterated over."""

    def __init__(self, gains: Gains, group: Group, axes: Sequence[Axis], permutations: Permutations) -> None:
        self.gains, self.arguments = gains, (group, axes, permutations)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for views in self.gains.pairs(*self.arguments):
            yield from views.pairs


class Gains:
    """The gains of a weight matching; those that fit into ``budget`` bytes are kept between solves.

    Args:
        a, b: state dicts; rows of a gain are units of A, columns are units of B in their own order.
        spec: which axes move together.
        budget: bytes of gains to keep; 0 if the states are on disk and there is memory for few gains only.
        in_blocks: add up large gains in blocks, which ranks can multiply together.
    """

    def __init__(
        self, a: State, b: State, spec: PermutationSpec, budget: int, *, in_blocks: bool = False
    ) -> None:
        self.a, self.b, self.spec, self.budget = a, b, spec, budget
        self.has_blocks = in_blocks
        self.kept: dict[str, _Kept] = {}
        self.on_disk = budget == 0
        self.spent: dict[str, float] = {}
        """Group -> the products that its gains with bounds have taken, in those of one whole gain."""

    def cost_of(
        self, group: Group, axes: Sequence[Axis], permutations: Permutations
    ) -> torch.Tensor | BoundedGain:
        """Return the gain as :meth:`of` does, or with bounds if it is new and these are expected to take fewer products.

        A gain with bounds is not kept. So once those of a group have taken as many products as a whole gain, which could
        be kept, it is built.
        """
        could_keep = 4 * group.size**2 <= self.budget
        is_paid = could_keep and self.spent.get(group.name, 0.0) >= 1.0
        if group.name in self.kept or is_paid or not self.suits_bounds(group, axes):
            return self.of(group, axes, permutations)
        if self.has_blocks:
            bounded = self.bounded(group, axes, permutations)
            return (
                self.in_blocks(self.blocks(group, axes), group, permutations) if bounded is None else bounded
            )
        factors: Iterable[tuple[torch.Tensor, torch.Tensor]] = FactorsOf(self, group, axes, permutations)
        if not self.on_disk and 8 * self._elements(axes) <= HELD:
            factors = list(factors)
        gain = multiply(factors, LARGEST_SHARE if self.on_disk else PAYING_SHARE)
        if isinstance(gain, torch.Tensor):
            self._keep(group.name, gain, self._orders(axes, permutations))
        return gain

    def bounded(self, group: Group, axes: Sequence[Axis], permutations: Permutations) -> BoundedGain | None:
        """Return the gain with bounds, for a group that :meth:`suits_bounds`; None if they are not expected to pay."""
        features = self._elements(axes) // group.size
        return multiply_if_bounds_pay(FactorsOf(self, group, axes, permutations), features, LARGEST_SHARE)

    def blocks(self, group: Group, axes: Sequence[Axis]) -> list[list[Axis]]:
        """Return the axes in blocks of about equal elements; see :func:`block_count`."""
        sizes = [math.prod(self.spec.shapes[axis.parameter]) for axis in axes]
        count = block_count(group.size, sum(sizes))
        found: list[list[Axis]] = [[] for _ in range(count)]
        before = 0
        for axis, size in zip(axes, sizes, strict=True):
            found[count * (2 * before + size) // (2 * sum(sizes))].append(axis)
            before += size
        return [block for block in found if block]

    @overload
    def in_blocks(
        self, blocks: Sequence[Sequence[Axis]], group: Group, permutations: Permutations
    ) -> torch.Tensor: ...
    @overload
    def in_blocks(
        self, blocks: Sequence[Sequence[Axis]], group: Group, permutations: Permutations, ranks: Ranks
    ) -> torch.Tensor | None: ...
    def in_blocks(
        self,
        blocks: Sequence[Sequence[Axis]],
        group: Group,
        permutations: Permutations,
        ranks: Ranks = ALONE,
    ) -> torch.Tensor | None:
        """Return the gain as :meth:`of` does, with sums in a tree of blocks: the same bits on any number of ranks.

        Every rank multiplies the blocks that :func:`owners_of` says. Rank 0 gets the gain, the others None.
        """
        owners = owners_of(blocks, ranks.size)
        tree = MergeTree[torch.Tensor](ranks, len(blocks), torch.Tensor.add_)
        for k, block in enumerate(blocks):
            if owners[k] == ranks.rank:
                tree.add(k, self._build(group, block, permutations, None))
        if ranks.size > 1:  # a rank that fails says so here, before another one waits for its sums
            ranks.exchange(None, f"the products of group {group.name}")
        return tree.first()

    def spend(self, name: str, share: float) -> None:
        """Note the share of a gain's products that a solve with bounds has taken."""
        self.spent[name] = self.spent.get(name, 0.0) + share

    def suits_bounds(self, group: Group, axes: Sequence[Axis]) -> bool:
        """Whether a group is large, and its tensors are on the CPU and multiplied in float32."""
        if not is_large(group.size, self._elements(axes)):
            return False
        is_wide = self._dtype(axes) == torch.float64
        return not is_wide and all(device_of(s, x.parameter) == "cpu" for s in (self.a, self.b) for x in axes)

    def _dtype(self, axes: Sequence[Axis]) -> torch.dtype:
        """The dtype of a gain: float64 if a tensor has it in both models."""
        a, b = headers_of(self.a), headers_of(self.b)
        wide = any(a[x.parameter].dtype == b[x.parameter].dtype == torch.float64 for x in axes)
        return torch.float64 if wide else torch.float32

    def _elements(self, axes: Sequence[Axis]) -> int:
        return sum(math.prod(self.spec.shapes[axis.parameter]) for axis in axes)

    def of(self, group: Group, axes: Sequence[Axis], permutations: Permutations) -> torch.Tensor:
        """Return the (n, n) gain of a group over ``axes``, all other groups permuted; it must not be written to."""
        orders = self._orders(axes, permutations)
        if orders is None:
            return self._build(group, axes, permutations, None)
        kept = self.kept.get(group.name)
        if kept is not None and kept.updates < MAX_UPDATES and kept.orders.keys() <= orders.keys():
            moves = [
                _Move(axis, self._change(axis, then, orders[axis]), then, orders[axis])
                for axis, then in kept.orders.items()
            ]
            if self._is_worthwhile(moves):
                self._update(kept, group, [move for move in moves if move.change.fraction])
                self._add(kept.gain, group, [x for x in axes if x not in kept.orders], permutations)
                kept.orders = orders
                return kept.gain
        gain = self._build(group, axes, permutations, None if kept is None else kept.gain)
        self._keep(group.name, gain, orders)
        return gain

    def follow(self, a: State, moved: Mapping[str, torch.Tensor]) -> None:
        """Take another A, which differs from the last one in some units only, and update the gains that are kept.

        Args:
            a: the state dict.
            moved: group -> its units whose weights may differ, int64 on the CPU.
        """
        before, self.a = self.a, a
        places_of = cache(partial(self._moved_places, moved))  # groups share tensors
        for name, kept in list(self.kept.items()):
            group = self.spec.groups[name]
            places = {axis: places_of(axis.parameter) for axis in kept.orders}
            rows = _units_at(places, group.size)
            features = {axis: {d: at for d, at in places[axis].items() if d != axis.dim} for axis in places}
            if kept.updates < MAX_UPDATES and self._pays(group, rows, features):
                self._follow(kept, group, before, rows, features)
            else:
                self.budget += kept.gain.numel() * kept.gain.element_size()
                del self.kept[name]

    def _moved_places(self, moved: Mapping[str, torch.Tensor], parameter: str) -> dict[int, torch.Tensor]:
        """Dimension of a tensor -> the positions of units that moved."""
        found: dict[int, list[torch.Tensor]] = {}
        for axis, name in self.spec.axes_of(parameter):
            if len(moved.get(name, ())):
                positions = axis.positions(self.spec.groups[name].size)[:, moved[name]]
                found.setdefault(axis.dim, []).append(positions.flatten())
        return {dim: torch.cat(positions).unique() for dim, positions in found.items()}

    def _pays(
        self, group: Group, rows: torch.Tensor, features: Mapping[Axis, Mapping[int, torch.Tensor]]
    ) -> bool:
        """Whether the rows and features of a gain that A's units have moved are few. Features move along one dimension at most."""
        products = whole = 0.0
        for axis, places in features.items():
            shape = self.spec.shapes[axis.parameter]
            whole += math.prod(shape)
            share = len(rows) / group.size + sum(len(at) / shape[dim] for dim, at in places.items())
            products += math.inf if len(places) > 1 else share * math.prod(shape)
        return products < REBUILD_FRACTION * whole

    def _follow(
        self,
        kept: _Kept,
        group: Group,
        before: State,
        rows: torch.Tensor,
        features: Mapping[Axis, Mapping[int, torch.Tensor]],
    ) -> None:
        """Change a gain by the features of A that moved, and multiply the rows of units that moved anew."""
        if not len(rows) and not any(features.values()):
            return
        gain, size = kept.gain, group.size
        anew = torch.zeros(len(rows), size, dtype=gain.dtype, device=gain.device)
        for axis, places in features.items():
            if not len(rows) and not places:
                continue
            a, name = self.a[axis.parameter], axis.parameter
            b = self.b[name]
            for dim, index in kept.orders[axis].items():
                b = b.index_select(dim, index.to(b.device))
            for dim, at in places.items():
                now, then = (x.index_select(dim, at.to(x.device)) for x in (a, before[name]))
                change = unit_rows(now - then, axis, size, gain.dtype)
                others = unit_rows(b.index_select(dim, at.to(b.device)), axis, size, gain.dtype)
                _multiply(gain, FactorViews([(change, others.to(gain.device))]), accumulate=True)
            if len(rows):
                left = unit_rows(a, axis, size, gain.dtype, rows)
                right = unit_rows(b, axis, size, gain.dtype).to(gain.device)
                _multiply(anew, FactorViews([(left, right)]), accumulate=True)
        gain[rows.to(gain.device)] = anew
        kept.updates += 1

    def _orders(self, axes: Sequence[Axis], permutations: Permutations) -> dict[Axis, Order] | None:
        """The order of B's columns per axis; None if units move only in slices, which have no single order.

        No update can follow such units.
        """
        if any(self.spec.has_slices(axis.parameter) for axis in axes):
            return None
        return {axis: dimension_indices(axis.parameter, self.spec, permutations, skip=axis) for axis in axes}

    def _keep(self, name: str, gain: torch.Tensor, orders: Mapping[Axis, Order] | None) -> None:
        """Keep a gain that was built, if there is memory for it and updates can follow its units."""
        size = 0 if name in self.kept else gain.numel() * gain.element_size()
        if orders is not None and size <= self.budget:
            self.budget -= size
            self.kept[name] = _Kept(gain, orders)

    def _is_worthwhile(self, moves: Sequence[_Move]) -> bool:
        """Whether an update takes clearly fewer operations than a rebuild."""
        sizes = [math.prod(self.spec.shapes[move.axis.parameter]) for move in moves]
        moved = sum(n * move.change.fraction for n, move in zip(sizes, moves, strict=True))
        return moved < REBUILD_FRACTION * sum(sizes)

    def _build(
        self, group: Group, axes: Sequence[Axis], permutations: Permutations, out: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the gain from all axes."""
        for k, views in enumerate(self.pairs(group, axes, permutations)):
            if out is None:
                device = views.pairs[0][0].device
                out = torch.empty(group.size, group.size, dtype=self._dtype(axes), device=device)
            _multiply(out, views, accumulate=k > 0)
        assert out is not None, f"group {group.name!r} was given no axes"
        return out

    def _add(
        self, gain: torch.Tensor, group: Group, axes: Sequence[Axis], permutations: Permutations
    ) -> None:
        """Add axes that are new to a gain."""
        for views in self.pairs(group, axes, permutations):
            _multiply(gain, views, accumulate=True)

    def pairs(self, group: Group, axes: Sequence[Axis], permutations: Permutations) -> Iterator[FactorViews]:
        """Yield the (n, features) matrices of A and B, B's other axes permuted; vectors (biases, norms) joined to one.

        They have the dtypes of the tensors, if torch multiplies these, and need not be copies. On a GPU they are views, which the kernel
        reads through an index, or copies of one dtype. Each tensor is read once and released before the next, because a state may read them from disk.
        """
        dtype = self._dtype(axes)
        vectors: list[tuple[torch.Tensor, torch.Tensor]] = []
        for axis in axes:
            a, b, name = self.a[axis.parameter], self.b[axis.parameter], axis.parameter
            if dtype == torch.float32 and a.ndim > 1 and _has_kernel(a, b) and not self.spec.has_slices(name):
                order = dimension_indices(name, self.spec, permutations, skip=axis)
                views = factor_views(a, b, axis, group.size, order)
                if views is not None:
                    yield views
                    continue
            whole_a = axis.slice_of(a)
            whole_b = axis.slice_of(permute_tensor(b, name, self.spec, permutations, skip=axis))
            within = replace(axis, at=())
            is_alike = (
                a.dtype == b.dtype or a.device.type == b.device.type == "cpu"
            )  # a GPU's product takes one dtype
            rows_a, rows_b = (
                unit_rows(x, within, group.size, x.dtype if is_alike and x.dtype in AS_STORED else dtype)
                for x in (whole_a, whole_b)
            )
            rows_b = rows_b.to(rows_a.device)
            if rows_a.shape[1] == 1:
                vectors.append((rows_a.to(dtype), rows_b.to(dtype)))
            else:
                yield FactorViews([(rows_a, rows_b)])
        if vectors:
            yield FactorViews(
                [(torch.cat([x for x, _ in vectors], 1), torch.cat([y for _, y in vectors], 1))]
            )

    def _change(self, axis: Axis, then: Order, now: Order) -> _Change:
        """What has moved in B. If it moved along several dimensions, the gain has to be rebuilt."""
        moved = moved_positions(now, then, self.spec.shapes[axis.parameter])
        if not moved:
            return _Change(0.0, -1, torch.zeros(0, dtype=torch.long, device="cpu"))
        dim, units = moved.popitem()
        whole = bool(moved) or dim == axis.dim
        return _Change(math.inf if whole else len(units) / self.spec.shapes[axis.parameter][dim], dim, units)

    def _update(self, kept: _Kept, group: Group, moves: Sequence[_Move]) -> None:
        """Add ``A[:, moved] @ (B[:, now] - B[:, then]).T`` of all axes in one product, one pass over the gain."""
        factors = [self._moved_rows(group, kept.gain, move) for move in moves]
        if factors:
            rows_a, rows_b = factors[0]
            if len(factors) > 1:
                rows_a, rows_b = (torch.cat([factor[side] for factor in factors], 1) for side in range(2))
            _multiply(kept.gain, FactorViews([(rows_a, rows_b)]), accumulate=True)
            kept.updates += 1

    def _moved_rows(self, group: Group, gain: torch.Tensor, move: _Move) -> tuple[torch.Tensor, torch.Tensor]:
        """(A's columns that moved, the change of B's columns there), (n, features) each."""
        axis, dim, units = move.axis, move.change.dim, move.change.units
        a, b = self.a[axis.parameter], self.b[axis.parameter]
        parts = []
        for order in (move.now, move.then):
            picked = order[dim][units] if dim in order else units
            part = b.index_select(dim, picked.to(b.device)).to(gain.dtype)
            for other, index in order.items():
                if other != dim:
                    part = part.index_select(other, index.to(part.device))
            parts.append(part)
        a = a.index_select(dim, units.to(a.device))
        rows_a, rows_b = (unit_rows(x, axis, group.size, gain.dtype) for x in (a, parts[0] - parts[1]))
        return rows_a, rows_b.to(gain.device)
