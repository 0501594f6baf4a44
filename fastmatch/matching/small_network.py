"""Networks of so few units that compiled solvers take longer to load than the whole alignment takes without them."""

from __future__ import annotations

from fastmatch.assignment import Solver
from fastmatch.assignment.shortest_paths import ShortestPaths
from fastmatch.spec import PermutationSpec

__all__ = ["plain_solver"]

SMALL = 128
"""Units of all groups together up to which no solver is compiled or loaded. A solve of a group of 64 takes 1 ms then, not
0.1 ms; loading takes half a second in every process, and compiling some seconds. The choice depends on the network
alone, so results do not depend on what was loaded before. Only weight matching makes it: activations of dead units tie, and
partial merges match them by the default solver."""


def plain_solver(spec: PermutationSpec) -> Solver | None:
    """Return the solver of every group of a small network; None for the default one of each gain."""
    return ShortestPaths() if sum(group.size for group in spec.groups.values()) <= SMALL else None
