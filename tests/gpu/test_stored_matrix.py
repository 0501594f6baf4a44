"""Matrices on a GPU: one kernel screens their rows in float32, and decisions are in float64."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment as scipy_lsa

from fastmatch.assignment import CandidateLists, DeviceCost, certificate, solve
from helpers.networks import fresh_seed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


EVERY_NIGHT = list(product(DTYPES, (False, True), (1.0, -1.0)))
EVERY_TIME = [(torch.float32, False, 1.0), (torch.bfloat16, False, -1.0)]


@pytest.mark.parametrize(("dtype", "transposed", "sign"), [
    kind if kind in EVERY_TIME else pytest.param(*kind, marks=pytest.mark.slow) for kind in EVERY_NIGHT
])  # fmt: skip
def test_lists_and_minima_are_valid(gpu, dtype, transposed, sign):
    seed = fresh_seed()
    torch.manual_seed(seed)
    g = np.random.default_rng(seed)
    # More than one tile of columns; the transposed matrix has more than one of rows.
    matrix = torch.randn(30, 200 if transposed else 1100).to(dtype)
    cost = DeviceCost(gpu.tensor(matrix))
    cost, matrix = (cost.T, matrix.T) if transposed else (cost, matrix)
    n, m = matrix.shape
    values = sign * matrix.double().numpy()
    for v in (np.zeros(m), g.standard_normal(m), 1e3 + g.standard_normal(m)):
        rows = np.sort(g.choice(n, min(n, 17), replace=False))
        gpu.traffic.clear()
        items, costs, bound = cost.row_topk(v, 7, rows, sign)
        assert gpu.traffic.largest_to_host <= 8 * 7 * len(rows)
        np.testing.assert_array_equal(costs, np.take_along_axis(values[rows], items.astype(int), 1))
        reduced = values[rows] - v
        rest = reduced.copy()
        np.put_along_axis(rest, items.astype(int), np.inf, 1)
        assert (bound <= rest.min(1)).all()
        listed = np.take_along_axis(reduced, items.astype(int), 1)
        # What the bound confirms is the row's smallest; almost all of it is confirmed.
        assert ((listed <= bound[:, None]) <= (listed <= rest.min(1)[:, None])).all()
        assert (bound >= rest.min(1) - 1e-6 * (np.abs(v).max() + np.abs(values).max() + 1)).all()
        np.testing.assert_array_equal(cost.row_min(v, sign), (values - v).min(1))


def test_the_bound_is_exact_at_zero_duals_so_that_ties_are_seen(gpu):
    matrix = gpu.tensor(torch.ones(20, 20))
    _, costs, bound = DeviceCost(matrix).row_topk(np.zeros(20), 3)
    np.testing.assert_array_equal(bound, costs[:, -1])
    found = solve(matrix, solver=CandidateLists(length=3))
    assert found.objective == 20.0
    assert found.stats["solver"] == "DenseShortlists"  # lists do not suit it


@pytest.mark.parametrize("n", [34, pytest.param(70, marks=pytest.mark.slow)])  # two tiles of rows, and three
@pytest.mark.parametrize("maximize", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_solves_reach_the_optimum(gpu, maximize, n):
    torch.manual_seed(fresh_seed())
    matrix = torch.randn(n, n)
    found = solve(gpu.tensor(matrix), maximize=maximize, solver=CandidateLists())
    values = matrix.double().numpy()
    assert found.objective == pytest.approx(values[scipy_lsa(values, maximize)].sum(), rel=1e-12)
    assert found.gap <= found.gap_bound
    gap, bound = certificate(matrix, found, maximize=maximize)
    assert abs(gap) <= bound
    assert gpu.traffic.launches["_stored_candidates_kernel"] > 0 or gpu.has_autograd
