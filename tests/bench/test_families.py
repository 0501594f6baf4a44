"""The families of assignment problems: what an instance promises."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from bench.lib.families import DTYPES, FACTOR_FAMILIES, FAMILIES, MODULES, select

SHAPES = ((1, 1), (1, 2), (2, 1), (3, 5), (17, 17), (30, 31), (31, 30), (12, 120), (120, 12))


def test_names_are_unique_and_say_whose_problem_it_is():
    every = [family for module in MODULES for family in module.FAMILIES]
    assert len(every) == len(FAMILIES) >= 90
    assert all(family.stands_for for family in every)


@pytest.mark.parametrize("name", FAMILIES)
def test_instances_are_repeatable_stored_by_rows_and_feasible(name):
    family = FAMILIES[name]
    assert {"float64"} <= set(family.dtypes) <= set(DTYPES)
    for n, m in SHAPES:
        for dtype in family.dtypes:
            cost = family(n, m, 5, dtype)
            assert cost.dtype == dtype
            assert cost.shape == (n, m)
            assert cost.flags.c_contiguous
            assert type(cost) is np.ndarray
            np.testing.assert_array_equal(cost, family(n, m, 5, dtype))
            if cost.dtype.kind == "f":
                assert not (np.isnan(cost) | (cost == -np.inf)).any()
                assert family.forbids or np.isfinite(cost).all()
            rows, columns = linear_sum_assignment(cost)  # raises if +inf leaves no assignment
            assert np.isfinite(cost[rows, columns].astype(float)).all()


def test_families_that_forbid_do():
    forbidding = [family for family in FAMILIES.values() if family.forbids]
    assert len(forbidding) >= 8
    for family in forbidding:
        assert np.isinf(family(60, 60, 0)).any(), family.name


def test_seeds_differ():
    fixed = [
        name for name, family in FAMILIES.items() if np.array_equal(family(30, 30, 1), family(30, 30, 2))
    ]
    formulas = {"i * j", "min(i, j)", "chain", "staircase", "geometric", "gcd(i, j)"}
    assert formulas <= set(fixed)
    assert len(fixed) < 30


def test_families_are_chosen_by_patterns():
    assert [family.name for family in select("gains, rank 1;sums of*")] == [
        "gains, rank 1",
        "sums of integers",
    ]
    with pytest.raises(ValueError, match="no name fits 'nothing'"):
        select("sums;nothing")
    with pytest.raises(ValueError, match=r"sparse, 1%: expected a dtype among float32, float64, got int32"):
        FAMILIES["sparse, 1%"](3, 3, 0, "int32")


@pytest.mark.parametrize("family", FACTOR_FAMILIES, ids=lambda family: family.name)
def test_factors_are_those_of_their_matrix(family):
    for n, m in ((1, 1), (9, 9), (9, 14), (14, 9)):
        factors = family(n, m, 4)
        assert factors.shape == (n, m) == factors.matrix().shape
        again = family(n, m, 4)
        np.testing.assert_array_equal(factors.a, again.a)
        np.testing.assert_array_equal(factors.b, again.b)
        if factors.metric == "dot":
            expected = np.einsum("ik,jk->ij", factors.a.astype(float), factors.b.astype(float))
        else:
            expected = ((factors.a[:, None].astype(float) - factors.b) ** 2).sum(-1)
        np.testing.assert_allclose(factors.matrix(), expected, rtol=1e-9, atol=1e-9)
    assert family in select("factors*")
    with pytest.raises(ValueError, match="expected the dtype factors, got int32"):
        family(3, 3, 0, "int32")
