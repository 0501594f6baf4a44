"""Every family of costs that the benchmark measures: scipy's optimum, and a proof that holds."""

from __future__ import annotations

import numpy as np
import pytest

from bench.lib.families import FAMILIES
from fastmatch.assignment import DenseShortlists
from helpers.fuzz.judge import judge
from helpers.fuzz.problems import Problem
from helpers.networks import fresh_seed

SHAPES = ((1, 1), (9, 9), (13, 14), (24, 11), (40, 40))


def solved(name: str, shapes: tuple[tuple[int, int], ...], solver: type | None) -> None:
    """Judge instances of a family in both senses and in every number type that suits it."""
    family, seed = FAMILIES[name], fresh_seed()
    for n, m in shapes:
        for dtype in family.dtypes:
            for maximize in (False, True):
                base = family(n, m, seed, dtype)
                told = f"{n} x {m}, {dtype}, {'maximized' if maximize else 'minimized'}"
                cost = -base if maximize else base
                problem = Problem(told, cost, maximize, base.astype(np.float64), solver=solver)
                found = [finding for finding in judge(problem, seed) if not isinstance(finding, float)]
                assert not found, told


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_solved_and_proved(name):
    solved(name, SHAPES, None)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_solved_and_proved_by_lists(name):
    solved(name, ((1, 3), (50, 50)), DenseShortlists)
