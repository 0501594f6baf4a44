"""Assignment problems by name and seed, for the benchmarks and the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

Generator = np.random.Generator


def factors(g: Generator, n: int, m: int, rank: int, spread: float = 0.0) -> np.ndarray:
    """Negated inner products of Gaussian rows. Their norms are log-normal with the given spread."""
    a, b = g.standard_normal((n, rank), np.float32), g.standard_normal((m, rank), np.float32)
    for rows in (a, b):
        rows *= np.exp(spread * g.standard_normal((len(rows), 1))).astype(np.float32)
    return -(a @ b.T)


def siblings(g: Generator, n: int, m: int, sigma: float, rank: int = 256) -> np.ndarray:
    """Negated inner products of rows with shuffled, noisy copies of themselves."""
    a = g.standard_normal((max(n, m), rank), np.float32)
    b = a + sigma * g.standard_normal(a.shape, np.float32)
    return -(a[:n] @ b[g.permutation(len(b))[:m]].T)


def dead(g: Generator, n: int, m: int) -> np.ndarray:
    """A tenth of the rows and of the columns are constant."""
    cost = factors(g, n, m, 512)
    cost[g.random(n) < 0.1] = 0
    cost[:, g.random(m) < 0.1] = 0
    return cost


def duplicated(g: Generator, n: int, m: int) -> np.ndarray:
    """Rows and columns that occur several times."""
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
    """Return the instance of a kind: an (n, m) cost to be minimized."""
    return KINDS[kind](np.random.default_rng([seed, n]), n, n if m is None else m)


def trained_gains(width: int, cache: Path) -> dict[str, np.ndarray]:
    """Return costs of the last hidden layer of two networks trained on digits: negated gain, correlation, covariance.

    For an MLP and for a convolutional network with ``width`` units in that layer. Networks of seeds 0 and 1 are trained
    once per width; their costs are kept under ``cache``.
    """
    path = cache / f"trained_{width}.npz"
    if path.exists():
        with np.load(path) as kept:
            return dict(kept)
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    builders = {
        "MLP": lambda: (
            nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
            nn.Sequential(nn.Linear(width, 10)),
            2,
        ),
        "conv net": lambda: (
            nn.Sequential(
                nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, width // 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(width // 8, width, 3, padding=1), nn.ReLU(),
            ),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)),
            4,
        ),
    }  # fmt: skip
    kept: dict[str, np.ndarray] = {}
    for name, build in builders.items():
        weights, hidden = [], []
        for seed in (0, 1):
            torch.manual_seed(seed)
            body, head, layer = build()
            descent = torch.optim.Adam([*body.parameters(), *head.parameters()], 1e-3)
            for _ in range(6):
                for part in torch.randperm(len(x)).split(128):
                    descent.zero_grad()
                    nn.functional.cross_entropy(head(body(x[part])), y[part]).backward()
                    descent.step()
            with torch.no_grad():
                weights.append((body[layer].weight.flatten(1), head[-1].weight))
                hidden.append(body(x[:400]).reshape(400, width, -1).movedim(1, 2).reshape(-1, width))
        (w0, o0), (w1, o1) = weights
        h0, h1 = (h - h.mean(0) for h in hidden)
        covariance = h0.T @ h1 / len(h0)
        norms = [h.norm(dim=0).clamp_min(1e-12) / len(h) ** 0.5 for h in (h0, h1)]
        kept[f"{name} weights"] = -(w0 @ w1.T + o0.T @ o1).detach().numpy()
        kept[f"{name} correlation"] = -(covariance / norms[0][:, None] / norms[1]).numpy()
        kept[f"{name} covariance"] = -covariance.numpy()
    cache.mkdir(parents=True, exist_ok=True)
    np.savez(path, **kept)
    return kept
