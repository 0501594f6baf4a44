"""Matching of groups that hold others: heads with their channels, experts with their hidden units.

How well unit ``i`` of A (a head) fits unit ``j`` of B is known only under the best order of what lies inside. So the
inner problems of every pair (i, j) are solved first, many small assignments at once, and their optima are the gains
of one assignment over the units themselves. Where two families share a tensor (the query heads of a group and the
channels of its values, in the output projection), they are solved in turn until the pair's optimum stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastmatch._internal.states import State, headers_of
from fastmatch.assignment import linear_sum_assignment, solve_batched
from fastmatch.permutations.apply import permute_tensor
from fastmatch.spec import Axis, Permutations, PermutationSpec

__all__ = ["best_orders", "match_nested"]

PASSES = 4
"""Rounds over families that share a tensor, at most."""

ENTRIES = 1 << 25
"""Gain entries of inner problems that are held at once."""

SMALL = 512
"""Inner problems up to this size are solved as one stack, larger ones by themselves."""


@dataclass
class _Piece:
    """What one axis of the outer group holds, block by block.

    Attributes:
        a, b: (units, length, ...) in the dtype of the gains; B's other groups are in place already.
        families: family -> (dimension of a block, positions (outer, size, inner) along it).
    """

    a: torch.Tensor
    b: torch.Tensor
    families: dict[int, tuple[int, torch.Tensor]]

    @property
    def is_covered(self) -> bool:
        """Whether one family has all of it."""
        if len(self.families) != 1:
            return False  # what lies beside a family adds to the optimum as well
        ((dim, positions),) = self.families.values()
        return positions.numel() == self.a.shape[1 + dim]

    def rows(self, blocks: torch.Tensor, family: int) -> torch.Tensor:
        """(blocks, size, features) of a family."""
        dim, positions = self.families[family]
        picked = blocks.movedim(1 + dim, 1)[:, positions]  # (blocks, outer, size, inner, ...)
        return picked.movedim(2, 1).reshape(len(blocks), positions.shape[1], -1)

    def ordered(self, orders: dict[int, torch.Tensor], but: int | None, part: slice) -> torch.Tensor:
        """B's blocks in ``part`` with every family but one in its order, (blocks, size) each."""
        blocks = self.b[part]
        moving = {f: places for f, places in self.families.items() if f != but and f in orders}
        for dim in {d for d, _ in moving.values()}:
            index = torch.arange(blocks.shape[1 + dim]).expand(len(blocks), -1).clone()
            for family, (along, positions) in moving.items():
                if along == dim:
                    moved = positions[:, orders[family]].movedim(1, 0)  # (blocks, outer, size, inner)
                    index[:, positions.flatten()] = index.gather(1, moved.flatten(1))
            shape = [len(blocks), *([1] * (blocks.ndim - 1))]
            shape[1 + dim] = -1
            blocks = blocks.gather(1 + dim, index.view(shape).expand_as(blocks).to(blocks.device))
        return blocks


