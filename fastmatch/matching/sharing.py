"""How the groups of one level are shared by ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Generic, TypeVar

from fastmatch._internal.ranks import Ranks, deal

__all__ = ["Sharing"]

T = TypeVar("T")


class Sharing:
    """Deals groups out to ranks. Which rank solves a group changes no result, as long as its kept gain is there.

    Args:
        ranks: the processes.
        costs: group -> the predicted cost of a solve.
        is_bound: a group is always solved by the same rank, which keeps its gain. Otherwise the ranks solve one group each
            before they exchange what they found, so that a journal grows as the level goes on.
    """

    def __init__(self, ranks: Ranks, costs: Mapping[str, float], *, is_bound: bool) -> None:
        self.ranks, self.is_bound = ranks, is_bound
        self.owners = dict(zip(costs, deal(list(costs.values()), ranks.size), strict=True))

    def of(
        self,
        names: Sequence[str],
        compute: Callable[[str], T],
        jointly: Mapping[str, Callable[[], T]] = MappingProxyType({}),
    ) -> Iterator[tuple[str, Callable[[], T]]]:
        """Yield each group with a function that returns its result.

        The first of these functions that is called computes the results from there on. A group whose function is not called,
        because its result is known, must be skipped by all ranks.

        Args:
            names: the groups.
            compute: returns the result of a group, on one rank.
            jointly: group -> the function that all ranks call for it, where it is the only one for all of them.
        """
        bound = self.is_bound and self.ranks.size > 1
        step = max(1, len(names)) if bound else self.ranks.size
        for begin in range(0, len(names), step):
            part = names[begin : begin + step]
            owners = [self.owners[name] for name in part] if bound else list(range(len(part)))
            shared = _Part(self.ranks, part, owners, compute, jointly)
            for i, name in enumerate(part):
                yield name, partial(shared.get, i)


class _Part(Generic[T]):
    """Groups whose results are exchanged at once."""

    def __init__(
        self,
        ranks: Ranks,
        names: Sequence[str],
        owners: Sequence[int],
        compute: Callable[[str], T],
        jointly: Mapping[str, Callable[[], T]],
    ) -> None:
        self.ranks, self.names, self.owners = ranks, names, owners
        self.compute, self.jointly = compute, jointly
        self.first, self.found = 0, list[T]()

    def get(self, i: int) -> T:
        if not self.found:
            self.first = i
            left = self.names[i:]
            if len(left) == 1 and left[0] in self.jointly:
                self.found = [self.jointly[left[0]]()]
                return self.found[0]
            tasks = [partial(self.compute, name) for name in left]
            self.found = self.ranks.share(tasks, self.owners[i:], f"groups {', '.join(left)}")
        return self.found[i - self.first]
