"""States on disk, of which the tensors at hand are held in memory until the next ones are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from fastmatch._internal.states import State, headers_of

__all__ = ["HeldState", "hold"]

HELD_BYTES = 1_150_000_000
"""Bytes of a group's tensors and its gain up to which the tensors are held while the group is solved. A layer of 11,008 units and
a stream of 4096 with two embeddings of 32,000 words fit."""


class HeldState(Mapping[str, torch.Tensor]):
    """A state whose tensors are read when they are asked for. Those that are to be held are read once.

    Args:
        state: the tensors on disk.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self.headers = headers_of(state)
        self.device = getattr(state, "device", None)
        self._wanted: set[str] = set()
        self._tensors: dict[str, torch.Tensor] = {}

    def want(self, names: Sequence[str]) -> None:
        """Hold these tensors from now on once they have been read, and no others."""
        self._wanted = set(names)
        self._tensors = {name: t for name, t in self._tensors.items() if name in self._wanted}

    def holds(self, name: str) -> bool:
        """Return whether a tensor is in memory."""
        return name in self._tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._tensors:
            return self._tensors[name]
        tensor = self.state[name]
        if name in self._wanted:
            self._tensors[name] = tensor
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)

    def __contains__(self, name: object) -> bool:
        return name in self.state


def hold(states: Sequence[HeldState], names: Sequence[str], size: int) -> None:
    """Hold the tensors of a group of ``size`` units in all states, as many as there is memory for beside its gain."""
    left, chosen = HELD_BYTES - 4 * size**2, []
    for name in dict.fromkeys(names):
        left -= sum(s.headers[name].numel() * s.headers[name].element_size() for s in states)
        if left < 0:
            break
        chosen.append(name)
    for state in states:
        state.want(chosen)
