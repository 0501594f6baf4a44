"""Gains with bounds: the same assignments as whole products, valid bounds at every step, and prefixes that grow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastmatch as fm
from fastmatch.assignment import CandidateLists, certificate
from fastmatch.assignment import bounded_gain as module
from fastmatch.assignment.bounded_gain import BoundedGain, multiply, solve_bounded
from helpers.networks import fresh_seed

KINDS = ("1.0", "0.999", "0.95", "0.8", "0.5", "unrelated", "heavy-tailed", "low rank")
SIBLINGS = KINDS[:4]
"""Pairs for which a part of the features is enough."""


def pair(kind: str, n: int, features: int, g: torch.Generator):
    """Two (n, features) factors: B's rows are A's in another order, as similar as the kind says."""
    a, noise = (torch.randn(n, features, generator=g) for _ in range(2))
    cosines = {"unrelated": 0.0, "heavy-tailed": 0.95, "low rank": 0.999}
    cosine = cosines[kind] if kind in cosines else float(kind)
    if kind == "low rank":
        mix = torch.randn(8, features, generator=g)
        a, noise = a[:, :8] @ mix, noise[:, :8] @ mix
    b = cosine * a + (1 - cosine**2) ** 0.5 * noise
    if kind == "heavy-tailed":  # of units and of features
        sizes = torch.randn(n, 1, generator=g).exp() * (2 * torch.randn(features, generator=g)).exp()
        a, b = a * sizes, b * sizes
    return a, b[torch.randperm(n, generator=g)]


def split(x: torch.Tensor, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """The features in factors; every second one has its units along the stored columns."""
    parts = x.split(sizes, 1)
    return [p.contiguous() if k % 2 else p.T.contiguous().T for k, p in enumerate(parts)]


def factors_of(kind: str, n: int, g: torch.Generator):
    sizes = (64, 130, 300)
    return list(zip(*(split(x, sizes) for x in pair(kind, n, sum(sizes), g)), strict=True))


def exact(factors) -> np.ndarray:
    return np.sum([(a.double() @ b.double().T).numpy() for a, b in factors], axis=0)


def rounding(factors) -> float:
    """Bound on the rounding of an objective from float32 products."""
    sizes = [torch.linalg.vector_norm(torch.cat(x, 1), dim=1).double() for x in zip(*factors, strict=True)]
    depth = sum(a.shape[1] for a, _ in factors)
    return depth * float(torch.finfo(torch.float32).eps) * float((sizes[0] * sizes[1].max()).sum())


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(module, "JUDGED", 96)


@pytest.mark.parametrize("kind", KINDS)
def test_permutations_are_those_of_whole_products(kind, small):
    """25 random pairs of each kind."""
    seed = fresh_seed()
    g = torch.Generator().manual_seed(seed)
    bounded = 0
    for _ in range(25):
        n = int(torch.randint(2, 120, (), generator=g))
        factors = factors_of(kind, n, g)
        gain = multiply(factors)
        bounded += isinstance(gain, BoundedGain)
        found, whole = (
            fm.solve(x, maximize=True) for x in (gain, torch.cat([a for a, _ in factors], 1) @ torch.cat([b for _, b in factors], 1).T)
        )  # fmt: skip
        assert found.is_certified
        if not np.array_equal(found.col_ind, whole.col_ind):  # equally good but for float32's rounding
            table, rows = exact(factors), np.arange(n)
            lost = table[rows, whole.col_ind].sum() - table[rows, found.col_ind].sum()
            assert abs(lost) <= 2 * rounding(factors), (kind, n)
        if isinstance(gain, BoundedGain):
            true_gap, gap_bound = certificate(gain, found, maximize=True)
            assert true_gap <= gap_bound
    if kind in SIBLINGS:
        assert bounded >= 20
    if kind == "unrelated":
        assert bounded <= 5  # of a few units


@pytest.mark.parametrize("out", [torch.float32, torch.float64])
@pytest.mark.parametrize("features", [0, 64, 300])
def test_products_are_added_in_parts(out, features, monkeypatch):
    monkeypatch.setattr(module, "CAST", 1)
    g = torch.Generator().manual_seed(fresh_seed())
    a, b = torch.randn(20, features, generator=g), torch.randn(30, features, generator=g).bfloat16()
    exact, total = a.double() @ b.double().T, torch.full((20, 30), torch.nan, dtype=out)
    if features:
        module.add_product(total, a, b, accumulate=False)
    else:
        total.zero_()
    module.add_product(total, a, b)
    torch.testing.assert_close(total.double(), 2 * exact, rtol=1e-4, atol=1e-4)


HALF = torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float32, HALF[0]), *((x, x) for x in HALF)]
)
def test_bounds_hold_after_every_step_and_what_is_known_is_exact(small, dtypes, monkeypatch):
    monkeypatch.setattr(module, "CAST", 1)  # parts of 64 features
    g = torch.Generator().manual_seed(fresh_seed())
    factors = [(a.to(dtypes[0]), b.to(dtypes[1])) for a, b in factors_of("0.95", 70, g)]
    gain, table = multiply(factors), exact(factors)
    assert isinstance(gain, BoundedGain)

    def check():
        assert (gain.bound.double().numpy() >= table).all()
        assert (gain.T.bound.double().numpy() >= table.T).all()

    check()
    loose = float((gain.bound.double() - torch.from_numpy(table)).mean())
    rows = np.arange(70)
    gain.learn(rows, np.roll(rows, 3))
    check()
    assert gain.matched(np.roll(rows, 3)) == pytest.approx(table[rows, np.roll(rows, 3)], rel=1e-12)
    assert len(gain.unknown(np.roll(rows, 3))) == 0
    assert gain.unknown(rows).tolist() == rows.tolist()
    gain.complete(np.array([5, 9]), np.array([2]))
    check()
    slack = gain.bound.double().numpy() - table
    assert slack[[5, 9]].max() < 1e-2 * slack[6].max()
    assert slack[:, 2].max() < 1e-2 * slack[6].max()
    gain.grow(2 * gain.share)
    check()
    assert float((gain.bound.double() - torch.from_numpy(table)).mean()) < 0.8 * loose
    assert slack[[5, 9]].max() < 1e-2 * slack[6].max()
    assert gain.row_min(np.zeros(70)) == pytest.approx(-gain.bound.double().numpy().max(1))
    assert gain.full().double().numpy() == pytest.approx(table, abs=1e-3)


def test_the_work_falls_with_the_similarity_and_nothing_is_tried_without_it(small):
    g = torch.Generator().manual_seed(fresh_seed())
    shares = {}
    for kind in ("1.0", "0.95", "0.8"):
        gain = multiply(factors_of(kind, 100, g))
        assert isinstance(gain, BoundedGain)
        shares[kind] = fm.solve(gain, maximize=True).stats["share"]
    assert shares["1.0"] <= shares["0.95"] < shares["0.8"] < 1
    factors = factors_of("unrelated", 100, g)
    whole = multiply(factors)
    assert isinstance(whole, torch.Tensor)
    assert whole.numpy() == pytest.approx(exact(factors), abs=1e-3)


def test_near_copies_whose_norms_differ_need_no_paths(small):
    """One feature dominates, as a bias or the weight of a norm: from zeros all rows want the same columns."""
    g, n = torch.Generator().manual_seed(fresh_seed()), 600
    a = [torch.randn(n, 1, generator=g), 0.02 * torch.randn(n, 2000, generator=g)]
    order = torch.randperm(n, generator=g)
    b = [(x + 0.05 * x.std() * torch.randn(x.shape, generator=g))[order] for x in a]
    gain = multiply(list(zip(a, b, strict=True)))
    assert isinstance(gain, BoundedGain)
    found = fm.solve(gain, maximize=True)
    assert found.is_certified
    assert torch.equal(order[torch.from_numpy(found.col_ind)], torch.arange(n))
    assert found.stats["bids"] == found.stats["searches"] == 0


def test_rows_without_a_copy_are_completed(small, monkeypatch):
    g = torch.Generator().manual_seed(fresh_seed())
    a, b = pair("0.999", 200, 1000, g)
    b[:8] = torch.randn(8, 1000, generator=g)
    completed = []
    complete = BoundedGain.complete
    monkeypatch.setattr(
        BoundedGain, "complete", lambda self, *units: completed.append(units) or complete(self, *units)
    )
    gain = multiply([(a, b)])
    assert isinstance(gain, BoundedGain)
    found = fm.solve(gain, maximize=True)
    assert completed
    assert found.is_certified
    assert float(found.stats["share"]) < 1
    assert found.objective == pytest.approx(
        fm.solve((a.double() @ b.double().T), maximize=True).objective, rel=1e-9
    )


@pytest.mark.parametrize("kind", ["0.8", "0.5"])
def test_a_prefix_that_was_predicted_too_short_grows(kind, small, monkeypatch):
    monkeypatch.setattr(module, "MARGIN", 0.1)
    g = torch.Generator().manual_seed(fresh_seed())
    factors = factors_of(kind, 100, g)
    gain = multiply(factors)
    assert isinstance(gain, BoundedGain)
    first = gain.share
    found = fm.solve(gain, maximize=True)
    assert first < float(found.stats["share"])
    assert np.array_equal(found.col_ind, fm.solve(exact(factors), maximize=True).col_ind)


def test_copies_and_dead_units_end_with_a_proof(small):
    g = torch.Generator().manual_seed(fresh_seed())
    a, b = pair("1.0", 60, 400, g)
    a[:20], b[:20] = a[20:40].clone(), b[20:40].clone()
    a[40:50], b[40:50] = 0, 0
    gain = multiply([(a, b)])
    found = fm.solve(gain, maximize=True)
    assert found.is_certified
    best = fm.solve(a.double() @ b.double().T, maximize=True).objective
    assert found.objective == pytest.approx(best, abs=2 * rounding([(a, b)]))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_any_scale(scale, small):
    """Where float32 would overflow or vanish, the whole product is formed, as it would be without bounds."""
    g = torch.Generator().manual_seed(fresh_seed())
    a, b = pair("0.95", 50, 300, g)
    gain = multiply([(a * scale, b)])
    assert isinstance(gain, BoundedGain) == (scale > 1e-20)
    found = fm.solve(gain, maximize=True)
    assert np.array_equal(found.col_ind, fm.solve(a.double() @ b.double().T, maximize=True).col_ind)


def test_nan_is_refused_as_in_a_matrix(small):
    a, b = pair("0.95", 50, 300, torch.Generator().manual_seed(0))
    a[3, 250] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        fm.solve(multiply([(a, b)]), maximize=True)


def test_it_is_a_cost_to_be_maximized(small):
    g = torch.Generator().manual_seed(fresh_seed())
    gain = multiply(factors_of("0.95", 60, g))
    assert isinstance(gain, BoundedGain)
    assert isinstance(gain, fm.assignment.Cost)
    listed = fm.solve(gain, maximize=True, solver=CandidateLists(length=8))
    found = fm.solve(gain, maximize=True)
    assert np.array_equal(listed.col_ind, found.col_ind)
    assert listed.is_certified
    warm = solve_bounded(gain, found, lambda m, warm_start: fm.solve(m, maximize=True, warm_start=warm_start))
    assert np.array_equal(warm.col_ind, found.col_ind)
    assert type(fm.assignment.select_solver(gain)).__name__ == "SmallDense"
    for solver in (None, CandidateLists()):
        with pytest.raises(ValueError, match="pass maximize=True"):
            fm.solve(gain, solver=solver)
