"""Costs that come as factors: matching of large layers, whose matrix need not be stored."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bench.lib.families.family import Generator, repeated

Metric = Literal["dot", "l2"]


@dataclass(frozen=True)
class Factors:
    """A cost by its factors, to be minimized: ``a @ b.T``, or the squared distances of the rows of a and b."""

    a: np.ndarray
    b: np.ndarray
    metric: Metric

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.a), len(self.b)

    def matrix(self) -> np.ndarray:
        """Return the matrix in float64, by one product: what a solver of matrices has to make first."""
        a, b = self.a.astype(np.float64), self.b.astype(np.float64)
        if self.metric == "dot":
            return a @ b.T
        return (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * (a @ b.T)


@dataclass(frozen=True)
class FactorFamily:
    """A family of costs given by float32 factors of 64 columns or fewer."""

    name: str
    stands_for: str
    make: Callable[[Generator, int, int], tuple[np.ndarray, np.ndarray]]
    metric: Metric = "dot"

    @property
    def dtypes(self) -> tuple[str, ...]:
        return ("factors",)

    def __call__(self, n: int, m: int, seed: int, dtype: str = "factors") -> Factors:
        """Return the (n, m) instance of a seed."""
        if dtype != "factors":
            raise ValueError(f"{self.name}: expected the dtype factors, got {dtype}")
        g = np.random.default_rng([seed, n, m, zlib.crc32(self.name.encode())])
        a, b = self.make(g, n, m)
        return Factors(a.astype(np.float32), b.astype(np.float32), self.metric)


def independent(rank: int) -> Callable[[Generator, int, int], tuple[np.ndarray, np.ndarray]]:
    return lambda g, n, m: (g.standard_normal((n, rank)), g.standard_normal((m, rank)))


def copies(
    rows: int, columns: int, noise: float = 0.0
) -> Callable[[Generator, int, int], tuple[np.ndarray, np.ndarray]]:
    """Every row of a factor comes that many times, in random order, with noise of the given size."""

    def make(g: Generator, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
        sides = []
        for times, k in ((rows, n), (columns, m)):
            base = g.standard_normal((-(-k // times), 64))
            sides.append(base[repeated(g, len(base), k)] + noise * g.standard_normal((k, 64)))
        return sides[0], sides[1]

    return make


def silent(share: float) -> Callable[[Generator, int, int], tuple[np.ndarray, np.ndarray]]:
    def make(g: Generator, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
        a, b = (g.standard_normal((k, 64)) * (g.random((k, 1)) >= share) for k in (n, m))
        return a, b

    return make


def sibling(g: Generator, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    a = g.standard_normal((max(n, m), 64))
    b = a + g.standard_normal(a.shape)
    return -a[:n], b[g.permutation(len(b))[:m]]


def clusters(g: Generator, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    centres = g.standard_normal((42, 64))
    return g.standard_normal((n, 64)), centres[repeated(g, 42, m)]


def codes(g: Generator, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    return g.choice([-1.0, 1.0], (n, 64)), g.choice([-1.0, 1.0], (m, 64))


FACTOR_FAMILIES = (
    FactorFamily("factors, independent", "large layers of unrelated networks", independent(64)),
    FactorFamily("factors, rank 1", "layers with one input", independent(1)),
    FactorFamily("factors, rank 2", "layers on the plane", independent(2)),
    FactorFamily("factors, sibling", "a large layer and its shuffled, retrained copy", sibling),
    FactorFamily("factors, columns twice", "a network and a widened one", copies(1, 2)),
    FactorFamily("factors, both twice", "two widened networks", copies(2, 2)),
    FactorFamily("factors, both twice with noise", "two widened networks, trained on", copies(2, 2, 0.1)),
    FactorFamily("factors, both eight times", "networks widened eightfold", copies(8, 8)),
    FactorFamily("factors, tenth zero", "pruned networks", silent(0.1)),
    FactorFamily("factors, half zero", "pruned networks, half gone", silent(0.5)),
    FactorFamily("factors, clusters", "k-means with clusters of one size", clusters, "l2"),
    FactorFamily("factors, codes", "binary codes", codes),
)