def match_nested(
    a: State, b: State, spec: PermutationSpec, name: str, axes: Sequence[Axis], permutations: Permutations
) -> Permutations:
    """The best permutations found for a group and all groups within it, the others being where they are.

    Args:
        a, b: state dicts; A is the reference.
        spec: which axes move together.
        name: a group that others lie within.
        axes: those of its axes that enter the gain.
        permutations: of all groups, for the order of B's other axes.

    Returns:
        Group -> permutation for the group and its families. Exact where no two families share a tensor; where they
        do, each is exact given the other.

    Cost: the gains of all units of the families, and p^2 assignments of n x n for p units of n each.
    """
    families = [
        [spec.groups[member] for member in family]
        for (outer, _), family in spec.subgroups().items()
        if outer == name
    ]
    still = {g: torch.arange(spec.groups[g].size) for g in (name, *(m.name for f in families for m in f))}
    others = {**permutations, **still}
    pieces = [_cut(a, b, spec, name, axis, others) for axis in axes]
    sizes = [family[0].size for family in families]
    p = spec.groups[name].size
    value = torch.zeros(p, p, dtype=torch.float64)
    for piece in pieces:
        if not piece.families:
            value += (piece.a.flatten(1) @ piece.b.flatten(1).T).double().cpu()
    held = [piece for piece in pieces if piece.families]
    orders = [torch.arange(n).expand(p, p, n).clone() for n in sizes]
    step = max(1, ENTRIES // max((n * n for n in sizes), default=1))
    for i in range(p):
        for lo in range(0, p, step):
            part = slice(lo, min(lo + step, p))
            found, optimum = _inner(held, sizes, i, part)
            value[i, part] += optimum
            for family, order in found.items():
                orders[family][i, part] = order
    _, outer = linear_sum_assignment(value, maximize=True)
    result = {name: torch.as_tensor(outer)}
    for family, order in zip(families, orders, strict=True):
        for i, member in enumerate(family):
            result[member.name] = order[i, result[name][i]]
    return result


def best_orders(gain: torch.Tensor, units: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best order inside every pair of units, from one gain over all that lies within them.

    Args:
        gain: (units * size, units * size), what lies within a unit in a row.
        units: how many units hold them.

    Returns:
        (units, units, size) orders of B's unit j under A's unit i, and their (units, units) float64 optima.
    """
    size = len(gain) // units
    blocks = gain.view(units, size, units, size).transpose(1, 2)
    orders = torch.stack([_solve(row.contiguous()) for row in blocks])
    optima = blocks.gather(3, orders[..., None].to(gain.device)).double().sum((2, 3)).cpu()
    return orders, optima


def _inner(
    pieces: Sequence[_Piece], sizes: Sequence[int], i: int, part: slice
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """(family -> orders (blocks, size), optima (blocks,)) of A's block ``i`` against B's in ``part``."""
    mixed = [x for x in pieces if not x.is_covered]
    orders: dict[int, torch.Tensor] = {}
    own = [
        _gain([x for x in pieces if x.is_covered and family in x.families], family, i, part, orders)
        for family in range(len(sizes))
    ]
    coupled = any(len(x.families) > 1 for x in mixed)
    for turn in range(PASSES if coupled else 1):
        before = dict(orders)
        for family in range(len(sizes)):
            sharing = [x for x in mixed if family in x.families]
            # At first only what needs no order that is still to be found, if there is any.
            ready = [x for x in sharing if x.families.keys() <= {family, *orders}]
            gain = _gain(ready if ready or own[family] is not None else sharing, family, i, part, orders)
            total = [g for g in (own[family], gain) if g is not None]
            orders[family] = _solve(sum(total[1:], start=total[0]))
        if turn and all(torch.equal(before[family], order) for family, order in orders.items()):
            break
    optimum = torch.zeros(part.stop - part.start, dtype=torch.float64)
    for family, order in orders.items():
        gain = own[family]
        if gain is not None:
            optimum += gain.gather(2, order[:, :, None].to(gain.device)).double().sum((1, 2)).cpu()
    for piece in mixed:
        blocks = piece.ordered(orders, None, part)
        optimum += (blocks.flatten(1) @ piece.a[i].flatten()).double().cpu()
    return orders, optimum


def _gain(
    pieces: Sequence[_Piece], family: int, i: int, part: slice, orders: dict[int, torch.Tensor]
) -> torch.Tensor | None:
    """(blocks, size, size): a family's units in A's block ``i`` against those in B's blocks; None of no pieces."""
    total = None
    for piece in pieces:
        rows = piece.rows(piece.a[i : i + 1], family)[0]
        others = piece.rows(piece.ordered(orders, family, part), family)
        gain = torch.matmul(rows, others.transpose(1, 2))
        total = gain if total is None else total.add_(gain)
    return total


def _solve(gains: torch.Tensor) -> torch.Tensor:
    """The best order of each problem of a stack, (blocks, size)."""
    if gains.shape[1] <= SMALL:
        return torch.as_tensor(solve_batched(gains.cpu(), maximize=True))
    return torch.stack([torch.as_tensor(linear_sum_assignment(g, maximize=True)[1]).cpu() for g in gains])


def _cut(
    a: State, b: State, spec: PermutationSpec, name: str, axis: Axis, permutations: Permutations
) -> _Piece:
    """The blocks of one axis of the outer group, and where its families lie in a block."""
    size, parameter = spec.groups[name].size, axis.parameter
    wide = headers_of(a)[parameter].dtype == headers_of(b)[parameter].dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    positions = axis.positions(size).movedim(1, 0).flatten(1)  # (size, length of a block)
    blocks = []
    for tensor in (a[parameter], permute_tensor(b[parameter], parameter, spec, permutations)):
        front = axis.slice_of(tensor).movedim(axis.dim, 0)
        whole = torch.equal(positions.flatten(), torch.arange(front.shape[0]))
        picked = front if whole else front[positions.flatten().to(front.device)]
        blocks.append(picked.reshape(size, -1, *front.shape[1:]).to(dtype))
    inside = torch.full((spec.shapes[parameter][axis.dim],), -1)
    inside[positions[0]] = torch.arange(positions.shape[1])
    families = {}
    for number, ((outer, _), members) in enumerate(
        (key, m) for key, m in spec.subgroups().items() if key[0] == name
    ):
        del outer
        first = spec.groups[members[0]]
        for member in first.axes:
            if member.parameter != parameter:
                continue
            found = member.positions(first.size)
            if member.dim == axis.dim and not (set(member.at) - set(axis.at)):
                found = inside[found]
                if int(found.min()) >= 0:
                    _join(families, number, 0, found)
            elif any(dim == axis.dim and start in positions[0].tolist() for dim, start, _ in member.at):
                dim = member.dim + (member.dim < axis.dim)
                _join(families, number, dim, found)
    return _Piece(blocks[0], blocks[1].to(blocks[0].device), families)


def _join(
    families: dict[int, tuple[int, torch.Tensor]], family: int, dim: int, positions: torch.Tensor
) -> None:
    """Adds places of a family in a block: gate and up lie one after the other in one tensor."""
    if family in families:
        earlier, known = families[family]
        if earlier != dim:
            raise ValueError("a family lies along two dimensions of one tensor")
        families[family] = dim, _side_by_side(known, positions)
    else:
        families[family] = dim, positions


def _side_by_side(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(1, size, positions) of both: everything that belongs to a unit."""
    rows = [x.movedim(1, 0).flatten(1) for x in (first, second)]
    return torch.cat(rows, 1)[None]
