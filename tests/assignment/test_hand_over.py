"""Matrices that are tried over whole rows first, and go on with candidate lists where that takes long."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import fastmatch as fm
from bench.lib.families import FAMILIES
from fastmatch.assignment import FactorCost, SmallDense
from fastmatch_kernels.lap import small

LONG_PATHS = ["powers of two", "1 / (i + j)", "scheduling on four machines"]
SHORT_PATHS = ["uniform", "siblings, noise 1", "half forbidden", "constant"]
SHAPES = [(600, 600), (600, 603), (500, 900)]


def check(cost: np.ndarray, found: fm.Assignment, maximize: bool = False) -> None:
    """The solution is proved, and as good as scipy's."""
    rows, cols = linear_sum_assignment(cost, maximize)
    ours, best = cost[found.row_ind, found.col_ind].sum(dtype=float), cost[rows, cols].sum(dtype=float)
    assert ours == pytest.approx(best, rel=1e-6 if cost.dtype == np.float32 else 1e-12)
    assert found.is_certified
    gap, bound = fm.assignment.certificate(cost, found, maximize=maximize)
    assert gap <= bound
    assert (np.diff(found.row_ind) > 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("family", "solver"),
    [*((name, "DenseShortlists") for name in LONG_PATHS), *((name, "SmallDense") for name in SHORT_PATHS)],
)
def test_long_paths_are_taken_over_lists_and_short_ones_are_not(family, solver, shape):
    cost = FAMILIES[family](*shape, seed=3)
    found = fm.solve(cost)
    check(cost, found)
    assert found.stats["solver"] == solver


@pytest.mark.parametrize("dtype", ["float32", "int32", "int64"])
@pytest.mark.parametrize("turn", ["as it is", "transposed", "maximize"])
def test_the_hand_over_keeps_type_and_sense(dtype, turn):
    cost = FAMILIES["scheduling"](500, 900, seed=4, dtype="int32").astype(dtype)
    cost = cost.T if turn == "transposed" else -cost if turn == "maximize" else cost
    found = fm.solve(cost, maximize=turn == "maximize")
    check(cost, found, turn == "maximize")
    assert found.stats["solver"] == "DenseShortlists"
    rows, cols = fm.linear_sum_assignment(cost, turn == "maximize")
    assert cost[rows, cols].sum(dtype=float) == found.objective


def test_a_solver_that_was_asked_for_goes_on():
    cost = FAMILIES["powers of two"](600, 600, seed=3)
    found = fm.solve(cost, solver=SmallDense())
    assert found.stats["solver"] == "SmallDense"
    check(cost, found)
    handed = fm.solve(cost, solver=SmallDense(hands_over=True))
    assert handed.stats["solver"] == "DenseShortlists"
    assert handed.objective == found.objective
    with pytest.raises(TypeError, match="hands_over: expected a bool, got int"):
        SmallDense(hands_over=1)


@pytest.mark.parametrize("solver", [SmallDense(hands_over=True), None])
def test_a_factor_cost_is_handed_over_by_any_such_solver(solver):
    g = np.random.default_rng(5)
    cost = FactorCost([(g.standard_normal((600, 1)), g.standard_normal((600, 1)))])
    found = fm.solve(cost, solver=solver)
    assert found.stats["solver"] == "DenseShortlists"
    assert found.is_certified


def test_ties_need_no_auction_beyond_the_caches():
    cost = FAMILIES["graph gradient"](1700, 1700, seed=0)
    assert fm.solve(cost).stats["solver"] == "SmallDense"


def test_a_schedule_of_its_own_hands_over_too():
    cost = FAMILIES["powers of two"](600, 600, seed=3)
    own = SmallDense(SmallDense().schedule._replace(bids=8), hands_over=True)
    assert fm.solve(cost, solver=own).stats["solver"] == "DenseShortlists"
    assert fm.solve(cost[:300, :300], solver=own).stats["solver"] == "SmallDense"


def test_a_warm_start_is_handed_over():
    cost = FAMILIES["powers of two"](600, 600, seed=3)
    first = fm.solve(np.random.default_rng(0).random((600, 600)))
    check(cost, fm.solve(cost, warm_start=first))
    again = fm.solve(cost, warm_start=fm.solve(cost))
    check(cost, again)


def test_the_matrix_of_a_factor_cost_is_computed_once(monkeypatch):
    g = np.random.default_rng(5)
    cost, asked = FactorCost([(g.standard_normal((600, 1)), g.standard_normal((600, 1)))]), []
    monkeypatch.setattr(
        FactorCost, "dense", lambda self, real=FactorCost.dense: asked.append(1) or real(self)
    )
    found = fm.solve(cost)
    assert found.is_certified
    assert found.stats["solver"] == "DenseShortlists"
    assert len(asked) == 1


def test_without_an_assignment_it_is_said():
    cost = FAMILIES["powers of two"](600, 600, seed=3)
    cost[:, 300:] = np.inf
    with pytest.raises(ValueError, match=r"^cost: no assignment"):
        fm.solve(cost)
    with pytest.raises(ValueError, match=r"^cost_matrix: no assignment"):
        fm.linear_sum_assignment(cost)


def test_beyond_the_caches_no_auction_runs_over_whole_rows(monkeypatch):
    """A matrix of 2.3 million float64 entries is beyond them, and most of its rows bid."""
    cost = np.random.default_rng(6).random((1620, 1620))
    assert cost.nbytes > small.AUCTIONED
    found = fm.solve(cost)
    assert found.stats["solver"] == "DenseShortlists"
    assert fm.solve(cost.astype(np.float32)).stats["solver"] == "SmallDense"
    check(cost, found)


@pytest.mark.slow
def test_the_first_rectangle_compiles_nothing_that_was_not_announced(tmp_path):
    """What lists need is compiled, with a warning, before the first of them is read."""
    code = (
        "import numpy as np, fastmatch as fm\n"
        "from fastmatch.assignment.dense_shortlists import compile_kernels\n"
        "from fastmatch_kernels._numba.cache import compiled\n"
        "compile_kernels(np.dtype('float64'))\n"
        "before, g = compiled(), np.random.default_rng(0)\n"
        "a, b = (g.standard_normal((k, 8)) * np.exp(g.standard_normal((k, 1))) for k in (300, 500))\n"
        "cost = -a @ b.T\n"
        "found = fm.solve(cost, solver=fm.assignment.DenseShortlists())\n"
        "assert found.stats['searches'] and compiled() == before, (before, compiled(), found.stats)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    )
