"""Matching of groups with subgroups: heads with their channels, experts with their hidden units.

How well unit ``i`` of A (a head) fits unit ``j`` of B depends on the order of the units inside. So the inner problems of
all pairs (i, j) are solved first: one product has the gains of all of them, and they are solved as one stack. Their optima
are the gains of one assignment over the outer units.

A group may have several *kinds* of subgroups, with one subgroup of each kind per outer unit: the query heads that share
a key head, and the channels of their values. If two kinds share a tensor (the output projection), they are solved in
turn until neither changes. That is done only for pairs that matter: the norms bound what the shared tensors can add to a
pair, and pairs that no best outer assignment uses under these bounds are left out.

Axes that no other group moves add the same to a gain in every solve. What they add is kept, so that later solves read and multiply the
other axes alone.

Near copies go a shorter way: all inner units of a kind are matched at once, whatever their outer units. Mostly that keeps those of
an outer unit together, and no nested match earns more.

Bounds also spare near copies most of the products. A prefix of the features and the norms of the rest bound every entry of the
inner gains (:mod:`fastmatch.assignment.bounded_gain`), and so the optimum of every pair. Only pairs that a best outer
assignment uses under these bounds are multiplied to the end and solved.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from fastmatch._internal.states import State, headers_of
from fastmatch.assignment import linear_sum_assignment, solve, solve_batched
from fastmatch.assignment.bounded_gain import JUDGED, LARGEST_SHARE, BoundedGain, multiply_if_bounds_pay
from fastmatch.matching.gains import is_large
from fastmatch.permutations.apply import permute_tensor
from fastmatch.spec import Axis, Permutations, PermutationSpec
from fastmatch_kernels.matrix_product import addmm_nt

__all__ = ["UnmovedGains", "best_orders", "match_nested"]

MAX_TURNS = 4
"""The largest number of turns of kinds that share a tensor."""

MAX_ENTRIES = 1 << 25
"""Gain entries of inner problems that are in memory at once."""

TURNS = 8
"""Outer assignments by bounds, of which only the pairs are solved, before all pairs are."""

KEPT_BYTES = 1 << 28
"""Bytes of gains of axes that no other group moves, which are kept between solves."""

STACKED_SIZE = 512
"""Inner problems up to this size are solved as one stack, larger ones one by one."""


@dataclass
class _Blocks:
    """The tensor of one axis of the outer group, cut into one block per outer unit.

    Attributes:
        a, b: (units, length, ...) in the dtype of the gains; B's other groups are permuted already.
        kinds: kind of subgroup -> (dimension of a block, positions (outer, size, inner) along it).
    """

    a: torch.Tensor
    b: torch.Tensor
    kinds: dict[int, tuple[int, torch.Tensor]]

    @property
    def is_covered(self) -> bool:
        """Whether the units of one kind are the whole block."""
        if len(self.kinds) != 1:
            return False
        ((dim, positions),) = self.kinds.values()
        return positions.numel() == self.a.shape[1 + dim]

    def rows(self, blocks: torch.Tensor, kind: int) -> torch.Tensor:
        """Return the (blocks, size, features) weights of the units of a kind."""
        dim, positions = self.kinds[kind]
        front = blocks.movedim(1 + dim, 1)
        every = torch.arange(front.shape[1], device="cpu")
        if torch.equal(positions.flatten(), every):
            picked = front.unflatten(1, positions.shape)
        else:
            picked = front[:, positions]  # (blocks, outer, size, inner, ...)
        return picked.movedim(2, 1).reshape(len(blocks), positions.shape[1], -1)

    def ordered(self, orders: dict[int, torch.Tensor], but: int | None, part: slice) -> torch.Tensor:
        """Return B's blocks in ``part`` with the units of every kind but one in their orders, (blocks, size) each."""
        blocks = self.b[part]
        moving = {k: places for k, places in self.kinds.items() if k != but and k in orders}
        for dim in {d for d, _ in moving.values()}:
            index = torch.arange(blocks.shape[1 + dim], device="cpu").expand(len(blocks), -1).clone()
            for kind, (along, positions) in moving.items():
                if along == dim:
                    moved = positions[:, orders[kind]].movedim(1, 0)  # (blocks, outer, size, inner)
                    index[:, positions.flatten()] = index.gather(1, moved.flatten(1))
            index = index.to(blocks.device)
            pairs = zip(blocks, index, strict=True)
            blocks = torch.stack([block.index_select(dim, order) for block, order in pairs])
        return blocks


