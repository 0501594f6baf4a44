"""Random costs given by factors: copies, zero units, low rank, extreme scales."""

from __future__ import annotations

import numpy as np

from fastmatch.assignment import CandidateLists, FactorCost
from helpers.fuzz.problems import Problem, shape

Generator = np.random.Generator


def _copies(g: Generator, x: np.ndarray) -> np.ndarray:
    kept = max(1, len(x) // int(g.integers(2, 9)))
    return x[g.permutation(np.arange(len(x)) % kept)]


def _zeros(g: Generator, x: np.ndarray) -> np.ndarray:
    return x * (g.random((len(x), 1)) > g.choice([0.1, 0.5]))


def _signs(g: Generator, x: np.ndarray) -> np.ndarray:
    return np.sign(x)


def _as_they_are(g: Generator, x: np.ndarray) -> np.ndarray:
    return x


CHANGES = {"independent": _as_they_are, "copies": _copies, "zero units": _zeros, "signs": _signs}


def factor_problem(g: Generator, largest: int | None = None) -> Problem:
    """Return a problem whose cost is a :class:`FactorCost`. Its base is computed in float64 from the factors as stored."""
    n, m = shape(g)
    if largest is not None:
        n, m = min(n, largest), min(m, largest)
    rank = int(g.choice([1, 2, 8, 64]))
    metric = str(g.choice(["dot", "dot", "l2", "l1"]))
    dtype = np.dtype(g.choice(["float32", "float64"]))
    names = [str(g.choice(list(CHANGES))) for _ in range(2)]
    exponent = int(g.choice([0, 0, 0, -22, -12, 8] if dtype == np.float32 else [0, 0, 0, -75, -22, 75]))
    sides = (CHANGES[k](g, g.standard_normal((rows, rank))) for k, rows in zip(names, (n, m), strict=True))
    a, b = ((10.0 ** (exponent / 2) * x).astype(dtype) for x in sides)
    left, right = a.astype(np.float64), b.astype(np.float64)
    if metric == "dot":
        base = left @ right.T
    else:
        order = 1 if metric == "l1" else 2
        base = np.stack([(np.abs(row - right) ** order).sum(1) for row in left])
    maximize = bool(metric == "dot" and g.random() < 0.7)
    lists = bool(g.random() < 0.5)
    told = (
        f"factors, {metric}, rank {rank}, {names[0]} and {names[1]}, scale 1e{exponent}, {n} x {m}, {dtype}"
    )
    told += (", maximized" if maximize else "") + (", CandidateLists" if lists else "")
    # Products are rounded; a sum of such entries is exact to this share of their sizes.
    size = float((np.abs(left).sum(1).max(initial=0)) * np.abs(right).max(initial=0))
    return Problem(
        told, FactorCost([(a, b)], metric), maximize, -base if maximize else base,  # type: ignore[arg-type]
        solver=CandidateLists if lists else None, scale=16 * (1 + size ** (1 if metric == "l2" else 0)) * size,
        may_refuse=("overflow",),
    )  # fmt: skip
