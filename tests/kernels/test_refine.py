"""Duals that are refined for the matching of an auction, and the solves that this keeps short."""

from __future__ import annotations

import numpy as np
import pytest

import fastmatch as fm
from bench.lib.families import FAMILIES
from fastmatch.assignment import DenseShortlists, dense_shortlists
from fastmatch.assignment.schedule import DenseSchedule
from fastmatch_kernels.lap.refine import SWEEPS
from helpers.networks import fresh_seed


def after_an_auction(cost: np.ndarray, sign: float, eps: float) -> dense_shortlists._DensePhases:
    dense_shortlists.compile_kernels(cost.dtype)
    phases = dense_shortlists._DensePhases(cost, sign, DenseSchedule(), None)
    phases.survey()
    phases.list_rows(phases.free_rows())
    phases.bid(phases.free_rows(), eps, 100 * phases.n)
    return phases


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("listed", [True, False])
def test_duals_fall_until_most_matches_are_their_rows_best(dtype, sign, listed):
    cost = np.random.default_rng(fresh_seed()).standard_normal((203, 203)).astype(dtype)
    phases = after_an_auction(cost, sign, 0.01)
    assert phases.free() == 0
    if not listed:
        phases.lists.bound.fill(-np.inf)
    before, matched, bids = phases.v.copy(), phases.col_of.copy(), int(phases.counts[1])
    reduced = sign * cost - before
    loose = (reduced[np.arange(203), matched] > reduced.min(1)).sum()
    phases.refine()
    assert (phases.v <= before).all()
    assert (phases.col_of == matched).all()
    assert int(phases.counts[1]) - bids <= SWEEPS * 203
    reduced = sign * cost - phases.v
    tight = reduced[np.arange(203), matched] <= reduced.min(1)
    assert (~tight).sum() < loose / 2, "most rows were left as they were"
    # Bounds hold for the columns outside of each list.
    lists = phases.lists
    for i in range(203):
        listed_here = set(lists.cols[lists.start[i] : lists.start[i] + lists.length[i]].tolist()) | {
            int(matched[i])
        }
        outside = np.delete(reduced[i], sorted(listed_here))
        assert lists.bound[i] <= outside.min() + 1e-12
    phases.match_tight()
    assert phases.free() < loose / 2  # some that are tight too, as far as bounds tell


def test_costs_of_all_sizes_round_to_no_better_column():
    g = np.random.default_rng(fresh_seed())
    cost = g.standard_normal((120, 120)) * 10.0 ** g.integers(-9, 9, (120, 1))
    phases = after_an_auction(cost, 1.0, 1e-3)
    phases.refine()
    reduced, rows = cost - phases.v, np.flatnonzero(phases.col_of >= 0)
    tight = reduced[rows, phases.col_of[rows]] <= reduced[rows].min(1)
    assert tight.mean() > 0.5


def test_an_auction_whose_matching_is_kept_ends_a_long_solve():
    """Row reduction freed most rows after every phase, and paths popped 1.3 million columns."""
    cost = FAMILIES["gains, log-normal 32"](2800, 2800, seed=5)
    found = fm.solve(cost, solver=DenseShortlists())
    assert found.is_certified
    gap, bound = fm.assignment.certificate(cost, found)
    assert gap <= bound
    assert found.stats["pops"] < 50_000
