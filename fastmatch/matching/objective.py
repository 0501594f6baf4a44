"""The objective of weight matching: the inner product of A's parameters and the permuted B's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias, TypeVar

import torch

from fastmatch._internal.allowed import Include
from fastmatch._internal.ranks import ALONE, Ranks, deal
from fastmatch._internal.states import State, headers_of
from fastmatch.permutations.apply import dimension_indices, is_identity, permute_tensor
from fastmatch.spec import Axis, Group, Permutations, PermutationSpec
from fastmatch_kernels.inner_product import InnerSum, inner

__all__ = ["Include", "Survey", "WeightObjective", "included", "objective", "weight_scale"]

Survey: TypeAlias = Mapping[str, tuple[float, float, float]]
"""Tensor -> ``<a, a>``, ``<b, b>`` and ``<a, b>`` in float64, with B's units as they are."""

T = TypeVar("T")

ASSIGNMENT = 100.0
"""Operations of an assignment by entry of its matrix, as far as costs of groups are compared."""

RUNNING_STATISTICS = ("running_mean", "running_var")


def included(name: str, tensor: torch.Tensor, include: Include) -> bool:
    """Return whether a tensor of the state dict enters the objective."""
    if not tensor.is_floating_point():
        return False
    if name.rsplit(".", 1)[-1] in RUNNING_STATISTICS:
        return include == "statistics"
    return tensor.ndim >= 2 or include != "weights"


