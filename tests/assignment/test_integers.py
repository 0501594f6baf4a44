"""64-bit integers: the optimum by exact arithmetic, however large they are and however close the totals."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from fastmatch.assignment import (
    DenseShortlists,
    LapJV,
    SmallDense,
    certificate,
    linear_sum_assignment,
    solve,
    solve_batched,
)
from helpers.networks import fresh_seed

SOLVERS = [DenseShortlists(), SmallDense()]


def exact_optimum(cost, maximize=False):
    """The best total by shortest augmenting paths, in Python's integers."""
    c = [[-int(x) if maximize else int(x) for x in row] for row in cost]
    if len(c) > len(c[0]):
        c = [list(column) for column in zip(*c, strict=True)]
    n, m = len(c), len(c[0])
    u, v, row_of = [0] * n, [0] * m, [-1] * m
    for free in range(n):
        least, before, done, i, last = [None] * m, [-1] * m, [False] * m, free, -1
        while True:
            for j in range(m):
                step = c[i][j] - u[i] - v[j]
                if not done[j] and (least[j] is None or step < least[j]):
                    least[j], before[j] = step, last
            j = min((j for j in range(m) if not done[j]), key=lambda j: least[j])
            delta = least[j]
            u[free] += delta
            for k in range(m):
                if done[k]:
                    u[row_of[k]] += delta
                    v[k] -= delta
                else:
                    least[k] -= delta
            done[j], last = True, j
            if row_of[j] < 0:
                break
            i = row_of[j]
        while last >= 0:
            row_of[last] = row_of[before[last]] if before[last] >= 0 else free
            last = before[last]
    total = sum(c[row_of[j]][j] for j in range(m) if row_of[j] >= 0)
    return -total if maximize else total


def total(cost, found):
    return sum(int(cost[i][j]) for i, j in zip(found.row_ind, found.col_ind, strict=True))


def whole_range(g, n, m):
    return g.integers(-(2**63), 2**63 - 1, (n, m), np.int64, endpoint=True)


def near_the_top(g, n, m):
    return g.integers(2**64 - 1000, 2**64 - 1, (n, m), np.uint64, endpoint=True)


def large_steps_and_small_differences(g, n, m):
    return (g.integers(0, 3, (n, m)) << 60) + g.integers(0, 3, (n, m))


def sums_and_small_differences(g, n, m):
    sums = g.integers(-(2**60), 2**60, n)[:, None] + g.integers(-(2**60), 2**60, m)
    return sums + g.integers(0, 3, (n, m))


def products(g, n, m):
    return np.outer(g.integers(1, 2**31, n), g.integers(-(2**31), 2**31, m))


def around_2_53(g, n, m):
    return 2**53 + g.integers(-40, 40, (n, m))


KINDS = [
    whole_range,
    near_the_top,
    large_steps_and_small_differences,
    sums_and_small_differences,
    products,
    around_2_53,
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (17, 17), (9, 14), (14, 9), (1, 7)])
def test_the_optimum_is_exact(kind, shape):
    g = np.random.default_rng(fresh_seed())
    for maximize in (False, True):
        cost = kind(g, *shape)
        best = exact_optimum(cost, maximize)
        for solver in SOLVERS:
            found = solve(cost, maximize=maximize, solver=solver)
            assert total(cost, found) == best
            assert found.objective == float(best)
            assert found.is_certified
            if max(abs(int(x)) for x in cost.flat) > 2**32:
                assert (found.gap, found.gap_bound) == (0.0, 0.0)
        warm = solve(cost, maximize=maximize, warm_start=found)
        assert total(cost, warm) == best


@pytest.mark.parametrize("kind", [near_the_top, around_2_53])
@pytest.mark.parametrize("shape", [(30, 30), (20, 33), (33, 20)])
def test_the_certificate_adds_in_integers(kind, shape):
    cost = kind(np.random.default_rng(fresh_seed()), *shape)
    for maximize in (False, True):
        found = solve(cost, maximize=maximize)
        assert certificate(cost, found, maximize=maximize) == (0.0, 0.0)
        short = found.v if shape[0] > shape[1] else found.u
        long = found.u if shape[0] > shape[1] else found.v
        assert ((long >= 0) if maximize else (long <= 0)).all() or shape[0] == shape[1]
        assert abs(found.dual_objective - found.objective) <= 1e-12 * np.abs(short).sum()
    cols = found.col_ind.copy()
    cols[:2] = cols[1::-1]  # found maximises
    swapped = dataclasses.replace(found, col_ind=cols)
    gap, bound = certificate(cost, swapped, maximize=True)
    assert bound == 0.0
    assert gap == total(cost, found) - total(cost, swapped) > 0


def test_integers_that_only_sums_take_beyond_2_53_are_exact():
    g = np.random.default_rng(fresh_seed())
    cost = g.integers(-(2**52), 2**52, (40, 40))
    assert total(cost, solve(cost)) == exact_optimum(cost)


def test_the_certificate_holds_for_duals_that_are_odd_and_beyond_2_52():
    g = np.random.default_rng(fresh_seed())
    cost = np.sort(g.integers(-(2**52), 2**52, (30, 30)))  # each row in order
    found = solve(cost)
    assert 2**52 < np.abs(found.v).max() < 2**53
    assert certificate(cost, found) == (0.0, 0.0)


def test_tensors_lists_and_other_solvers():
    g = np.random.default_rng(fresh_seed())
    cost = whole_range(g, 12, 12)
    best = exact_optimum(cost)
    for given in (torch.from_numpy(cost), cost.tolist(), cost.astype(">i8"), np.asfortranarray(cost)):
        assert total(cost, solve(given)) == best
    if find_spec("lapjv"):  # it has no wheel for Python 3.12 and later
        assert total(cost, solve(cost, solver=LapJV())) == best
    row_ind, col_ind = linear_sum_assignment(torch.from_numpy(cost))
    assert int(sum(int(cost[i, j]) for i, j in zip(row_ind, col_ind, strict=True))) == best
    unsigned = torch.from_numpy(near_the_top(g, 5, 5))
    assert total(unsigned.numpy(), solve(unsigned)) == exact_optimum(unsigned.numpy())


def test_integers_beyond_64_bits_are_exact_or_refused():
    huge = [[10**30 + 5, 10**30 + 1], [10**30 + 2, 10**30]]
    assert solve(huge).col_ind.tolist() == [1, 0]
    assert solve(huge).objective == float(2 * 10**30 + 3)
    with pytest.raises(ValueError, match="cost: integers must be spread over less than 2"):
        solve([[0, 10**30], [1, 2]])


def test_stacks_of_wide_integers():
    g = np.random.default_rng(fresh_seed())
    for shape in ((3, 6, 6), (2, 4, 7), (2, 7, 4)):
        stack = np.stack([large_steps_and_small_differences(g, *shape[1:]) for _ in range(shape[0])])
        for maximize in (False, True):
            out = solve_batched(stack, maximize)
            for cost, cols in zip(stack, out, strict=True):
                pairs = [(i, j) for i, j in enumerate(cols) if j >= 0]
                assert len(pairs) == min(shape[1:])
                assert sum(int(cost[i, j]) for i, j in pairs) == exact_optimum(cost, maximize)


def test_integers_in_a_cost_object_must_fit_float64():
    from fastmatch.assignment import DenseCost

    with pytest.raises(ValueError, match=r"cost: integers beyond 2\^53"):
        DenseCost(np.array([[2**60, 1], [1, 2**60]]))
