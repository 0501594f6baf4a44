"""What matching of networks, embeddings and graphs asks to be assigned."""

from __future__ import annotations

import numpy as np

from bench.lib.families.family import Family, Generator, Maker, repeated


def gains(rank: int, spread: float = 0.0) -> Maker:
    """Negated inner products of independent units, whose norms are log-normal with the given spread."""

    def make(g: Generator, n: int, m: int) -> np.ndarray:
        a, b = (g.standard_normal((k, rank)) * np.exp(spread * g.standard_normal((k, 1))) for k in (n, m))
        return -(a @ b.T)

    return make


def siblings(noise: float, rank: int = 256) -> Maker:
    """Negated inner products of units with shuffled, noisy copies."""

    def make(g: Generator, n: int, m: int) -> np.ndarray:
        a = g.standard_normal((max(n, m), rank))
        b = a + noise * g.standard_normal(a.shape)
        return -(a[:n] @ b[g.permutation(len(b))[:m]].T)

    return make


def widened(times: int) -> Maker:
    """Both networks were widened: every unit comes that many times, in random order."""

    def make(g: Generator, n: int, m: int) -> np.ndarray:
        a, b = (g.standard_normal((-(-k // times), 64)) for k in (n, m))
        return -(a[repeated(g, len(a), n)] @ b[repeated(g, len(b), m)].T)

    return make


def silent(rows: float, columns: float) -> Maker:
    """The given shares of the units are zero."""

    def make(g: Generator, n: int, m: int) -> np.ndarray:
        cost = gains(64)(g, n, m)
        cost[g.random(n) < rows] = 0
        cost[:, g.random(m) < columns] = 0
        return cost

    return make


def tied_heads(g: Generator, n: int, m: int) -> np.ndarray:
    """Attention with shared keys: groups of four columns agree, over groups of rows with a common part."""
    a = np.repeat(g.standard_normal((-(-n // 8), 64)), 8, 0)[:n] + 0.1 * g.standard_normal((n, 64))
    b = np.repeat(g.standard_normal((-(-m // 4), 64)), 4, 0)[:m]
    return -(a @ b.T)


def correlations(g: Generator, n: int, m: int) -> np.ndarray:
    """Negated correlations of rectified units over 200 samples; a tenth of the units is silent."""
    x = g.standard_normal((200, 32))
    sides = []
    for k in (n, m):
        h = np.maximum(x @ g.standard_normal((32, k)) - np.where(g.random(k) < 0.1, 99.0, 0.5), 0)
        h -= h.mean(0)
        sides.append(h / np.maximum(np.linalg.norm(h, axis=0), 1e-12))
    return -(sides[0].T @ sides[1])


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def embeddings(offset: float = 0.0, twice: bool = False) -> Maker:
    """Negated cosines of sentences about forty topics."""

    def make(g: Generator, n: int, m: int) -> np.ndarray:
        topics = g.standard_normal((40, 128))
        a, b = (
            unit(topics[g.integers(40, size=k)] + 0.2 * g.standard_normal((k, 128)) + offset) for k in (n, m)
        )
        if twice:
            a, b = a[repeated(g, -(-n // 2), n)], b[repeated(g, -(-m // 2), m)]
        return -(a @ b.T)

    return make


def confusion(g: Generator, n: int, m: int) -> np.ndarray:
    """Negated counts: clusters that found most of the classes again."""
    k = 20 * max(n, m)
    label, guess = g.integers(0, n, k), g.integers(0, m, k)
    kept = g.random(k) < 0.7
    guess[kept] = g.permutation(max(n, m))[label[kept]] % m
    counts = np.zeros((n, m), np.int64)
    np.subtract.at(counts, (label, guess), 1)
    return counts


def soft_permutation(sharpness: float) -> Maker:
    """Negated entries after ten rounds of Sinkhorn: what learned permutations are rounded from."""

    def make(g: Generator, n: int, m: int) -> np.ndarray:
        logits = g.standard_normal((n, m))
        k = min(n, m)
        logits[g.permutation(n)[:k], g.permutation(m)[:k]] += 3
        p = np.exp(sharpness * logits)
        for _ in range(10):
            p /= p.sum(1, keepdims=True)
            p /= p.sum(0)
        return -p

    return make


def graph(g: Generator, k: int, hubs: bool) -> np.ndarray:
    """The adjacency of a random graph of mean degree about 10; with hubs, degrees follow a power law."""
    weight = g.pareto(1.2, k) + 0.2 if hubs else np.ones(k)
    chance = np.minimum(10 * np.outer(weight, weight) / (weight.mean() ** 2 * max(k, 1)), 1)
    upper = np.triu(g.random((k, k), np.float32) < chance, 1)
    return (upper | upper.T).astype(np.float32)


def graph_gradient(hubs: bool, barycentre: bool) -> Maker:
    """The gradient -A P B of graph matching, at a random permutation or at the barycentre, where it is d_i d_j / k."""

    def make(g: Generator, n: int, m: int) -> np.ndarray:
        a, b = graph(g, n, hubs), graph(g, m, hubs)
        if barycentre:
            return -np.outer(a.sum(1), b.sum(1)).astype(np.float64) / max(n, m)
        k = min(n, m)
        return -(a[:, g.permutation(n)[:k]] @ b[g.permutation(m)[:k]]).astype(np.float64)

    return make


def hubs(g: Generator, n: int, m: int) -> np.ndarray:
    """One column in twenty suits every row far better than the others."""
    cost = g.standard_normal((n, m))
    cost[:, g.random(m) < 0.05] -= 10
    return cost


FAMILIES = (
    Family("gains, rank 1", "weights of networks with one input", gains(1)),
    Family("gains, rank 2", "networks on the plane", gains(2)),
    Family("gains, rank 8", "networks with few inputs", gains(8)),
    Family("gains, rank 32", "low-rank adapters", gains(32)),
    Family("gains, rank 256", "independently trained networks", gains(256)),
    Family("gains, log-normal 8", "units of unequal size, few inputs", gains(8, 1.0)),
    Family("gains, log-normal 32", "units of unequal size", gains(32, 1.0)),
    Family("gains, log-normal 256", "units of unequal size, many inputs", gains(256, 1.0)),
    Family("siblings, noise 0", "a shuffled copy", siblings(0.0)),
    Family("siblings, noise 0.3", "a fine-tuned copy", siblings(0.3)),
    Family("siblings, noise 1", "a copy trained on", siblings(1.0)),
    Family("siblings, noise 3", "networks of a common start", siblings(3.0)),
    Family("widened twice", "widened networks", widened(2)),
    Family("widened eight times", "networks widened eightfold", widened(8)),
    Family("tenth of the units zero", "pruned networks", silent(0.1, 0.1)),
    Family("half of the units zero", "pruned networks, half gone", silent(0.5, 0.5)),
    Family("zero units, unequal", "a pruned and a dense network", silent(0.3, 0.03)),
    Family("tied heads", "attention with shared keys", tied_heads),
    Family("correlations", "matching by activations", correlations),
    Family("embeddings", "sentences of two languages", embeddings()),
    Family("embeddings, each twice", "sentences with repetitions", embeddings(twice=True)),
    Family("embeddings, narrow cone", "anisotropic embeddings", embeddings(3.0), 1e6),
    Family("confusion matrix", "clusters against classes", confusion, 1),
    Family("soft permutation", "learned permutations, rounded", soft_permutation(1.0), 1e6),
    Family("sharp soft permutation", "learned permutations near their end", soft_permutation(10.0), 1e6),
    Family("graph gradient", "graph matching on its way", graph_gradient(False, False), 1),
    Family("graph gradient, hubs", "the same on a web", graph_gradient(True, False), 1),
    Family("graph barycentre", "graph matching's first step", graph_gradient(False, True), 1e4),
    Family("graph barycentre, hubs", "the same on a web", graph_gradient(True, True), 1e4),
    Family("hubs", "columns that every row wants", hubs),
)
