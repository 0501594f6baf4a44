"""Ranks, seats and popularity."""

from __future__ import annotations

import numpy as np

from bench.lib.families.family import Family, Generator, Maker, repeated


def ranks(g: Generator, n: int, m: int) -> np.ndarray:
    return g.permuted(np.tile(np.arange(m), (n, 1)), axis=1)


def ranks_of_columns(g: Generator, n: int, m: int) -> np.ndarray:
    """The transposed lists: every column ranks the rows."""
    return np.ascontiguousarray(ranks(g, m, n).T)


def both_ranks(g: Generator, n: int, m: int) -> np.ndarray:
    return ranks(g, n, m) + ranks_of_columns(g, n, m)


def choices(count: int, popular: bool, otherwise: int) -> Maker:
    """Every row ranks ``count`` columns from 1; all others cost the same."""

    def make(g: Generator, n: int, m: int) -> np.ndarray:
        k = min(count, m)
        weight = 1 / np.arange(1, m + 1) if popular else np.ones(m)
        keys = g.exponential(size=(n, m)) / weight
        chosen = np.argpartition(keys, k - 1, axis=1)[:, :k]
        cost = np.full((n, m), otherwise)
        np.put_along_axis(cost, chosen, g.permuted(np.tile(np.arange(1, k + 1), (n, 1)), axis=1), 1)
        return cost

    return make


def seats(per_course: int, capacity_order: bool) -> Maker:
    """Students rank five courses; a course is as many equal columns as it has seats."""

    def make(g: Generator, n: int, m: int) -> np.ndarray:
        courses = max(1, -(-m // per_course))
        cost = choices(5, True, 1000)(g, n, courses)
        seat = np.arange(m) // per_course if capacity_order else repeated(g, courses, m)
        return cost[:, np.minimum(seat, courses - 1)]

    return make


def gale(g: Generator, n: int, m: int) -> np.ndarray:
    """All rows rank the columns alike but for a few neighbouring exchanges."""
    return np.arange(m) + g.integers(0, 4, (n, m))


FAMILIES = (
    Family("ranks", "preferences of everybody for everything", ranks, 1),
    Family("ranks by columns", "transposed lists of preferences", ranks_of_columns, 1),
    Family("ranks by both", "two-sided preferences", both_ranks, 1),
    Family("ranks nearly alike", "one opinion, slightly varied", gale, 1),
    Family("ten choices", "short lists", choices(10, False, 1000), 1),
    Family("ten popular choices", "short lists of what is popular", choices(10, True, 1000), 1),
    Family("three choices", "lists so short that many get nothing", choices(3, True, 100), 1),
    Family("seats", "students and courses", seats(30, True), 1),
    Family("seats, shuffled", "students and courses in no order", seats(30, False), 1),
    Family("many seats", "students and few large courses", seats(150, True), 1),
)
