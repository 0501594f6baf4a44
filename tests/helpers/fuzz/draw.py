"""One problem of the fuzz, by seed and number."""

from __future__ import annotations

import numpy as np

from helpers.fuzz.factors import factor_problem
from helpers.fuzz.problems import Problem, matrix_problem

FACTORS = 0.04
"""Share of the problems whose cost is given by factors."""


def problem(seed: int, number: int, largest: int | None = None) -> Problem:
    """Return the problem of a seed and a number; ``largest`` bounds its sides."""
    g = np.random.default_rng([seed, number])
    return (factor_problem if g.random() < FACTORS else matrix_problem)(g, largest)
