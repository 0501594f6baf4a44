"""Independent entries, and independent entries whose rows, columns or order differ."""

from __future__ import annotations

import numpy as np

from bench.lib.families.family import Family, Generator


def row_scales(g: Generator, n: int, m: int) -> np.ndarray:
    return g.random((n, m)) * g.lognormal(0, 2, (n, 1))


def column_scales(g: Generator, n: int, m: int) -> np.ndarray:
    return g.random((n, m)) * g.lognormal(0, 2, m)


def both_scales(g: Generator, n: int, m: int) -> np.ndarray:
    return g.random((n, m)) * g.lognormal(0, 1, (n, 1)) * g.lognormal(0, 1, m)


def two_kinds(g: Generator, n: int, m: int) -> np.ndarray:
    return np.where(g.random((n, m)) < 0.5, 1.0, 10.0) + g.random((n, m))


def log_probabilities(g: Generator, n: int, m: int) -> np.ndarray:
    """Negated log-probabilities: every row is a softmax of Gaussian logits."""
    logits = 3 * g.standard_normal((n, m))
    return np.log(np.exp(logits).sum(1, keepdims=True)) - logits


def symmetric(g: Generator, n: int, m: int) -> np.ndarray:
    side = max(n, m)
    half = g.random((side, side))
    return (half + half.T)[:n, :m]


def spikes(g: Generator, n: int, m: int) -> np.ndarray:
    """A hidden permutation at cost 0 under small noise; everything else costs about 1."""
    cost = 1 + 0.01 * g.standard_normal((n, m))
    k = min(n, m)
    cost[g.permutation(n)[:k], g.permutation(m)[:k]] -= 1
    return cost


FAMILIES = (
    Family("uniform", "textbook costs", lambda g, n, m: g.random((n, m))),
    Family("Gaussian", "noise", lambda g, n, m: g.standard_normal((n, m))),
    Family("exponential", "waiting times", lambda g, n, m: g.exponential(size=(n, m))),
    Family("log-normal", "prices", lambda g, n, m: g.lognormal(0, 1, (n, m))),
    Family("log-normal, wide", "prices over six decades", lambda g, n, m: g.lognormal(0, 3, (n, m))),
    Family("Cauchy", "ratios of measurements, with outliers", lambda g, n, m: g.standard_cauchy((n, m))),
    Family("Pareto", "losses with a heavy tail", lambda g, n, m: g.pareto(1.0, (n, m))),
    Family("negative", "gains written as costs", lambda g, n, m: -30 * g.random((n, m)) - 1),
    Family("two kinds", "pairs that are possible or a nuisance", two_kinds),
    Family("log-probabilities", "labels by a classifier's output", log_probabilities),
    Family("row scales", "workers of unequal speed", row_scales),
    Family("column scales", "jobs of unequal length", column_scales),
    Family("row and column scales", "workers and jobs, both unequal", both_scales),
    Family("symmetric", "a similarity of a set with itself", symmetric),
    Family("sorted rows", "costs by rank", lambda g, n, m: np.sort(g.random((n, m)), 1)),
    Family("sorted columns", "costs by rank, the other way", lambda g, n, m: np.sort(g.random((n, m)), 0)),
    Family("spikes", "a permutation found again under noise", spikes),
)