class UnmovedGains:
    """What axes that no other group moves add to the gains of groups, kept between solves.

    It changes no bit of a gain: these axes are added up first, whether their sum is kept or not.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, tuple[Axis, ...]], list[torch.Tensor]] = {}
        self._left = KEPT_BYTES

    def of(self, name: str, axes: Sequence[Axis]) -> list[torch.Tensor] | None:
        """Return what was kept of a solve of a group by ``axes``: one sum for each kind of subgroup."""
        return self._kept.get((name, tuple(axes)))

    def keep(self, name: str, axes: Sequence[Axis], sums: list[torch.Tensor]) -> None:
        """Keep the sums of a solve by ``axes`` if they are not kept yet and there is room."""
        size = sum(total.numel() * total.element_size() for total in sums)
        if (name, tuple(axes)) not in self._kept and size <= self._left:
            self._left -= size
            self._kept[name, tuple(axes)] = sums


def match_nested(
    a: State,
    b: State,
    spec: PermutationSpec,
    name: str,
    axes: Sequence[Axis],
    permutations: Permutations,
    kept: UnmovedGains | None = None,
) -> Permutations:
    """Return the best permutations of a group and its subgroups, all other groups held.

    Args:
        a, b: state dicts; A is the reference.
        spec: which axes move together.
        name: a group with subgroups.
        axes: the axes of the group that enter the gain.
        permutations: of all groups, for the order of B's other axes.
        kept: what earlier solves of the same models have kept; this one adds to it.

    Returns:
        Group -> permutation, for the group and its subgroups. It is optimal if no two kinds of subgroups share a
        tensor; otherwise each kind is optimal given the others.

    Cost: one product of all units of the subgroups, and p^2 assignments of n x n for p subgroups of n units each. For near
    copies, a share of the product, and one assignment of all units of a kind or a few p small ones. If subgroups share a tensor, products of that tensor for the
    pairs that the bounds leave.
    """
    kinds = [names for (outer, _), names in spec.subgroups().items() if outer == name]
    own_order = {
        g: torch.arange(spec.groups[g].size, device="cpu")
        for g in (name, *(g for names in kinds for g in names))
    }
    others = {**permutations, **own_order}
    known = None if kept is None else kept.of(name, axes)
    unmoved = [axis for axis in axes if _is_unmoved(axis, spec, own_order)]
    first = [_cut(a, b, spec, name, axis, others) for axis in unmoved] if known is None else []
    then = [_cut(a, b, spec, name, axis, others) for axis in axes if axis not in unmoved]
    blocks = first + then
    sizes = [spec.groups[names[0]].size for names in kinds]
    p = spec.groups[name].size
    value = torch.zeros(p, p, dtype=torch.float64, device="cpu")
    for block in blocks:
        if not block.kinds:
            value += (block.a.flatten(1) @ block.b.flatten(1).T).double().cpu()
    inner = [block for block in blocks if block.kinds]
    own = [
        _OwnGains(
            [x for x in first if x.is_covered and kind in x.kinds],
            [x for x in then if x.is_covered and kind in x.kinds],
            kind,
            size,
            None if known is None else known[kind],
        )
        for kind, size in enumerate(sizes)
    ]
    if all(block.is_covered for block in inner):
        found = _match_flat(own, value)
        if found is not None:
            return {name: found[0]} | {
                subgroup: order
                for names, rows in zip(kinds, found[1], strict=True)
                for subgroup, order in zip(names, rows, strict=True)
            }
    orders = [torch.arange(n, device="cpu").expand(p, p, n).clone() for n in sizes]
    best = value.clone()
    for gains, order in zip(own, orders, strict=True):
        if gains.is_known and gains.bounds is None:
            best += _solve_all(gains, order)
    if all(block.is_covered for block in inner) and all(gains.bounds is None for gains in own):
        outer = _assign(best)
        sums = [gains.unmoved for gains in own if gains.unmoved is not None]
        if kept is not None and then and len(sums) == len(own) and len(inner) == len(blocks):
            kept.keep(name, axes, sums)
    else:
        outer = _solve_by_bounds(inner, own, value, best, orders)
    result = {name: outer}
    for names, order in zip(kinds, orders, strict=True):
        for i, subgroup in enumerate(names):
            result[subgroup] = order[i, result[name][i]]
    return result


class _OwnGains:
    """The gains of all pairs of one kind's units, from the blocks that no other kind is in.

    Attributes:
        size: units of the kind in one outer unit.
        factors: (units, size, features) of A and B, for each block that was read.
        unmoved: the sum over axes that no other group moves, if no bounds were in it and none will be in later solves.
        bounds: bounds of the whole gain, if they are expected to pay.
    """

    def __init__(
        self,
        first: Sequence[_Blocks],
        then: Sequence[_Blocks],
        kind: int,
        size: int,
        unmoved: torch.Tensor | None,
    ) -> None:
        """Multiply the blocks, or as many features as bounds need.

        Args:
            first: blocks of axes that no other group moves.
            then: the other blocks.
            kind: the kind of subgroup.
            size: see above.
            unmoved: the sum over ``first``, if it is known; there are no such blocks then.
        """
        blocks = [*first, *then]
        wide = any(block.a.dtype == torch.float64 for block in blocks)
        dtype = unmoved.dtype if unmoved is not None else torch.float64 if wide else torch.float32
        self.size, self.unmoved = size, unmoved
        self.factors = [
            (block.rows(block.a, kind).to(dtype), block.rows(block.b, kind).to(dtype)) for block in blocks
        ]
        self.bounds: BoundedGain | None = None
        self._whole: torch.Tensor | None = None
        if unmoved is not None:
            self._whole = self._in_blocks(self._sum(self.factors, unmoved.clone()))
        elif self.factors and math.prod(self.factors[0][0].shape[:2]) ** 2 <= MAX_ENTRIES:
            self._multiply(len(first))

    @property
    def is_known(self) -> bool:
        """Whether any tensor tells how well units fit."""
        return bool(self.factors) or self._whole is not None

    def _multiply(self, first: int) -> None:
        """Multiply all pairs, or as many features as their bounds need; the first blocks are those of axes that no other group moves."""
        units = self.factors[0][0]
        elements = sum(a.numel() for a, _ in self.factors)
        on_host = units.dtype == torch.float32 and units.device.type == "cpu"
        judged = math.inf  # features of the first blocks that enter the forecast
        if on_host and is_large(math.prod(units.shape[:2]), elements):
            flat = [(a.flatten(0, 1), b.flatten(0, 1)) for a, b in self.factors]
            features = sum(a.shape[1] for a, _ in flat)
            self.bounds = multiply_if_bounds_pay(flat, features)
            judged = sum(a.shape[1] for a, _ in flat[:first])
        if self.bounds is None:
            total = self._sum(self.factors[:first], None)
            if total is not None and judged >= JUDGED:  # else the forecast changes with the other groups
                self.unmoved = total.clone() if first < len(self.factors) else total
            self._whole = self._in_blocks(self._sum(self.factors[first:], total))

    @staticmethod
    def _sum(
        factors: Sequence[tuple[torch.Tensor, torch.Tensor]], total: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Add the products of all pairs to ``total``."""
        for a, b in factors:
            left, right = a.flatten(0, 1), b.flatten(0, 1)
            if total is None:
                total = addmm_nt(left.new_empty(len(left), len(right)), left, right, beta=0)
            else:
                addmm_nt(total, left, right)
        return total

    def match_flat(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Match the inner units as if any of A could be any of B.

        Returns:
            (units,) outer permutation and (units, size) orders, if that keeps units of one outer unit together. No nested match
            has a larger gain then.
        """
        assert self.bounds is not None
        found = torch.from_numpy(solve(self.bounds, maximize=True).col_ind).view(-1, self.size)
        if self.bounds.is_whole:
            self._whole, self.bounds = self._in_blocks(self.bounds.bound), None
        outer = found // self.size
        return (outer[:, 0], found % self.size) if torch.equal(outer, outer[:, :1].expand_as(outer)) else None

    def grow(self) -> bool:
        """Multiply twice as many features, or return False if so many do not pay."""
        assert self.bounds is not None
        share = 2 * self.bounds.share
        if share <= LARGEST_SHARE:
            self.bounds.grow(share)
        return share <= LARGEST_SHARE

    def finish(self) -> None:
        """Multiply the features that bounds have left out."""
        assert self.bounds is not None
        self._whole, self.bounds = self._in_blocks(self.bounds.full()), None

    def largest(self) -> torch.Tensor:
        """Return (units, units) float64: by the bounds, no order of a pair's units has a larger gain.

        An order takes one entry of every row and of every column.
        """
        assert self.bounds is not None
        blocks = self._in_blocks(self.bounds.bound)
        by_rows, by_columns = (blocks.amax(dim).double().sum(2) for dim in (3, 2))
        return torch.minimum(by_rows, by_columns)

    def of(self, rows: slice, columns: slice) -> torch.Tensor:
        """Return the (rows, columns, size, size) gains of A's units in ``rows`` and B's in ``columns``."""
        if self._whole is not None:
            return self._whole[rows, columns]
        return self._in_blocks(self._sum([(a[rows], b[columns]) for a, b in self.factors], None))

    def _in_blocks(self, gain: torch.Tensor | None) -> torch.Tensor:
        """Return a gain of all inner units as (units, units, size, size)."""
        assert gain is not None, "the axes have no units of this kind"
        size = self.size
        return gain.view(len(gain) // size, size, len(gain.T) // size, size).transpose(1, 2)


def _match_flat(
    own: Sequence[_OwnGains], value: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]] | None:
    """Return the outer permutation and the orders inside it, by kind, if matching all inner units at once finds them.

    It does for near copies, and spares the assignments of pairs. Each kind is at its best there, whatever the outer permutation;
    so all is, if they agree on that and what the outer units earn by themselves is at its best too.

    Args:
        own: the gains of each kind.
        value: (units, units), what the outer units earn by themselves.
    """
    outer = _assign(value) if value.any() else None
    orders = []
    for gains in own:
        found = None if gains.bounds is None else gains.match_flat()
        if found is None or not (outer is None or torch.equal(outer, found[0])):
            return None
        outer = found[0]
        orders.append(found[1])
    return None if outer is None else (outer, orders)


def _solve_all(own: _OwnGains, orders: torch.Tensor) -> torch.Tensor:
    """Write the best (units, units, size) orders of every pair; return their (units, units) float64 optima."""
    p, _, n = orders.shape
    optima = torch.empty(p, p, dtype=torch.float64, device="cpu")
    wide = max(1, min(p, MAX_ENTRIES // n**2))
    high = max(1, MAX_ENTRIES // (wide * n**2))
    for top in range(0, p, high):
        for lo in range(0, p, wide):
            place = slice(top, min(top + high, p)), slice(lo, min(lo + wide, p))
            gains = own.of(*place)
            stack = gains.reshape(-1, n, n)
            order = _solve(stack)
            orders[place] = order.view(*gains.shape[:3])
            best = stack.gather(2, order[:, :, None].to(stack.device)).double().sum((1, 2))
            optima[place] = best.view(gains.shape[:2]).cpu()
    return optima


def _solve_by_bounds(
    inner: Sequence[_Blocks],
    own: Sequence[_OwnGains],
    value: torch.Tensor,
    best: torch.Tensor,
    orders: list[torch.Tensor],
) -> torch.Tensor:
    """Return the best outer permutation where pairs have bounds; write the orders of its pairs.

    Args:
        inner: the blocks with subgroups.
        own: per kind, the gains from the blocks that it alone fills.
        value: (units, units), what the blocks without subgroups earn.
        best: the same with what kinds without bounds earn in the blocks that they alone fill.
        orders: per kind, (units, units, size).
    """
    p, sizes = len(value), [order.shape[2] for order in orders]
    shared = [block for block in inner if not block.is_covered]
    bounded = [gains for gains in own if gains.bounds is not None]
    fixed, known = best.clone(), torch.zeros(p, p, dtype=torch.bool, device="cpu")
    for block in inner:
        if block.is_covered and own[next(iter(block.kinds))].bounds is not None:
            continue  # these bounds contain their rounding
        left, right = (
            torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64) for x in (block.a, block.b)
        )
        rounding = math.prod(block.a.shape[1:]) * torch.finfo(block.a.dtype).eps
        fixed += (rounding if block.is_covered else 1 + rounding) * torch.outer(left, right).cpu()

    def by_bounds() -> torch.Tensor:
        return torch.stack([fixed, *(gains.largest() for gains in bounded)]).sum(0)

    bound = by_bounds()

    def tighten() -> bool:
        """Multiply more features, and return whether that pays."""
        if not (bounded and all(gains.grow() for gains in bounded)):
            return False
        bound[~known] = by_bounds()[~known]
        return True

    def settle(i: int, part: slice) -> None:
        found, optimum = _solve_inner(shared, own, sizes, i, part)
        bound[i, part] = value[i, part] + optimum
        known[i, part] = True
        for kind, order in found.items():
            orders[kind][i, part] = order

    for turn in range(TURNS):
        outer = _assign(bound)
        unknown = [i for i in range(p) if not known[i, outer[i]]]
        if not unknown:
            return outer
        if turn and len(unknown) > p / 4 and not tighten():
            break
        for i in unknown:
            settle(i, slice(int(outer[i]), int(outer[i]) + 1))
    for gains in bounded:
        gains.finish()
    step = max(1, MAX_ENTRIES // max((n * n for n in sizes), default=1))
    for i in range(p):
        for lo in range(0, p, step):
            settle(i, slice(lo, min(lo + step, p)))
    return _assign(bound)


def _assign(value: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(linear_sum_assignment(value, maximize=True)[1], device="cpu")


def best_orders(gain: torch.Tensor, units: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best order inside every pair of outer units, from one gain over all inner units.

    Args:
        gain: (units * size, units * size), the inner units of an outer unit next to each other.
        units: the number of outer units.

    Returns:
        (units, units, size) orders of the inner units of B's unit j under A's unit i, and their (units, units) float64
        optima.
    """
    size = len(gain) // units
    blocks = gain.view(units, size, units, size).transpose(1, 2)
    orders = torch.stack([_solve(row.contiguous()) for row in blocks])
    optima = blocks.gather(3, orders[..., None].to(gain.device)).double().sum((2, 3)).cpu()
    return orders, optima


def _solve_inner(
    mixed: Sequence[_Blocks], owned: Sequence[_OwnGains], sizes: Sequence[int], i: int, part: slice
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """(kind -> orders (blocks, size), optima (blocks,)) of A's block ``i`` against B's in ``part``."""
    orders: dict[int, torch.Tensor] = {}
    own = [gains.of(slice(i, i + 1), part)[0] if gains.is_known else None for gains in owned]
    coupled = any(len(x.kinds) > 1 for x in mixed)
    for turn in range(MAX_TURNS if coupled else 1):
        before = dict(orders)
        for kind in range(len(sizes)):
            sharing = [x for x in mixed if kind in x.kinds]
            # In the first turn use only blocks whose other kinds have an order already, if there are any.
            ready = [x for x in sharing if x.kinds.keys() <= {kind, *orders}]
            gain = _gain(ready if ready or own[kind] is not None else sharing, kind, i, part, orders)
            total = [g for g in (own[kind], gain) if g is not None]
            orders[kind] = _solve(sum(total[1:], start=total[0]))
        if turn and all(torch.equal(before[kind], order) for kind, order in orders.items()):
            break
    optimum = torch.zeros(part.stop - part.start, dtype=torch.float64, device="cpu")
    for kind, order in orders.items():
        gain = own[kind]
        if gain is not None:
            optimum += gain.gather(2, order[:, :, None].to(gain.device)).double().sum((1, 2)).cpu()
    for block in mixed:
        ordered = block.ordered(orders, None, part)
        optimum += (ordered.flatten(1) @ block.a[i].flatten()).double().cpu()
    return orders, optimum


def _gain(
    blocks: Sequence[_Blocks], kind: int, i: int, part: slice, orders: dict[int, torch.Tensor]
) -> torch.Tensor | None:
    """The (blocks, size, size) gain of a kind's units in A's block ``i`` against B's blocks; None without blocks."""
    total = None
    for block in blocks:
        rows = block.rows(block.a[i : i + 1], kind)[0]
        others = block.rows(block.ordered(orders, kind, part), kind)
        gain = torch.matmul(rows, others.transpose(1, 2))
        total = gain if total is None else total.add_(gain)
    return total


def _solve(gains: torch.Tensor) -> torch.Tensor:
    """The best order of each problem of a stack, (blocks, size)."""
    if gains.shape[1] <= STACKED_SIZE:
        return torch.as_tensor(solve_batched(gains.cpu(), maximize=True), device="cpu")
    return torch.stack(
        [torch.as_tensor(linear_sum_assignment(g, maximize=True)[1], device="cpu").cpu() for g in gains]
    )


def _is_unmoved(axis: Axis, spec: PermutationSpec, own: Collection[str]) -> bool:
    """Whether no other group moves the tensor of an axis, nor the groups in ``own`` along another axis of it."""
    return all(group in own and other.dim == axis.dim for other, group in spec.axes_of(axis.parameter))


def _cut(
    a: State, b: State, spec: PermutationSpec, name: str, axis: Axis, permutations: Permutations
) -> _Blocks:
    """The blocks of one axis of the outer group, and the positions of its subgroups in a block."""
    size, parameter = spec.groups[name].size, axis.parameter
    wide = headers_of(a)[parameter].dtype == headers_of(b)[parameter].dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    positions = axis.positions(size).movedim(1, 0).flatten(1)  # (size, length of a block)
    blocks = []
    for tensor in (a[parameter], permute_tensor(b[parameter], parameter, spec, permutations)):
        front = axis.slice_of(tensor).movedim(axis.dim, 0)
        whole = torch.equal(positions.flatten(), torch.arange(front.shape[0], device="cpu"))
        picked = front if whole else front[positions.flatten().to(front.device)]
        blocks.append(picked.reshape(size, -1, *front.shape[1:]).to(dtype).contiguous())
    inside = torch.full((spec.shapes[parameter][axis.dim],), -1, device="cpu")
    inside[positions[0]] = torch.arange(positions.shape[1], device="cpu")
    kinds: dict[int, tuple[int, torch.Tensor]] = {}
    for kind, names in enumerate(names for key, names in spec.subgroups().items() if key[0] == name):
        first = spec.groups[names[0]]
        for inner in first.axes:
            if inner.parameter != parameter:
                continue
            found = inner.positions(first.size)
            if inner.dim == axis.dim and not (set(inner.at) - set(axis.at)):
                found = inside[found]
                if int(found.min()) >= 0:
                    _join(kinds, kind, 0, found)
            elif any(dim == axis.dim and start in positions[0].tolist() for dim, start, _ in inner.at):
                dim = inner.dim + (inner.dim < axis.dim)
                _join(kinds, kind, dim, found)
    return _Blocks(blocks[0], blocks[1].to(blocks[0].device), kinds)


def _join(kinds: dict[int, tuple[int, torch.Tensor]], kind: int, dim: int, positions: torch.Tensor) -> None:
    """Add positions of a kind to a block; a gate and its up projection may be in one tensor."""
    if kind in kinds:
        earlier, known = kinds[kind]
        if earlier != dim:
            raise ValueError("spec: the units of a subgroup are along two dimensions of one tensor")
        kinds[kind] = dim, _side_by_side(known, positions)
    else:
        kinds[kind] = dim, positions


def _side_by_side(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(1, size, positions) of both: all positions of a unit in its row."""
    rows = [x.movedim(1, 0).flatten(1) for x in (first, second)]
    return torch.cat(rows, 1)[None]
