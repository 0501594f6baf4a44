"""linear_sum_assignment against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import fresh_seed
from scipy.optimize import linear_sum_assignment as scipy_lsa

from fastmatch.assignment import linear_sum_assignment


@pytest.mark.parametrize("size", [0, 1, 2, 7, 50])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_objective_is_scipys(size, maximize, dtype):
    generator = np.random.default_rng(fresh_seed())
    cost = (generator.standard_normal((size, size)) * 100).astype(dtype)
    rows, cols = linear_sum_assignment(cost, maximize)
    assert np.array_equal(rows, np.arange(size))
    assert np.array_equal(np.sort(cols), np.arange(size))
    best = cost[scipy_lsa(cost, maximize)].astype(np.float64).sum()
    assert cost[rows, cols].astype(np.float64).sum() == pytest.approx(best, rel=1e-6, abs=1e-4)


def test_torch_in_torch_out_and_double_stays_double():
    cost = torch.tensor([[1.0, 1.0 + 1e-12], [1.0, 1.0]], dtype=torch.float64)
    rows, cols = linear_sum_assignment(cost, maximize=True)
    assert cols.tolist() == [1, 0]
    assert rows.dtype == cols.dtype == torch.int64


def test_bad_input():
    with pytest.raises(ValueError, match="NaN"):
        linear_sum_assignment(np.array([[np.nan]]))
