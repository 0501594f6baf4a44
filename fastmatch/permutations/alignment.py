"""Permutations together with the spec that says where they apply, and how they were found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch
from torch import nn

from fastmatch._internal.modules import with_state
from fastmatch._internal.states import State, state_of
from fastmatch.permutations.apply import apply_permutations, check_permutations, compose, invert
from fastmatch.permutations.files import load_permutations, save_permutations
from fastmatch.spec import Permutations, PermutationSpec

__all__ = ["Alignment", "Matching"]


@dataclass(frozen=True)
class Matching:
    """The outcome of a matching.

    Attributes:
        permutations: group name -> LongTensor, ``new_b[i] = b[perm[i]]``.
        method: ``"weights"`` or ``"activations"``.
        objective: the objective before the first sweep and after every sweep (weights; float64 sums), or
            the summed similarity of the matched units before and after (activations).
        sweeps: passes over the groups.
        solves: assignment problems solved.
        skipped: solves left out because no neighbour had moved since.
        converged: no group can improve any more by itself.
    """

    permutations: Permutations
    method: str
    objective: tuple[float, ...]
    sweeps: int = 1
    solves: int = 0
    skipped: int = 0
    converged: bool = True


@dataclass(frozen=True, repr=False)
class Alignment:
    """Permutations of one model's hidden units, with the spec that says where they apply.

    Attributes:
        permutations: group name -> LongTensor (size,); ``new_b[i] = b[perm[i]]``.
        spec: which axes move together.
        matching: how the permutations were found; None for loaded or composed ones.
    """

    permutations: Permutations
    spec: PermutationSpec
    matching: Matching | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "permutations", check_permutations(self.permutations, self.spec))

    @overload
    def apply(self, model: nn.Module) -> nn.Module: ...
    @overload
    def apply(self, model: State) -> dict[str, torch.Tensor]: ...
    def apply(self, model: nn.Module | State) -> nn.Module | dict[str, torch.Tensor]:
        """A new model (or state dict) with its units reordered; ``model`` is left as it was."""
        moved = apply_permutations(state_of(model, "model"), self.spec, self.permutations)
        return with_state(model, moved) if isinstance(model, nn.Module) else moved

    def __repr__(self) -> str:
        moved = sum(int((p != torch.arange(len(p))).sum()) for p in self.permutations.values())
        total = sum(map(len, self.permutations.values()))
        text = f"Alignment({len(self.permutations)} groups, {moved} of {total} units moved"
        if self.matching is not None:
            first, last = self.matching.objective[0], self.matching.objective[-1]
            text += f", {self.matching.method} objective {first:.6g} -> {last:.6g}"
        return text + ")"

    def invert(self) -> Alignment:
        """The alignment that undoes this one."""
        return Alignment(invert(self.permutations, self.spec), self.spec)

    def compose(self, then: Alignment) -> Alignment:
        """One alignment equal to applying this one and then ``then``."""
        return Alignment(compose(self.permutations, then.permutations, self.spec), self.spec)

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Writes permutations and spec as .safetensors; an existing file is replaced only with ``force``."""
        save_permutations(self.permutations, self.spec, path, force=force)

    @classmethod
    def load(cls, path: str | Path) -> Alignment:
        """What :meth:`save` wrote."""
        return cls(*load_permutations(path))
