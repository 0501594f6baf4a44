"""Costs whose rows are divided among ranks: the same assignment as of the whole cost, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastmatch as fm
from fastmatch._internal.ranks import current
from fastmatch.assignment import CandidateLists, Cost, FactorCost, ShardedCost
from helpers.ranked import on_ranks

SIZES = (1, 2, 3, 4)
ROWS, COLUMNS = 700, 800


def factors():
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(rows, 12, generator=generator) for rows in (ROWS, COLUMNS)]


class Failing(FactorCost):
    """A cost whose second question fails on the last rank."""

    asked = 0

    def row_topk(self, *args, **options):
        self.asked += 1
        if self.asked == 2 and current().rank == current().size - 1:
            raise MemoryError("no room for the rows")
        return super().row_topk(*args, **options)


def work():
    ranks = current()
    a, b = factors()
    cuts = np.linspace(0, ROWS, ranks.size + 1).astype(int) // 7 * 7  # not equally many
    cuts[-1] = ROWS
    mine = a[cuts[ranks.rank] : cuts[ranks.rank + 1]]
    cost = ShardedCost(FactorCost([(mine, b)]))
    found = cost.solve(maximize=True)
    errors = []
    for failing in (
        lambda: ShardedCost(Failing([(mine, b)])).solve(),
        lambda: ShardedCost(FactorCost([(mine, b[ranks.rank :])])),
    ):
        try:
            failing()
            errors.append("none")
        except (RuntimeError, ValueError, MemoryError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    return {
        "found": (found.row_ind, found.col_ind, found.u, found.v, found.objective, found.gap),
        "errors": errors,
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return on_ranks(tmp_path_factory.mktemp("ranks"), SIZES, [work])[0]


@pytest.mark.slow
def test_rows_on_ranks_are_solved_as_the_whole_cost_is(results):
    a, b = factors()
    whole = fm.solve(FactorCost([(a, b)]), maximize=True, solver=CandidateLists())
    first = results[1][0]["found"]
    assert np.array_equal(first[1], whole.col_ind)
    assert np.isclose(first[4], whole.objective, rtol=1e-12)
    assert abs(first[5]) <= 1e-9 * abs(first[4])
    for values in results.values():
        for value in values:
            assert all(np.array_equal(x, y) for x, y in zip(first, value["found"], strict=True))


WIDE = 20_000


def wide_factors():
    """Rows, and the same in another order with noise, as the units of two networks that were one."""
    generator = torch.Generator().manual_seed(7)
    a = torch.randn(WIDE, 64, generator=generator)
    return a, a[torch.randperm(WIDE, generator=generator)] + 0.3 * torch.randn(WIDE, 64, generator=generator)


def wide_work():
    ranks, (a, b) = current(), wide_factors()
    cuts = [WIDE * k // ranks.size for k in range(ranks.size + 1)]
    found = ShardedCost(FactorCost([(a[cuts[ranks.rank] : cuts[ranks.rank + 1]], b)])).solve(maximize=True)
    return found.row_ind, found.col_ind, found.u, found.v, found.objective, found.gap, found.gap_bound


@pytest.mark.slow
def test_a_wide_cost_of_twenty_thousand_rows_has_the_same_bits_on_every_number_of_ranks(tmp_path):
    results = on_ranks(tmp_path, SIZES, [wide_work])[0]
    first = results[1][0]
    whole = fm.solve(FactorCost([wide_factors()]), maximize=True)
    assert np.array_equal(first[1], whole.col_ind)
    assert abs(first[5]) <= first[6]
    for values in results.values():
        for value in values:
            assert all(np.array_equal(x, y) for x, y in zip(first, value, strict=True))


@pytest.mark.slow
def test_an_error_about_rows_is_told_to_all_ranks(results):
    for size in SIZES[1:]:
        for rank, value in enumerate(results[size]):
            expected = "MemoryError: no room for the rows"
            assert value["errors"][0] == (
                expected if rank == size - 1 else f"RanksError: rank {size - 1} failed: {expected}"
            )
            assert "as many columns on every rank" in value["errors"][1]


def test_one_process_answers_its_own_questions():
    a, b = factors()
    cost, plain = ShardedCost(FactorCost([(a, b)])), FactorCost([(a, b)])
    assert isinstance(cost, Cost)
    v, rows = np.random.default_rng(0).normal(size=COLUMNS), np.array([650, 3, 3, 10])
    for found, expected in zip(cost.row_topk(v, 5, rows), plain.row_topk(v, 5, rows), strict=True):
        assert np.array_equal(found, expected)
    assert np.array_equal(cost.row_min(v), plain.row_min(v))
    assert np.array_equal(cost.entries(rows, rows), plain.entries(rows, rows))
    assert np.array_equal(cost.entry_error(), plain.entry_error())
    with pytest.raises(ValueError, match="divide the transposed cost"):
        ShardedCost(FactorCost([(b, a)]))
    with pytest.raises(ValueError, match="by its own rows"):
        cost.T.row_min(v)
    with pytest.raises(TypeError, match="expected a Cost"):
        ShardedCost(a.numpy())
