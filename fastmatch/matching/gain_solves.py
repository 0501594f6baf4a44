"""How the assignment of a gain is solved: on its GPU, by compiled kernels, or in numpy while that takes less time than loading them."""

from __future__ import annotations

import torch

from fastmatch._internal.ranks import current as current_ranks
from fastmatch.assignment import Assignment, CandidateLists, Solver, solve
from fastmatch.assignment.shortest_paths import ShortestPaths, TooManyPops
from fastmatch.assignment.small_dense import is_loaded
from fastmatch.assignment.uniqueness import is_only_optimum
from fastmatch.spec import PermutationSpec

__all__ = ["GainSolver", "plain_solver", "solve_gain"]

LISTED = 2048
"""Units from which a gain stays on its GPU, and lists of candidates come to the host in its place."""

FEW_UNITS = 128
"""Units of all groups together up to which no solver is compiled or loaded. A solve of a group of 64 takes 1 ms then, not
0.1 ms; loading takes half a second in every process, and compiling some seconds. The choice depends on the network
alone, so results do not depend on what was loaded before. Only weight matching makes it: activations of dead units tie, and
partial merges match them by the default solver."""

IN_NUMPY = 1 << 20
"""Entries of a gain up to which numpy's paths are tried."""

LOADING = 40_000
"""Columns that numpy's paths pop in about the time that kernels take to load from their cache: 4 to 10 us each."""

COMPILING = 1_000_000
"""Columns that numpy's paths pop in half of the time that kernels take to compile."""

RECORDED = 1 << 26
"""Bytes of gains that are kept to be solved again by kernels."""


class _Patience:
    """The columns that numpy's paths may still pop in this process, before kernels are loaded or compiled for its gains."""

    def __init__(self) -> None:
        self.pops, self.is_longest = LOADING, False

    def left(self) -> int:
        """Return how many columns may be popped. Kernels that are not on disk are worth more of them."""
        if self.pops <= 0 and not self.is_longest:
            from fastmatch_kernels._numba.cache import is_kept
            from fastmatch_kernels.lap.small import solve_matrix

            self.is_longest = True
            self.pops += 0 if is_kept(solve_matrix) else COMPILING
        return max(self.pops, 0)


_patience = _Patience()


def plain_solver(spec: PermutationSpec) -> Solver | None:
    """Return the solver of every group of a small network; None for the default one of each gain."""
    return ShortestPaths() if sum(group.size for group in spec.groups.values()) <= FEW_UNITS else None


def solve_gain(gain: torch.Tensor) -> Assignment:
    """Return the assignment of largest gain, by numpy while that takes less time than loading the compiled kernels.

    An assignment that numpy finds is proved to be the only best one. Thus it does not depend on what a process has done before.

    Args:
        gain: (n, n), float32 or float64.
    """
    found = None if current_ranks().is_group else _solved_in_numpy(gain, None)
    return solve(gain, maximize=True, solver=_default(gain)) if found is None else found


class GainSolver:
    """Solves the gains of one ascent, each from the last solution of its group, as :func:`solve_gain` does.

    Where several assignments are equally good, a kernel's choice depends on the duals that it starts from. So a group's gains that
    numpy has solved are solved by kernels too, before these solve another one.

    Args:
        solver: the solver of all gains; None for the default one of each.
        waits: whether numpy may solve the first gains. Their gaps differ from a kernel's by rounding, which ranks and journals
            would compare.
    """

    def __init__(self, solver: Solver | None, *, waits: bool) -> None:
        self.solver, self.waits = solver, waits and solver is None
        self.recorded: dict[str, list[torch.Tensor]] = {}
        self.room = RECORDED

    def solve(self, name: str, gain: torch.Tensor, last: Assignment | None) -> Assignment:
        """Return the assignment of largest gain.

        Args:
            name: the group.
            gain: (n, n), float32 or float64.
            last: the last solution of the group.
        """
        size = gain.numel() * gain.element_size()
        if self.waits and size <= self.room:
            found = _solved_in_numpy(gain, last)
            if found is not None:
                self.recorded.setdefault(name, []).append(gain.clone())
                self.room -= size
                return found
        solver = self.solver or _default(gain)
        return solve(gain, maximize=True, warm_start=self.by_kernels(name, last), solver=solver)

    def by_kernels(self, name: str, last: Assignment | None) -> Assignment | None:
        """Return the last solution of a group, with the duals that kernels find from its first gain on."""
        if name in self.recorded:
            last = None
            for gain in self.recorded.pop(name):
                last = solve(gain, maximize=True, warm_start=last)
                self.room += gain.numel() * gain.element_size()
        return last


def _default(gain: torch.Tensor) -> Solver | None:
    """Return the solver of a gain: lists for a large one on a GPU, which stays there; None for what :func:`solve` chooses."""
    return CandidateLists() if gain.is_cuda and len(gain) >= LISTED else None


def _solved_in_numpy(gain: torch.Tensor, warm_start: Assignment | None) -> Assignment | None:
    """Return the assignment if numpy finds it in good time and it is the only best one; else None."""
    if gain.device.type != "cpu" or gain.numel() > IN_NUMPY or is_loaded():
        return None
    while (most := _patience.left()) > 0:
        try:
            found = solve(gain, maximize=True, warm_start=warm_start, solver=ShortestPaths(most))
        except TooManyPops:
            _patience.pops = 0
            continue
        _patience.pops -= int(found.stats.get("pops", 0)) + len(gain)
        return found if is_only_optimum(gain.numpy(), found, maximize=True) else None
    return None
