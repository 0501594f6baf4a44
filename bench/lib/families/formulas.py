"""Costs given by a formula of row and column: sums, products, differences, and Monge matrices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bench.lib.families.family import Family, Generator, Maker


def of_indices(f: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Maker:
    """Costs f(i, j) of whole numbers from 1."""
    return lambda g, n, m: f(np.arange(1, n + 1)[:, None], np.arange(1, m + 1)[None])


def on_a_line(f: Callable[[np.ndarray], np.ndarray], ordered: bool) -> Maker:
    """Costs f(x - y) of random points on a line, sorted or not."""

    def make(g: Generator, n: int, m: int) -> np.ndarray:
        x, y = g.random(n), g.random(m)
        if ordered:
            x, y = np.sort(x), np.sort(y)
        return f(x[:, None] - y)

    return make


def sums(noise: float) -> Maker:
    def make(g: Generator, n: int, m: int) -> np.ndarray:
        cost = g.standard_normal((n, 1)) + g.standard_normal(m)
        return cost + noise * g.standard_normal((n, m)) if noise else cost

    return make


def scheduling(g: Generator, n: int, m: int) -> np.ndarray:
    """Job i on position j from the end adds j times its duration to the sum of completion times."""
    return np.outer(g.integers(1, 100, n), np.arange(1, m + 1))


def flow_time(g: Generator, n: int, m: int) -> np.ndarray:
    """The same on four machines of unequal speed: positions of one machine after the other."""
    speeds = np.array([1.0, 1.5, 2.0, 4.0])
    position = np.arange(m) // 4 + 1
    return np.outer(g.exponential(size=n), position / speeds[np.arange(m) % 4])


def degrees(g: Generator, n: int) -> np.ndarray:
    """Degrees of a graph with a power law."""
    return np.minimum(np.floor(2 * g.pareto(1.5, n) + 1), n)


def monge(sign: int) -> Maker:
    """A sum of non-negative densities over rectangles: Monge for -1, inverse Monge for +1; sums of a_i + b_j on top."""

    def make(g: Generator, n: int, m: int) -> np.ndarray:
        density = g.exponential(size=(n, m)) / (n * m) ** 0.5
        cost = sign * density.cumsum(0).cumsum(1)
        return cost + 10 * g.standard_normal((n, 1)) + 10 * g.standard_normal(m)

    return make


def smooth(g: Generator, n: int, m: int) -> np.ndarray:
    """Every row is a random walk."""
    return g.standard_normal((n, m)).cumsum(1) / max(m, 1) ** 0.5


FAMILIES = (
    Family("sums", "prices that do not interact", sums(0)),
    Family("sums of integers", "integer prices that do not interact",
           lambda g, n, m: g.integers(0, 1000, (n, 1)) + g.integers(0, 1000, m), 1),
    Family("sums with tiny noise", "the same after float arithmetic", sums(1e-9), None, True),
    Family("sums with noise", "biases of rows and columns over a signal", sums(0.01)),
    Family("products", "speeds and lengths", lambda g, n, m: np.outer(g.random(n), g.random(m))),
    Family("products of Gaussians", "gains of networks with one input",
           lambda g, n, m: np.outer(g.standard_normal(n), g.standard_normal(m))),
    Family("products, negated", "speeds and lengths, the other sense",
           lambda g, n, m: -np.outer(g.random(n), g.random(m))),
    Family("products of degrees", "the first gradient of graph matching",
           lambda g, n, m: -np.outer(degrees(g, n), degrees(g, m)), 1),
    Family("differences of degrees", "seeds of graph matching",
           lambda g, n, m: np.abs(degrees(g, n)[:, None] - degrees(g, m)), 1),
    Family("i * j", "the hard instance of Machol and Wien", of_indices(np.multiply), 1),
    Family("-i * j", "the same in the other sense", of_indices(lambda i, j: -i * j), 1),
    Family("min(i, j)", "overlaps of nested sets", of_indices(np.minimum), 1),
    Family("max(i, j)", "unions of nested sets", of_indices(np.maximum), 1),
    Family("|i - j|", "sorted lists with equal steps", of_indices(lambda i, j: np.abs(i - j)), 1),
    Family("(i - j)^2", "the same, squared", of_indices(lambda i, j: (i - j) ** 2), 1),
    Family("sqrt |i - j|", "the same with a concave cost", of_indices(lambda i, j: np.sqrt(np.abs(i - j)))),
    Family("gcd(i, j)", "arithmetic structure", of_indices(np.gcd), 1),
    Family("i * j mod 101", "hash values", of_indices(lambda i, j: i * j % 101), 1),
    Family("i xor j", "bit patterns", of_indices(np.bitwise_xor), 1),
    Family("1 / (i + j)", "the Hilbert matrix", of_indices(lambda i, j: 1 / (i + j)), 1e6),
    Family("cos(i j)", "frequencies", of_indices(lambda i, j: np.cos(2 * np.pi * i * j / 997))),
    Family("i + j mod 10", "rotas", of_indices(lambda i, j: (i + j) % 10), 1),
    Family("j - i mod m", "a ring walked one way",
           lambda g, n, m: (np.arange(m)[None] - np.arange(n)[:, None]) % m, 1),
    Family("|x - y|, sorted", "sorted lists", on_a_line(np.abs, True)),
    Family("|x - y|", "numbers in no order", on_a_line(np.abs, False)),
    Family("(x - y)^2, sorted", "sorted lists, squared", on_a_line(np.square, True), 1e6),
    Family("(x - y)^2", "numbers in no order, squared", on_a_line(np.square, False), 1e6),
    Family("sqrt |x - y|", "a concave transport on the line", on_a_line(lambda d: np.sqrt(np.abs(d)), False)),
    Family("positive part of x - y", "delays", on_a_line(lambda d: np.maximum(d, 0), False)),
    Family("Monge", "transport in one dimension", monge(-1)),
    Family("inverse Monge", "transport in one dimension, for gain", monge(1)),
    Family("scheduling", "jobs on one machine", scheduling, 1),
    Family("scheduling on four machines", "jobs on machines of unequal speed", flow_time),
    Family("smooth rows", "time series", smooth),
)  # fmt: skip
