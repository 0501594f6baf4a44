"""Few different values, equal rows and columns, and costs that hardly differ."""

from __future__ import annotations

import numpy as np

from bench.lib.families.family import Family, Generator, Maker, repeated


def integers(low: int, high: int) -> Maker:
    return lambda g, n, m: g.integers(low, high, (n, m), endpoint=True)


def threshold(factor: float) -> Maker:
    """Zeros at ``factor`` times the density at which a perfect matching of zeros appears."""

    def make(g: Generator, n: int, m: int) -> np.ndarray:
        side = max(n, m, 2)
        return (g.random((n, m)) >= factor * np.log(side) / side).astype(np.int64)

    return make


def skewed(g: Generator, n: int, m: int) -> np.ndarray:
    return g.choice(np.array([0, 1, 10, 100]), (n, m), p=[0.05, 0.8, 0.1, 0.05])


def equal_blocks(g: Generator, n: int, m: int) -> np.ndarray:
    """Every block of rows and columns has one cost."""
    k = max(2, round(min(n, m) ** 0.5))
    groups = g.random((k, k))
    return groups[np.arange(n) * k // n][:, np.arange(m) * k // m]


def repeats(rows: int, columns: int) -> Maker:
    """Every row and every column comes that many times, in random order."""

    def make(g: Generator, n: int, m: int) -> np.ndarray:
        base = g.random((-(-n // rows), -(-m // columns)))
        return base[repeated(g, len(base), n)][:, repeated(g, base.shape[1], m)]

    return make


def blocks(uneven: bool) -> Maker:
    """Blocks are cheap inside. Uneven ones have more rows than columns, so that some rows must leave."""

    def make(g: Generator, n: int, m: int) -> np.ndarray:
        k = 10
        row = g.permutation(np.arange(n) * k // n)
        if uneven:
            column = g.permutation((np.arange(m) / m) ** 0.8 * k).astype(np.int64)
        else:
            column = g.permutation(np.arange(m) * k // m)
        return g.random((n, m)) + 10 * (row[:, None] != column)

    return make


def half(scale: float) -> Maker:
    return lambda g, n, m: (scale * g.standard_normal((n, m))).astype(np.float16).astype(np.float64)


def images(g: Generator, n: int, m: int) -> np.ndarray:
    """Sums of absolute differences of 4 x 4 patches of two smooth uint8 images, of which one is noisy."""
    side = 256
    waves = np.add.outer(np.cumsum(g.standard_normal(side)), np.cumsum(g.standard_normal(side)))
    image = (255 * (waves - waves.min()) / np.ptp(waves)).astype(np.int64)
    noisy = np.clip(image + g.integers(-8, 9, image.shape), 0, 255)
    rows, columns = (g.integers(0, side - 4, (2, k)) for k in (n, m))
    cost = np.zeros((n, m), np.int64)
    for i in range(4):
        for j in range(4):
            cost += np.abs(image[rows[0] + i, rows[1] + j][:, None] - noisy[columns[0] + i, columns[1] + j])
    return cost


def near_integers(g: Generator, n: int, m: int) -> np.ndarray:
    return g.integers(0, 20, (n, m)) + 1e-9 * g.random((n, m))


def one_line(row: bool) -> Maker:
    def make(g: Generator, n: int, m: int) -> np.ndarray:
        cost = np.ones((n, m))
        if row:
            cost[g.integers(n)] = g.random(m)
        else:
            cost[:, g.integers(m)] = g.random(n)
        return cost

    return make


FAMILIES = (
    Family("integers to 1", "yes and no", integers(0, 1), 1),
    Family("integers to 3", "marks", integers(0, 3), 1),
    Family("integers to 9", "marks of a finer scale", integers(0, 9), 1),
    Family("integers to 100", "percentages", integers(0, 100), 1),
    Family("integers to 1000", "benchmarks of integer solvers", integers(0, 1000), 1),
    Family("integers to 1e6", "cents", integers(0, 10**6), 1),
    Family("integers near 2^24", "integers where float32 ends", integers(2**24 - 9, 2**24 + 9), 1, True),
    Family("few values", "tariffs", skewed, 1),
    Family("binary, half the threshold", "unweighted matching, most rows without a partner", threshold(0.5), 1),
    Family("binary, at the threshold", "unweighted matching, just possible", threshold(1.0), 1),
    Family("binary, twice the threshold", "unweighted matching, possible", threshold(2.0), 1),
    Family("constant", "no information", lambda g, n, m: np.full((n, m), g.standard_normal())),
    Family("nearly constant", "a signal a million times below its offset",
           lambda g, n, m: 1 + 1e-6 * g.random((n, m)), None, True),
    Family("nearly tied", "differences of rounding", lambda g, n, m: 1 + 1e-12 * g.random((n, m)), None, True),
    Family("nearly integers", "integers after float arithmetic", near_integers, None, True),
    Family("equal rows", "identical workers", lambda g, n, m: np.tile(g.random(m), (n, 1))),
    Family("equal columns", "identical jobs", lambda g, n, m: np.tile(g.random((n, 1)), (1, m))),
    Family("rows ten times", "teams of identical workers", repeats(10, 1)),
    Family("columns ten times", "jobs with ten places", repeats(1, 10)),
    Family("rows and columns three times", "duplicated records", repeats(3, 3)),
    Family("equal blocks", "classes of workers and of jobs", equal_blocks),
    Family("blocks", "departments", blocks(False)),
    Family("uneven blocks", "departments of which some have too many workers", blocks(True)),
    Family("half precision", "costs of a network run in float16", half(1.0), None),
    Family("half precision, near its end", "float16 sums close to overflow", half(9000.0), 1),
    Family("uint8 images", "patches of two photographs", images, 1),
    Family("one row matters", "one worker with preferences", one_line(True)),
    Family("one column matters", "one job that workers differ in", one_line(False)),
)  # fmt: skip
