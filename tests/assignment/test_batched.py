"""Stacks of small problems: scipy's objective for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment as scipy_lsa

from bench.lib.problems import KINDS, problem
from fastmatch.assignment import solve_batched
from helpers.networks import fresh_seed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (12, 12), (9, 15), (15, 9), (64, 64)])
def test_every_problem_of_a_stack(kind, n, m):
    seed = fresh_seed() % 2**20
    stack = np.stack([problem(kind, n, m, seed + k) for k in range(6)])
    for maximize in (False, True):
        cols = solve_batched(stack, maximize)
        assert cols.shape == (6, n)
        for cost, row in zip(stack.astype(np.float64), cols, strict=True):
            used = np.flatnonzero(row >= 0)
            assert len(used) == len(np.unique(row[used])) == min(n, m)
            best = cost[scipy_lsa(cost, maximize)]
            size = np.abs(best).sum() + np.abs(cost).max() * n
            assert abs(cost[used, row[used]].sum() - best.sum()) <= 1e-12 * size + 1e-300


def test_forbidden_entries_and_bad_input():
    g = np.random.default_rng(fresh_seed())
    stack = g.random((20, 10, 10))
    stack[g.random(stack.shape) < 0.4] = np.inf
    stack[:, np.arange(10), g.permutation(10)] = 2.0
    for cost, row in zip(stack, solve_batched(stack), strict=True):
        assert cost[np.arange(10), row].sum() == pytest.approx(cost[scipy_lsa(cost)].sum(), rel=1e-12)
    stack[7, 3] = np.inf
    with pytest.raises(ValueError, match="problem 7 has no assignment"):
        solve_batched(stack)
    stack[5, 2, 1] = np.nan
    with pytest.raises(ValueError, match="problem 5 has NaN"):
        solve_batched(stack)
    with pytest.raises(ValueError, match=r"expected \(batch, n, m\), got 2"):
        solve_batched(np.ones((3, 3)))
    with pytest.raises(TypeError, match="complex"):
        solve_batched(np.ones((1, 3, 3), complex))


def test_torch_and_empty_stacks():
    stack = torch.rand(5, 8, 8).bfloat16()
    cols = solve_batched(stack, maximize=True)
    assert cols.dtype == torch.int64
    assert torch.equal(cols, torch.from_numpy(solve_batched(stack.float().numpy(), maximize=True)))
    assert solve_batched(np.ones((0, 4, 4))).shape == (0, 4)
    assert solve_batched(np.ones((3, 0, 4))).shape == (3, 0)
    assert solve_batched(np.ones((3, 4, 0))).tolist() == [[-1] * 4] * 3
