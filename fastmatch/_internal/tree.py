"""Merges in a fixed tree over blocks: the same sums, bit for bit, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar, cast

from fastmatch._internal.ranks import Ranks
from fastmatch._internal.shared_data import owner_of

__all__ = ["MergeTree"]

T = TypeVar("T")


class MergeTree(Generic[T]):
    """A binary tree whose leaves are blocks 0, 1, ...: node i of a level is merged of nodes 2i and 2i + 1 below it.

    A rank has consecutive blocks, merges what it can at once, and holds one node by level. Then the rank of a right node
    sends it to that of the left one. A left node without a right one is taken as it is.

    Args:
        ranks: the processes.
        blocks: the number of leaves.
        merge: returns two merged into one; it may change the first.
    """

    def __init__(self, ranks: Ranks, blocks: int, merge: Callable[[T, T], T]) -> None:
        self.ranks, self.blocks, self.merge = ranks, blocks, merge
        self.nodes: dict[tuple[int, int], T] = {}

    def add(self, block: int, leaf: T) -> None:
        """Add the next block of this rank."""
        level, index = 0, block
        while index % 2 and (level, index - 1) in self.nodes:
            leaf = self.merge(self.nodes.pop((level, index - 1)), leaf)
            level, index = level + 1, index // 2
        self.nodes[level, index] = leaf

    def root(self) -> T:
        """Return what all blocks are merged into, on all ranks."""
        found = self.first()
        return self.ranks.broadcast(lambda: cast("T", found), "merged statistics")  # rank 0 has it

    def first(self) -> T | None:
        """Return what all blocks are merged into on rank 0, and None on the others. All ranks must make the call."""
        level = 0
        while 1 << level < self.blocks:
            for index in range(0, -(-self.blocks >> level), 2):
                self._join(level, index)
            level += 1
        return self.nodes.get((level, 0))

    def _join(self, level: int, index: int) -> None:
        """Merge a left node with the right one, on the rank of the left one."""
        left, right = ((i << level, (level, i)) for i in (index, index + 1))
        owner = self._owner(left[0])
        if right[0] >= self.blocks:
            if owner == self.ranks.rank:
                self.nodes[level + 1, index // 2] = self.nodes.pop(left[1])
            return
        source = self._owner(right[0])
        if source == owner == self.ranks.rank:
            if right[1] in self.nodes:  # else it was merged when it was added
                merged = self.merge(self.nodes.pop(left[1]), self.nodes.pop(right[1]))
                self.nodes[level + 1, index // 2] = merged
        elif source == self.ranks.rank:
            self.ranks.send(self.nodes.pop(right[1]), owner)
        elif owner == self.ranks.rank:
            other = self.ranks.receive(source)
            self.nodes[level + 1, index // 2] = self.merge(self.nodes.pop(left[1]), other)

    def _owner(self, block: int) -> int:
        return owner_of(block, self.blocks, self.ranks.size)
