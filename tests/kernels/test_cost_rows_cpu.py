"""Shortlists of factor costs against the whole matrix in float64: the right entries, and a bound that holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fastmatch.kernels.reference import cost_rows as reference
from networks import fresh_seed

from fastmatch.assignment import FactorCost


def pairs_of(
    g: np.random.Generator, n: int, m: int, depths, dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [tuple(torch.from_numpy(g.standard_normal((x, d)).astype(dtype)) for x in (n, m)) for d in depths]


@pytest.mark.parametrize("metric", ["dot", "l2", "l1"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("n", "m", "depths", "tile"),
    [
        (1, 1, (3,), (4, 4)),
        (7, 130, (5, 2), (3, 64)),
        (200, 300, (16,), (64, 127)),
        (90, 65, (1,), (1024, 8192)),
    ],
)
def test_lists_hold_the_smallest_and_the_bound_is_below_the_rest(metric, dtype, n, m, depths, tile):
    g = np.random.default_rng(fresh_seed())
    pairs = pairs_of(g, n, m, depths, dtype)
    cost = FactorCost(pairs, metric, tile)
    whole = reference.cost(pairs, metric)
    v = g.standard_normal(m)
    rows = np.sort(g.permutation(n)[: max(1, n // 2)])
    for sign in (1.0, -1.0):
        for k in (1, 5, m):
            items, costs, bound = cost.row_topk(v, k, rows, sign)
            shape = (len(rows), min(k, m))
            assert items.shape == costs.shape == shape
            assert all(len(np.unique(row)) == shape[1] for row in items)
            given = (sign * whole).numpy()[rows]
            np.testing.assert_allclose(
                costs, np.take_along_axis(given, items.astype(int), 1), rtol=1e-12, atol=1e-12
            )
            outside = given - v
            np.put_along_axis(outside, items.astype(int), np.inf, 1)
            assert (bound <= outside.min(axis=1) + 1e-12).all()
            # Not needlessly low, either: within a few roundings of the true (k + 1)-th smallest value.
            if k < m:
                best = np.sort(given - v, axis=1)[:, k]
                terms = torch.from_numpy(cost._size[rows])
                slack = reference.product_error(terms, torch.from_numpy(v), cost.depth, cost.dtype).numpy()
                assert (bound >= best - 2 * slack - 1e-12).all()
        least = (sign * whole.numpy() - v).min(axis=1)
        np.testing.assert_allclose(cost.row_min(v, sign), least, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(sign * cost.dense(), (sign * whole).numpy(), rtol=1e-11, atol=1e-11)


def test_ties_and_zero_rows_settle_in_float64():
    cost = FactorCost([(np.zeros((50, 4), np.float32), np.ones((60, 4), np.float32))])
    v = np.linspace(0, 1e-9, 60)
    np.testing.assert_allclose(cost.row_min(v), np.full(50, -1e-9), rtol=0, atol=1e-15)


@pytest.mark.parametrize("metric", ["dot", "l2", "l1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_entries_by_torch_and_by_the_compiled_loop_agree(metric, dtype):
    g = np.random.default_rng(fresh_seed())
    pairs = [(a.to(dtype), b.to(dtype)) for a, b in pairs_of(g, 40, 50, (7, 3), np.float64)]
    rows = g.integers(0, 40, 30)
    items = g.integers(-1, 50, (30, 6))
    found = reference.entries(pairs, torch.from_numpy(rows), torch.from_numpy(items), metric)
    other = FactorCost(pairs, metric)._rescored(rows, items.astype(np.int32), 1.0)
    np.testing.assert_allclose(found.numpy(), other, rtol=1e-12, atol=1e-12)
    assert (np.isinf(found.numpy()) == (items < 0)).all()