class WeightObjective:
    """``sum_t <A_t, P B_t> + sum_g sum_i bonus_g[i, P_g(i)]`` over tensors t and groups g.

    Args:
        a, b: state dicts; A is the reference. Their tensors are read when needed, so they may be on disk.
        spec: which axes move together.
        include: which tensors enter.
        bonus: group name -> (size, size) matrix, for groups that earn more than their weights do.
        ranks: the processes that share sums over all tensors.
        survey: tensor -> ``<a, a>``, ``<b, b>`` and ``<a, b>`` where they are known already.

    Attributes:
        grouping: top-level group -> itself and its subgroups, which are solved together.
        self_coupled: groups that permute two dimensions of one tensor, so that their gain depends on their own
            permutation.
    """

    def __init__(
        self,
        a: State,
        b: State,
        spec: PermutationSpec,
        include: Include,
        bonus: Mapping[str, torch.Tensor] | None = None,
        ranks: Ranks = ALONE,
        survey: Survey | None = None,
    ) -> None:
        self.a, self.b, self.spec, self.bonus = a, b, spec, dict(bonus or {})
        self.include: Include = include
        self.ranks = ranks
        self.headers = headers_of(a)
        self.survey = survey or {}
        self._noted: dict[str, tuple[Permutations, float]] = {}
        """Tensor -> the permutations that this rank has last noted its inner product for, and that."""
        self.grouping: dict[str, list[str]] = {}
        self.self_coupled: set[str] = set()
        for group in spec.groups.values():
            dims = {(axis.parameter, axis.dim) for axis in self.axes(group)}
            if len(dims) != len({name for name, _ in dims}):
                self.self_coupled.add(group.name)
            self.grouping.setdefault(self.top_level(group.name), []).append(group.name)

    def top_level(self, name: str) -> str:
        """Return the group that ``name`` is a subgroup of, or ``name`` itself."""
        return self.spec.groups[name].within or name

    def coupled(self, name: str) -> set[str]:
        """Return the other top-level groups that share a tensor with ``name`` or one of its subgroups."""
        names = {g for member in self.grouping[name] for g in self.spec.neighbours(member)}
        return {self.top_level(g) for g in names} - {name}

    def axes(self, group: Group) -> list[Axis]:
        """Return the axes of a group whose tensors enter the objective."""
        return [x for x in group.axes if included(x.parameter, self.headers[x.parameter], self.include)]

    def names(self) -> list[str]:
        """Return the tensors that some group moves and that enter the objective."""
        return list(dict.fromkeys(x.parameter for g in self.spec.groups.values() for x in self.axes(g)))

    def size(self) -> int:
        """Return the bytes of A's tensors that enter, in float32."""
        return 4 * sum(self.headers[name].numel() for name in self.names())

    def cost(self, name: str) -> float:
        """Return the predicted operations of one solve of a top-level group: its products and its assignment."""
        members = [self.spec.groups[member] for member in self.grouping[name]]
        size = max(group.size for group in members)
        elements = sum(self.headers[p].numel() for p in {x.parameter for g in members for x in self.axes(g)})
        return 2.0 * size * elements + ASSIGNMENT * size * size

    def within(self, budget: int) -> set[str]:
        """Return the groups, the first ones of the spec, whose float32 gains take at most ``budget`` bytes."""
        kept = set()
        for name in self.spec.top_level():
            size = 4 * self.spec.groups[name].size ** 2
            if len(self.grouping[name]) == 1 and size <= budget:
                budget -= size
                kept.add(name)
        return kept

    def value(self, permutations: Permutations) -> float:
        """Return the objective, in float64, added up in the order of the tensors.

        Tensors whose inner product is known, to one of the ranks or from the survey, are not read. Ranks share the others.
        """
        total, names = InnerSum(), self.names()
        known = self._known(names, permutations)
        left = [name for name in names if name not in known]
        if self.ranks.is_group:
            known |= dict(
                zip(left, self._shared(left, lambda name: self._inner(name, permutations)), strict=True)
            )
        for name in names:
            if name in known:
                total.add_number(known[name])
            else:
                self._add_inner(total, name, permutations)
        return total.value() + sum(self._bonus(name, p) for name, p in permutations.items())

    def change(self, new: Permutations, old: Permutations, owners: Mapping[str, int] | None = None) -> float:
        """Return by how much the objective rises if the groups in ``new`` move there from ``old``.

        The result is exact to float64 rounding. The gains of a solve are not: they are float32, where small progress
        may be rounding, and a group that moves both axes of one tensor has only a linear approximation.

        Args:
            new, old: the permutations.
            owners: tensor -> the rank that reads it, if all ranks make the call. The sum has the same bits.
        """
        changed = {name: p for name, p in new.items() if not torch.equal(p, old[name])}
        moved = {**old, **changed}
        total = InnerSum()
        for name, p in changed.items():
            total.add_number(self._bonus(name, p) - self._bonus(name, old[name]))
        names = sorted({x.parameter for group in changed for x in self.axes(self.spec.groups[group])})
        if owners is None:
            for name in names:
                self._add_change(total, name, moved, old)
            return total.value()

        def terms(name: str) -> list[float]:
            part = InnerSum()
            self._add_change(part, name, moved, old)
            return part.terms()

        tasks = [partial(terms, name) for name in names]
        for part in self.ranks.share(tasks, [owners[name] for name in names], "sums over tensors"):
            for number in part:
                total.add_number(number)
        return total.value()

    def _add_change(self, total: InnerSum, name: str, now: Permutations, then: Permutations) -> None:
        if self.spec.has_slices(name):
            new, old = (permute_tensor(self.b[name], name, self.spec, p) for p in (now, then))
            total.add_number(inner(self.a[name], new, {}) - inner(self.a[name], old, {}))
        else:
            orders = (dimension_indices(name, self.spec, p) for p in (now, then))
            total.add_change(self.a[name], self.b[name], *orders)

    def scale(self) -> float:
        """Return the norm of A's times the norm of B's parameters: no inner product is larger.

        Raises:
            ValueError: a tensor holds NaN or infinity, or numbers whose squares float64 cannot add up.
        """
        squares = InnerSum(), InnerSum()
        if self.ranks.is_group:
            for pair in self._shared(self.names(), self._squares):
                for total, number in zip(squares, pair, strict=True):
                    total.add_number(number)
        else:
            for name in self.names():
                if name in self.survey:
                    for total, number in zip(squares, self.survey[name], strict=False):
                        total.add_number(number)
                    continue
                for total, state in zip(squares, (self.a, self.b), strict=True):
                    tensor = state[name]
                    total.add(tensor, tensor, {})
        scale = math.prod(math.sqrt(total.value()) for total in squares)
        if not math.isfinite(scale):
            self._refuse_sums()
        return scale

    def _refuse_sums(self) -> None:
        """Raise ValueError that names the first tensor whose squares have no finite sum."""
        for name in self.names():
            for model, number in zip("ab", self._squares(name), strict=True):
                if not math.isfinite(number):
                    raise ValueError(
                        f"model_{model}: the squares of {name!r} add up to {number}, and weights are compared by such sums; "
                        "it holds NaN or infinity, or numbers that are too large: divide them, in both models alike"
                    )
        raise ValueError(
            "models: the squares of all weights add up to infinity; divide them, in both models alike"
        )

    def _known(self, names: Sequence[str], permutations: Permutations) -> dict[str, float]:
        """The inner products that a rank has noted, or that the survey has for units as they are."""

        def holds(then: Permutations) -> bool:
            return all(torch.equal(permutations[group], p) for group, p in then.items())

        known = {n: self.survey[n][2] for n in names if self._is_surveyed(n, permutations)}
        noted = {n: x for n, (then, x) in self._noted.items() if n not in known and holds(then)}
        for found in self.ranks.exchange(noted, "inner products that are known"):
            known |= found
        return known

    def _shared(self, names: Sequence[str], compute: Callable[[str], T]) -> list[T]:
        """A number of every tensor, computed by the ranks that they are dealt to."""
        owners = deal([self.headers[name].numel() for name in names], self.ranks.size)
        return self.ranks.share([partial(compute, name) for name in names], owners, "sums over tensors")

    def note(self, name: str, permutations: Permutations) -> None:
        """Keep the inner product of a tensor, which is at hand on this rank, for a later :meth:`value`."""
        if not self._is_surveyed(name, permutations):
            self._noted[name] = self._key(name, permutations), self._inner(name, permutations)

    def _is_surveyed(self, name: str, permutations: Permutations) -> bool:
        """Whether the survey has the inner product of a tensor: it has those of units as they are."""
        return name in self.survey and all(map(is_identity, self._key(name, permutations).values()))

    def _key(self, name: str, permutations: Permutations) -> Permutations:
        """The permutations that the inner product of a tensor depends on."""
        return {group: permutations[group] for _, group in self.spec.axes_of(name)}

    def _inner(self, name: str, permutations: Permutations) -> float:
        total = InnerSum()
        self._add_inner(total, name, permutations)
        return total.value()

    def _squares(self, name: str) -> tuple[float, float]:
        if name in self.survey:
            return self.survey[name][:2]
        a, b = (inner(x, x, {}) for x in (self.a[name], self.b[name]))
        return a, b

    def _add_inner(self, total: InnerSum, name: str, permutations: Permutations) -> None:
        if self.spec.has_slices(name):
            moved = permute_tensor(self.b[name], name, self.spec, permutations)
            total.add(self.a[name], moved, {})
        else:
            total.add(self.a[name], self.b[name], dimension_indices(name, self.spec, permutations))

    def _bonus(self, name: str, permutation: torch.Tensor) -> float:
        if name not in self.bonus:
            return 0.0
        matrix = self.bonus[name]
        return float(matrix.double().gather(1, permutation.to(matrix.device)[:, None]).sum())


def objective(
    a: State, b: State, spec: PermutationSpec, permutations: Permutations, include: Include
) -> float:
    """Return the inner product of A's and the permuted B's parameters that the spec moves, in float64."""
    return WeightObjective(a, b, spec, include).value(permutations)


def weight_scale(a: State, b: State, spec: PermutationSpec, include: Include) -> float:
    """Return the norm of A's times the norm of B's parameters in the objective."""
    return WeightObjective(a, b, spec, include).scale()
