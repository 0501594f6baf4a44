"""Assignment instances by name and seed: for the benchmarks and the tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Generator = np.random.Generator


def factors(g: Generator, n: int, m: int, rank: int, spread: float = 0.0) -> np.ndarray:
    """Inner products of Gaussian rows, norms log-normal with the given spread."""
    a, b = g.standard_normal((n, rank), np.float32), g.standard_normal((m, rank), np.float32)
    for rows in (a, b):
        rows *= np.exp(spread * g.standard_normal((len(rows), 1))).astype(np.float32)
    return -(a @ b.T)


def siblings(g: Generator, n: int, m: int, sigma: float, rank: int = 256) -> np.ndarray:
    """Inner products of rows with noisy copies of themselves, shuffled."""
    a = g.standard_normal((max(n, m), rank), np.float32)
    b = a + sigma * g.standard_normal(a.shape, np.float32)
    return -(a[:n] @ b[g.permutation(len(b))[:m]].T)


def dead(g: Generator, n: int, m: int) -> np.ndarray:
    """A tenth of the rows and of the columns constant."""
    cost = factors(g, n, m, 512)
    cost[g.random(n) < 0.1] = 0
    cost[:, g.random(m) < 0.1] = 0
    return cost


def duplicated(g: Generator, n: int, m: int) -> np.ndarray:
    """Rows and columns that come several times."""
    base = g.standard_normal((max(1, n // 3), max(1, m // 3)), np.float32)
    return base[g.integers(len(base), size=n)][:, g.integers(base.shape[1], size=m)]


def hubs(g: Generator, n: int, m: int) -> np.ndarray:
    """A few columns that every row wants."""
    cost = g.standard_normal((n, m), np.float32)
    cost[:, : max(1, m // 20)] -= 10
    return cost


def machol_wien(g: Generator, n: int, m: int) -> np.ndarray:
    """c_ij = (i + 1)(j + 1), the hard instance of Machol and Wien (1976)."""
    return np.outer(np.arange(1.0, n + 1), np.arange(1.0, m + 1))


def scaled(exponent: int) -> Callable[[Generator, int, int], np.ndarray]:
    return lambda g, n, m: (g.standard_normal((n, m)) * 10.0**exponent).astype(np.float32)


KINDS: dict[str, Callable[[Generator, int, int], np.ndarray]] = {
    "uniform": lambda g, n, m: g.random((n, m), np.float32),
    "gaussian": lambda g, n, m: g.standard_normal((n, m), np.float32),
    "gaussian64": lambda g, n, m: g.standard_normal((n, m)),
    "factors 8": lambda g, n, m: factors(g, n, m, 8),
    "factors 256": lambda g, n, m: factors(g, n, m, 256),
    "factors 1024": lambda g, n, m: factors(g, n, m, 1024),
    "log-normal 8": lambda g, n, m: factors(g, n, m, 8, 1.0),
    "log-normal 32": lambda g, n, m: factors(g, n, m, 32, 1.0),
    "log-normal 256": lambda g, n, m: factors(g, n, m, 256, 1.0),
    "sibling 0": lambda g, n, m: siblings(g, n, m, 0.0),
    "sibling 1": lambda g, n, m: siblings(g, n, m, 1.0),
    "sibling 3": lambda g, n, m: siblings(g, n, m, 3.0),
    "dead": dead,
    "ties": lambda g, n, m: g.integers(0, 50, (n, m)).astype(np.float32),
    "duplicated": duplicated,
    "hubs": hubs,
    "machol-wien": machol_wien,
    "constant": lambda g, n, m: np.full((n, m), g.standard_normal(), np.float32),
    "binary": lambda g, n, m: g.integers(0, 2, (n, m)).astype(np.float64),
    "integers near 2^24": lambda g, n, m: g.integers(2**24 - 9, 2**24 + 9, (n, m)),
    "denormal": lambda g, n, m: (g.integers(-40, 40, (n, m)) * 1.4e-45).astype(np.float32),
    "tiny": scaled(-20),
    "huge": scaled(20),
    "mixed ranges": lambda g, n, m: g.standard_normal((n, m)) * 10.0 ** g.integers(-6, 7, (n, m)),
    "signed zeros": lambda g, n, m: np.where(g.random((n, m)) < 0.5, -0.0, 0.0) * g.integers(0, 2, (n, m)),
    "products": lambda g, n, m: np.outer(g.random(n), g.random(m)),
}


def problem(kind: str, n: int, m: int | None = None, seed: int = 0) -> np.ndarray:
    """The instance of a kind: an (n, m) cost to be minimised."""
    return KINDS[kind](np.random.default_rng([seed, n]), n, n if m is None else m)
