"""How the assignment of a gain is solved: on its GPU, by compiled kernels, or in numpy while that takes less time than loading them."""

from __future__ import annotations

import torch

from fastmatch.assignment import Assignment, CandidateLists, Solver, solve
from fastmatch.assignment.shortest_paths import ShortestPaths, TooManyPops
from fastmatch.assignment.small_dense import is_loaded
from fastmatch.assignment.solve import SMALL
from fastmatch.assignment.uniqueness import is_only_optimum
from fastmatch.spec import PermutationSpec

__all__ = ["plain_solver", "solve_gain"]

LISTED = 2048
"""Units from which a gain stays on its GPU, and lists of candidates come to the host in its place."""

FEW_UNITS = 128
"""Units of all groups together up to which no solver is compiled or loaded. A solve of a group of 64 takes 1 ms then, not
0.1 ms; loading takes half a second in every process, and compiling some seconds. The choice depends on the network
alone, so results do not depend on what was loaded before. Only weight matching makes it: activations of dead units tie, and
partial merges match them by the default solver."""

LOADING = 40_000
"""Columns that numpy's paths pop in about the time that kernels take to load from their cache: 4 to 10 us each."""

COMPILING = 1_000_000
"""The same for half of the time that they take to compile."""


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


def solve_gain(
    gain: torch.Tensor, warm_start: Assignment | None = None, solver: Solver | None = None
) -> Assignment:
    """Return the assignment of largest gain.

    Without a ``solver``, the first gains of a process are solved in numpy, until that has taken about as long as loading the
    compiled kernels does. An assignment that comes so is proved to be the only best one. Thus nothing depends on what
    a process has done before.

    Args:
        gain: (n, n), float32 or float64.
        warm_start: the solution of a similar gain.
        solver: the solver; None for the default of the gain.
    """
    if solver is None:
        found = _solved_in_numpy(gain, warm_start)
        if found is not None:
            return found
        solver = CandidateLists() if gain.is_cuda and len(gain) >= LISTED else None
    return solve(gain, maximize=True, warm_start=warm_start, solver=solver)


def _solved_in_numpy(gain: torch.Tensor, warm_start: Assignment | None) -> Assignment | None:
    """Return the assignment if numpy finds it in good time and it is the only best one; else None."""
    if gain.is_cuda or gain.numel() > SMALL or is_loaded():
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
