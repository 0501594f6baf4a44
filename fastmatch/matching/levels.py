"""Levels of an order of groups: those of one level share no tensor, so they can be solved at the same time.

A group's best permutation depends only on the groups that share a tensor with it. So a sweep that visits the groups level
by level finds what the sweep in the given order finds, and so do processes that share each level. Seen as a graph, groups
that share a tensor are joined by an edge, and the levels are a colouring of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

__all__ = ["levels_of"]


def levels_of(
    order: Iterable[str], coupled: Callable[[str], Collection[str]], cost: Callable[[str], float]
) -> list[list[str]]:
    """Return the groups of ``order`` in levels: each group is in a later level than the coupled ones before it.

    Args:
        order: names of groups.
        coupled: returns the groups that share a tensor with one.
        cost: of a group. The costly ones of a level come first, and those of equal cost in their order.
    """
    level: dict[str, int] = {}
    for name in order:
        level[name] = 1 + max((level[other] for other in coupled(name) if other in level), default=-1)
    found: list[list[str]] = [[] for _ in range(max(level.values(), default=-1) + 1)]
    for name, index in level.items():
        found[index].append(name)
    return [sorted(names, key=lambda name: -cost(name)) for names in found]
