"""Greedy initialization: the order in which groups are first matched, each by the weights that are known by then.

A weight is known to a group if every other axis of its tensor is matched already or is not permuted. The others would
enter the group's gain in an arbitrary order, which is noise.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from fastmatch.matching.objective import WeightObjective
from fastmatch.spec import Axis, Group

__all__ = ["Step", "greedy_order"]


@dataclass(frozen=True)
class Step:
    """The first match of one group.

    Attributes:
        group: the group.
        axes: the axes that enter its gain.
        is_complete: whether all of its weights are known, so that it need not be solved again at once.
    """

    group: Group
    axes: list[Axis]
    is_complete: bool


@dataclass(frozen=True)
class _Term:
    """One axis of a group, the elements of its tensor, and the groups whose order they depend on."""

    axis: Axis
    elements: int
    others: set[str]


def greedy_order(problem: WeightObjective, names: Collection[str]) -> list[Step]:
    """Return the steps that match the top-level groups ``names`` one after the other.

    Each step takes the group with the largest fraction of known weights; the first of ``names`` if several tie. The
    gain of a group with subgroups, or without any known weight, takes all of its axes.
    """
    terms = {name: _terms(problem, name) for name in names}
    waiting = dict.fromkeys(names)
    steps = []
    while waiting:
        known = {name: [x for x in terms[name] if x.others.isdisjoint(waiting)] for name in waiting}
        fraction = {name: _elements(known[name]) / max(1, _elements(terms[name])) for name in waiting}
        name = max(waiting, key=lambda n: fraction[n])
        del waiting[name]
        has_subgroups = len(problem.grouping[name]) > 1
        chosen = known[name] if known[name] and not has_subgroups else terms[name]
        is_complete = len(known[name]) == len(terms[name])
        steps.append(Step(problem.spec.groups[name], [x.axis for x in chosen], is_complete))
    return steps


def _terms(problem: WeightObjective, name: str) -> list[_Term]:
    terms = []
    for axis in problem.axes(problem.spec.groups[name]):
        others = {
            problem.top_level(g)
            for x, g in problem.spec.axes_of(axis.parameter)
            if problem.top_level(g) != name or (g == name and x.dim != axis.dim)
        }
        terms.append(_Term(axis, problem.headers[axis.parameter].numel(), others))
    return terms


def _elements(terms: list[_Term]) -> int:
    return sum(term.elements for term in terms)
