"""Assignment solvers that a user could pick, by their documented functions. Each gets the array as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

Pairs = tuple[np.ndarray, np.ndarray]
Solver = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class Peer:
    """One solver: what it is called, what it takes, and how it is called.

    Args:
        name: its name in reports.
        package: the distribution that it comes in.
        solve: takes a cost matrix; returns the matched rows and their columns.
        rectangles: it takes matrices that are not square.
        forbidden: True if it takes +inf, False if it does not, "only" if it is for such matrices alone.
    """

    name: str
    package: str
    solve: Callable[[np.ndarray], Pairs]
    rectangles: bool = True
    forbidden: bool | str = True

    def takes(self, cost: np.ndarray) -> bool:
        """Return whether the solver's documentation allows this matrix."""
        if cost.shape[0] != cost.shape[1] and not self.rectangles:
            return False
        infinite = cost.dtype.kind == "f" and bool(np.isinf(cost).any())
        return bool(self.forbidden) if infinite else self.forbidden != "only"


def peers() -> dict[str, Peer]:
    """Return the installed solvers by name."""
    found = {}
    for make in (_scipy, _sparse, _lapjv, _lap, _fastlap, _lapcpp, _laprust):
        try:
            peer = make()
            version(peer.package)
        except (ImportError, PackageNotFoundError):
            continue
        found[peer.name] = peer
    return found


def solvers() -> tuple[dict[str, Solver], dict[str, str]]:
    """Return the installed solvers of square matrices (cost -> column of each row) and their versions, by name."""
    every = [peer for peer in peers().values() if peer.forbidden != "only"]
    versions = {peer.package: version(peer.package) for peer in every}
    return {peer.name: lambda cost, solve=peer.solve: solve(cost)[1] for peer in every}, versions


def batch_solvers() -> dict[str, Solver]:
    """Return the installed batch functions (stack -> columns of shape (batch, n)), by name."""
    found: dict[str, Solver] = {}
    for name, entry in (
        ("lap", "lapjvx_batch"),
        ("lap", "lapjvs_batch"),
        ("lapcpp", "lapjv_batch"),
        ("laprust", "lapjv_batch"),
        ("fastlap", "lapjvx_batch"),
    ):
        try:
            function = getattr(__import__(name), entry)
        except (ImportError, AttributeError):
            continue
        found[f"{name}.{entry}"] = lambda stack, function=function: np.stack(function(stack)[2])
    return found


def _scipy() -> Peer:
    from scipy.optimize import linear_sum_assignment

    return Peer("scipy", "scipy", linear_sum_assignment)


def _sparse() -> Peer:
    """scipy's solver of sparse graphs. It counts stored entries only and drops zeros, so costs are lifted above 0."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    def solve(cost: np.ndarray) -> Pairs:
        allowed = np.isfinite(cost)
        lifted = cost - (cost.min() - 1)
        return min_weight_full_bipartite_matching(csr_array(np.where(allowed, lifted, 0)))

    return Peer("scipy sparse", "scipy", solve, forbidden="only")


def _lapjv() -> Peer:
    import lapjv

    def solve(cost: np.ndarray) -> Pairs:
        columns = lapjv.lapjv(cost, force_doubles=cost.dtype != np.float32)[
            0
        ]  # otherwise float64 becomes float32
        return np.arange(len(columns)), columns

    return Peer("lapjv", "lapjv", solve, rectangles=False)


def _lap() -> Peer:
    import lap

    def solve(cost: np.ndarray) -> Pairs:
        columns = lap.lapjv(cost, extend_cost=cost.shape[0] != cost.shape[1])[1]
        rows = np.flatnonzero(columns >= 0)
        return rows, columns[rows]

    return Peer(
        "lap", "lapx" if hasattr(lap, "lapjvx") else "lap", solve
    )  # two packages share this module's name


def _fastlap() -> Peer:
    import fastlap

    return Peer("fastlap", "fastlap", fastlap.linear_sum_assignment, forbidden=False)


def _lapcpp() -> Peer:
    import lapcpp

    return Peer("lapcpp", "lapcpp", lambda cost: lapcpp.lapjv(cost, cost.shape[0] != cost.shape[1])[1:])


def _laprust() -> Peer:
    import laprust

    return Peer("laprust", "laprust", lambda cost: laprust.lapjv(cost, cost.shape[0] != cost.shape[1])[1:])
