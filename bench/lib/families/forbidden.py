"""Missing pairs: +inf, and large numbers in its place. A matching without +inf always exists."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.spatial.distance import cdist

from bench.lib.families.family import Family, Generator, Maker, planted

INF = np.inf
LARGEST = float(np.finfo(np.float64).max)


def sparse(share: float, missing: float, feasible: bool = True) -> Maker:
    """A share of the pairs costs up to 1; a planted matching costs up to 2; the rest is missing."""

    def make(g: Generator, n: int, m: int) -> np.ndarray:
        cost = np.where(g.random((n, m)) < share, g.random((n, m)), missing)
        if feasible:
            rows, columns = planted(g, n, m)
            cost[rows, columns] = 1 + g.random(len(rows))
        return cost

    return make


def gated(missing: float, related: bool) -> Maker:
    """Distances in the plane, missing beyond a gate. Related sets are one set and its noisy copy."""

    def make(g: Generator, n: int, m: int) -> np.ndarray:
        k = max(n, m)
        gate = 0.9 / max(k, 1) ** 0.5
        p = g.random((k, 2))
        q = p + 0.2 * gate * g.standard_normal((k, 2)) if related else g.random((k, 2))
        order = g.permutation(k)[:m]
        cost = cdist(p[:n], q[order])
        kept = cost < gate
        if missing == INF:
            kept[planted(g, n, m)] = True
            partner = np.arange(n)[:, None] == order
            kept |= partner
        return np.where(kept, cost, missing)

    return make


def one_missing(g: Generator, n: int, m: int) -> np.ndarray:
    cost = g.lognormal(0, 1, (n, m))
    if n * m > 1 and max(n, m) > 1:
        cost[g.integers(n), g.integers(m)] = INF
    return cost


def itself(missing: float) -> Maker:
    """Distances of a set to itself, where nobody may take itself."""

    def make(g: Generator, n: int, m: int) -> np.ndarray:
        points = g.random((max(n, m), 2))
        cost = cdist(points[:n], points[:m])
        if max(n, m) > 1:
            np.fill_diagonal(cost, missing)
        return cost

    return make


def where(allowed: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Maker:
    """Random costs where ``allowed(i, j)``; it must allow the diagonal."""

    def make(g: Generator, n: int, m: int) -> np.ndarray:
        kept = allowed(np.arange(n)[:, None], np.arange(m)[None])
        return np.where(kept, g.random((n, m)), INF)

    return make


def missing_blocks(g: Generator, n: int, m: int) -> np.ndarray:
    """Ten departments without any exchange, as many rows as columns in each where the matrix is square."""
    k = min(n, m)
    row, column = (np.where(np.arange(s) < k, np.arange(s) * 10 // max(k, 1), 0) for s in (n, m))
    cost = np.where(row[:, None] == column, g.random((n, m)), INF)
    return cost[g.permutation(n)][:, g.permutation(m)]


FAMILIES = (
    Family("half forbidden", "constraints", sparse(0.5, INF), forbids=True),
    Family("sparse, 10%", "sparse graphs, stored whole", sparse(0.1, INF), forbids=True),
    Family("sparse, 1%", "sparse graphs", sparse(0.01, INF), forbids=True),
    Family("sparse, 0.3%", "very sparse graphs", sparse(0.003, INF), forbids=True),
    Family("gated points", "trackers that forbid far pairs", gated(INF, True), forbids=True),
    Family("one forbidden", "one pair excluded, prices", one_missing, forbids=True),
    Family("itself forbidden", "pairs out of a distance matrix", itself(INF), forbids=True),
    Family("band", "neighbours in time only", where(lambda i, j: np.abs(i - j) <= 20), forbids=True),
    Family("triangle", "earlier to later only",
           where(lambda i, j: j >= i - max(i.shape[0] - j.shape[1], 0)), forbids=True),
    Family("departments", "no exchange between departments", missing_blocks, forbids=True),
    Family("sparse, sentinel 1e6", "sparse graphs with a large number", sparse(0.01, 1e6)),
    Family("sparse, sentinel that must be used", "trackers with too few pairs", sparse(0.002, 1e6, False)),
    Family("sparse, sentinel 1e9", "the same, a larger number", sparse(0.01, 1e9), None),
    Family("sparse, largest sentinel", "numpy's largest float as forbidden", sparse(0.05, LARGEST), None),
    Family("gated points, 1e5", "trackers with a sentinel, unrelated sets", gated(1e5, False)),
    Family("gated points, 1e5, related", "trackers with a sentinel", gated(1e5, True)),
    Family("gated points, 1e9", "trackers with a larger sentinel", gated(1e9, False), None),
    Family("gated points, largest", "trackers with numpy's largest float", gated(LARGEST, True), None),
    Family("itself at 1e6", "pairs out of a distance matrix, with a sentinel", itself(1e6)),
)  # fmt: skip
