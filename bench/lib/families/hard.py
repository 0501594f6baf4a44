"""Instances on which one kind of algorithm takes its worst number of steps."""

from __future__ import annotations

import numpy as np

from bench.lib.families.family import Family, Generator, Maker


def price_war(g: Generator, n: int, m: int) -> np.ndarray:
    """Half of the rows want the same columns, one fewer than they are; all else costs 1000 times as much."""
    k = min(n, m) // 2
    cost = 1000 + g.random((n, m))
    cost[: k + 1, :k] = g.random((min(k + 1, n), k))
    return cost


def price_wars(g: Generator, n: int, m: int) -> np.ndarray:
    """Many small wars: in groups of ten rows, nine columns are cheap."""
    row, column = np.arange(n) // 10, np.arange(m) // 10
    cheap = (row[:, None] == column) & (np.arange(m) % 10 < 9)
    return np.where(cheap, g.random((n, m)), 1000 + g.random((n, m)))


def chain(backward: bool) -> Maker:
    """Row i wants column i and, a little more, column i + 1; the last row moves all others."""

    def make(g: Generator, n: int, m: int) -> np.ndarray:
        cost = np.full((n, m), 10.0)
        i = np.arange(min(n, m))
        cost[i, i] = 1.0
        cost[i[:-1], i[1:]] = 0.5
        cost[i[-1:], i[:1]] = 0.0
        return cost[::-1, ::-1] if backward else cost

    return make


def staircase(g: Generator, n: int, m: int) -> np.ndarray:
    """Row i may take the first columns up to its own: every row prefers what the rows before it need."""
    i, j = np.arange(n)[:, None], np.arange(m)
    return np.where(j <= i, j, m + 10 * (j - i))


def geometric(g: Generator, n: int, m: int) -> np.ndarray:
    """Products whose rows grow by a constant factor: exp(i j), scaled to six decades."""
    return np.exp(14 * np.outer(np.arange(1, n + 1) / n, np.arange(1, m + 1) / m))


def powers_of_two(g: Generator, n: int, m: int) -> np.ndarray:
    """Differences double from column to column, so that prices climb slowly."""
    return 2.0 ** (np.arange(m) % 20) * (1 + np.arange(n)[:, None] % 20)


def nested(g: Generator, n: int, m: int) -> np.ndarray:
    """Row i tells apart only the first i columns: late rows turn all earlier choices over."""
    i, j = np.arange(n)[:, None], np.arange(m)
    return np.where(j < i, i - j, 0)


def two_levels(g: Generator, n: int, m: int) -> np.ndarray:
    """Differences of 1e-6 decide between columns that differ by 1: eps has to fall far."""
    return g.integers(0, 3, (n, 1)) * g.integers(0, 3, m) + 1e-6 * g.random((n, m))


FAMILIES = (
    Family("price war", "too many bidders for the good places", price_war),
    Family("price wars", "many small groups with a place too few", price_wars),
    Family("chain", "augmenting paths through all rows", chain(False)),
    Family("chain, backward", "the same from the other end", chain(True)),
    Family("staircase", "each row wants what those before it need", staircase, 1),
    Family("geometric", "products over six decades", geometric, 1),
    Family("powers of two", "prices that climb slowly", powers_of_two, 1),
    Family("nested", "late rows that turn all choices over", nested, 1),
    Family("two levels", "coarse costs decided by fine ones", two_levels, None, True),
)
