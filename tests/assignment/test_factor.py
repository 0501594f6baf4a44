"""Factor costs: the dense matrix's optimum, by both solvers, and its proof."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment as scipy_lsa

from fastmatch.assignment import (
    CandidateLists,
    DenseCost,
    FactorCost,
    LapJV,
    ListSchedule,
    certificate,
    select_solver,
    solve,
)
from helpers.networks import fresh_seed


def factors(g: np.random.Generator, kind: str, n: int, m: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = (g.standard_normal((x, d)).astype(np.float32) for x in (n, m))
    if kind == "log-normal":
        a *= np.exp(0.5 * g.standard_normal((n, 1))).astype(np.float32)
        b *= np.exp(0.5 * g.standard_normal((m, 1))).astype(np.float32)
    elif kind == "sibling":
        source = g.permutation(max(n, m))
        b = np.concatenate([a, b])[source % n][:m] + 0.5 * b
    elif kind == "dead":
        a[g.random(n) < 0.2], b[g.random(m) < 0.2] = 0, 0
    elif kind == "integers":
        a, b = np.rint(a), np.rint(b)
    elif kind == "one norm":
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return a, b


def whole(pairs, metric: str) -> np.ndarray:
    total = 0.0
    for a, b in pairs:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if metric == "dot":
            total = total + a @ b.T
        else:
            d = a[:, None] - b[None]
            total = total + ((d**2).sum(-1) if metric == "l2" else np.abs(d).sum(-1))
    return np.asarray(total)


def check(pairs, metric, maximize: bool, solver):
    cost = FactorCost(pairs, metric, tile=(64, 100))
    found = solve(cost, maximize=maximize, solver=solver)
    matrix = whole(pairs, metric)
    rows, cols = scipy_lsa(matrix, maximize)
    size = np.abs(matrix[rows, cols]).sum() + 1e-300
    assert abs(found.objective - matrix[rows, cols].sum()) <= 1e-11 * size + found.gap_bound
    assert found.objective == pytest.approx(matrix[found.row_ind, found.col_ind].sum(), rel=1e-10, abs=1e-10)
    assert len(np.unique(found.col_ind)) == len(found.row_ind) == min(matrix.shape)
    assert found.gap <= found.gap_bound
    gap, bound = certificate(cost, found, maximize=maximize)
    assert -bound <= gap <= bound
    return found


@pytest.mark.parametrize("solver", [None, CandidateLists()])
@pytest.mark.parametrize("kind", ["gaussian", "log-normal", "sibling", "dead", "integers", "one norm"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (60, 60), (50, 80), (80, 50), (200, 200)])
def test_the_optimum_of_the_dense_matrix(kind, n, m, solver):
    g = np.random.default_rng(fresh_seed())
    for metric in ("dot", "l2", "l1"):
        maximize = bool(g.random() < 0.5)
        pairs = [factors(g, kind, n, m, d) for d in (12, 3)]
        check(pairs, metric, maximize, solver)


@pytest.mark.parametrize("kind", ["gaussian", "sibling"])
def test_lists_at_a_size_that_takes_every_step(kind):
    g = np.random.default_rng(fresh_seed())
    pairs = [factors(g, kind, 1000, 1000, 128)]
    cost = FactorCost(pairs)
    found = solve(cost, maximize=True, solver=CandidateLists())
    best = whole(pairs, "dot")
    assert found.objective == pytest.approx(best[scipy_lsa(best, True)].sum(), rel=1e-11)
    assert found.gap <= found.gap_bound
    warm = solve(cost, maximize=True, solver=CandidateLists(), warm_start=found)
    assert warm.objective == pytest.approx(found.objective, rel=1e-12)


def test_dtypes_and_dense_costs():
    g = np.random.default_rng(fresh_seed())
    a, b = factors(g, "integers", 40, 40, 6)
    value = solve(FactorCost([(a, b)])).objective
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        pair = (torch.from_numpy(a).to(dtype), torch.from_numpy(b).to(dtype))
        assert solve(FactorCost([pair])).objective == value
    assert solve(DenseCost(a @ b.T)).objective == value
    assert solve(FactorCost([(a, b)], "l2")).objective == solve(whole([(a, b)], "l2")).objective
    assert solve(FactorCost([(a[:0], b)])).row_ind.size == 0


def test_indices_do_not_overflow_beyond_46341():
    # 50,000 columns and rows, 2.5e9 entries: never stored; an l1 line is solved by sorting.
    n = 50_000
    g = np.random.default_rng(fresh_seed())
    cost = FactorCost([(g.random((40, 1)).astype(np.float32), g.random((n, 1)).astype(np.float32))])
    assert select_solver(FactorCost([(np.ones((n, 1)), np.ones((n, 1)))])) == CandidateLists()
    items, costs, _ = cost.row_topk(np.zeros(n), 3)
    assert costs == pytest.approx(cost.entries(np.repeat(np.arange(40), 3), items.ravel()).reshape(40, 3))
    found = solve(cost, solver=CandidateLists())
    assert found.gap <= found.gap_bound
    assert found.col_ind.max() < n


@pytest.mark.slow
def test_fifty_thousand_rows_and_columns():
    n = 50_000
    g = np.random.default_rng(fresh_seed())
    a = g.standard_normal((n, 32), np.float32)
    planted = g.permutation(n)
    found = solve(FactorCost([(a, a[planted])], "l2"))
    assert np.array_equal(planted[found.col_ind], np.arange(n))
    assert found.gap <= found.gap_bound


def test_bad_input():
    ones = np.ones((3, 2), np.float32)
    with pytest.raises(ValueError, match="metric: expected one of 'dot', 'l2', 'l1'; got 'cosine'"):
        FactorCost([(ones, ones)], "cosine")
    with pytest.raises(ValueError, match="at least one pair"):
        FactorCost([])
    with pytest.raises(ValueError, match="tile: expected"):
        FactorCost([(ones, ones)], tile=(0, 5))
    with pytest.raises(ValueError, match=r"factors: expected \(3, d\)"):
        FactorCost([(ones, np.ones((3, 4), np.float32))])
    with pytest.raises(ValueError, match="NaN or infinity"):
        FactorCost([(ones * np.nan, ones)])
    with pytest.raises(ValueError, match="overflow"):
        FactorCost([(ones * 1e30, ones * 1e30)])
    with pytest.raises(TypeError, match="floating-point"):
        FactorCost([(np.ones((3, 2), int), ones)])
    with pytest.raises(ValueError, match="LapJV takes square matrices"):
        solve(FactorCost([(ones, ones[:2])]), solver=LapJV())
    with pytest.raises(ValueError, match="takes a FactorCost"):
        solve(ones, solver=CandidateLists())
    with pytest.raises(ValueError, match="warm_start: expected 3 duals"):
        solve(FactorCost([(ones, ones)]), warm_start=solve(ones[:2]))


@pytest.mark.parametrize("metric", ["dot", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("maximize", [False, True])
def test_beginning_again_from_sinkhorns_duals_is_exact(metric, dtype, maximize, monkeypatch):
    g = np.random.default_rng(fresh_seed())
    pairs = [tuple(torch.from_numpy(x).to(dtype) for x in factors(g, "log-normal", 150, 150, 8))]
    cost = FactorCost(pairs, metric)
    begun = []
    real = FactorCost.sinkhorn_duals
    monkeypatch.setattr(
        FactorCost, "sinkhorn_duals", lambda self, *given: begun.append(1) or real(self, *given)
    )
    always = ListSchedule(restart_above=0.0, scaling_above=1.0)
    found = solve(cost, maximize=maximize, solver=CandidateLists(schedule=always))
    assert begun
    matrix = cost.dense()
    assert found.objective == pytest.approx(matrix[scipy_lsa(matrix, maximize)].sum(), rel=1e-10)
    gap, bound = certificate(cost, found, maximize=maximize)
    assert abs(gap) <= bound
    assert found.stats["reads"] <= 150, "duals near the optimum leave next to nothing to read again"


def test_refills_beyond_one_a_row_begin_again(monkeypatch):
    from fastmatch.assignment import candidate_lists as lists

    g = np.random.default_rng(fresh_seed())
    cost = FactorCost([factors(g, "log-normal", 200, 200, 4)])
    begun = []
    monkeypatch.setattr(lists._ListPhases, "restart", lambda self: begun.append(int(self.counts[0])))
    schedule = ListSchedule(refills=0.0, restart_above=1.0, scaling_above=1.0)
    found = solve(cost, solver=CandidateLists(length=2, schedule=schedule))
    assert begun, "the path search was given up for better duals"
    matrix = cost.dense()
    assert found.objective == pytest.approx(matrix[scipy_lsa(matrix)].sum(), rel=1e-10)


def test_sinkhorns_duals_of_l1_are_refused_by_name():
    cost = FactorCost([(np.ones((3, 2), np.float32), np.ones((3, 2), np.float32))], "l1")
    with pytest.raises(ValueError, match="metric: Sinkhorn's duals take 'dot' or 'l2', got 'l1'"):
        cost.sinkhorn_duals(np.zeros(3), [1.0])


@pytest.mark.parametrize("kind", ["gaussian", "log-normal", "sibling", "dead", "integers", "one norm"])
@pytest.mark.parametrize("metric", ["dot", "l2"])
@pytest.mark.parametrize(("n", "m"), [(120, 120), (60, 100), (100, 60)])
def test_screening_in_bfloat16_is_as_exact(kind, metric, n, m):
    g = np.random.default_rng(fresh_seed())
    maximize = bool(g.random() < 0.5)
    pairs = [factors(g, kind, n, m, d) for d in (12, 3)]
    plain = solve(FactorCost(pairs, metric), maximize=maximize, solver=CandidateLists())
    cost = FactorCost(pairs, metric, tile=(64, 100), precision="bf16")
    found = solve(cost, maximize=maximize, solver=CandidateLists())
    assert found.objective == pytest.approx(plain.objective, rel=1e-12)
    assert found.gap <= found.gap_bound == pytest.approx(plain.gap_bound, rel=0.5)
    gap, bound = certificate(cost, found, maximize=maximize)
    assert -bound <= gap <= bound


def test_screening_rounds_the_factors_once_and_reads_little_in_float32(monkeypatch):
    from fastmatch_kernels.row_topk import cpu as cost_rows

    g = np.random.default_rng(fresh_seed())
    cost = FactorCost([factors(g, "sibling", 300, 300, 48)], precision="bf16")
    made, rows = [], {"bf16": 0, "ieee": 0}
    screening_pair, lists = cost_rows.screening_pair, FactorCost._lists
    monkeypatch.setattr(cost_rows, "screening_pair", lambda pairs: made.append(1) or screening_pair(pairs))

    def counted(self, v, k, which, sign, precision):
        rows[precision] += len(which)
        return lists(self, v, k, which, sign, precision)

    monkeypatch.setattr(FactorCost, "_lists", counted)
    found = solve(cost, maximize=True, solver=CandidateLists())
    assert found.gap <= found.gap_bound
    assert len(made) == 1
    assert rows["bf16"] >= 600, "first lists and the certificate"
    assert rows["ieee"] < 0.2 * rows["bf16"]


def test_what_bfloat16_leaves_open_is_read_in_float32_and_then_in_float64(monkeypatch):
    g = np.random.default_rng(fresh_seed())
    order = []
    lists = FactorCost._lists

    def recorded(self, v, k, which, sign, precision):
        order.append(("float64" if self.dtype == torch.float64 else precision, len(which)))
        return lists(self, v, k, which, sign, precision)

    monkeypatch.setattr(FactorCost, "_lists", recorded)
    a = 1 + 1e-3 * g.random((50, 3)).astype(np.float32)  # apart in float32, not in bfloat16
    b = 1 + 1e-3 * g.random((60, 3)).astype(np.float32)
    cost = FactorCost([(a, b)], precision="bf16")
    cost.row_topk(np.zeros(60), 5)
    assert order == [("bf16", 50), ("ieee", 50)]
    order.clear()
    exact = whole([(a, b)], "dot")
    np.testing.assert_allclose(cost.row_min(np.zeros(60)), exact.min(axis=1), rtol=1e-12)
    assert order[:3] == [("bf16", 50), ("bf16", 50), ("ieee", 50)]
    order.clear()
    level = FactorCost([(np.ones((5, 3), np.float32), np.ones((60, 3), np.float32))], precision="bf16")
    np.testing.assert_allclose(level.row_min(np.zeros(60)), 3, rtol=1e-12)
    assert [name for name, _ in order][:5] == ["bf16", "bf16", "ieee", "ieee", "float64"]


def test_a_precision_that_does_not_fit_is_refused():
    ones = np.ones((3, 2), np.float32)
    with pytest.raises(ValueError, match="precision: expected one of 'ieee', 'bf16'; got 'tf32'"):
        FactorCost([(ones, ones)], precision="tf32")
    with pytest.raises(
        ValueError, match="precision: 'bf16' takes 'dot' or 'l2' of at most float32, got 'l1'"
    ):
        FactorCost([(ones, ones)], "l1", precision="bf16")
    with pytest.raises(ValueError, match=r"of at most float32, got 'dot' of torch\.float64"):
        FactorCost([(ones.astype(np.float64), ones)], precision="bf16")
    with pytest.raises(ValueError, match="precision: 'bf16' needs backend 'cpu', got reference"):
        FactorCost([(ones, ones)], backend="reference", precision="bf16")
    assert FactorCost([(ones, ones)], precision="bf16").T.precision == "bf16"


@pytest.mark.parametrize("metric", ["dot", "l2"])
@pytest.mark.parametrize(
    ("left", "right"), [(1.0, 1.0), (1e-70, 1e-70), (1e74, 1e74), (1e140, 1e-120), (1e-90, 1e110)]
)
def test_float64_factors_of_any_size_are_solved_by_lists(left, right, metric):
    if metric == "l2":
        right = left
    g = np.random.default_rng(fresh_seed())
    a, b = left * g.standard_normal((150, 6)), right * g.standard_normal((150, 6))
    for maximize in (False, True):
        found = solve(FactorCost([(a, b)], metric), maximize=maximize, solver=CandidateLists())
        other = solve(FactorCost([(a, b)], metric).dense(), maximize=maximize)
        assert found.is_certified
        assert found.objective == pytest.approx(other.objective, rel=1e-12)
        assert found.col_ind.tolist() == other.col_ind.tolist()


def test_sinkhorns_duals_of_float64_factors_are_those_of_the_reference():
    g = np.random.default_rng(fresh_seed())
    for metric in ("dot", "l2"):
        a, b = g.standard_normal((80, 5)), g.standard_normal((80, 5))
        here = FactorCost([(a, b)], metric)
        steps = (float(here.dense().std()) * np.geomspace(1, 0.05, 10)).tolist()
        found = here.sinkhorn_duals(np.zeros(80), steps)
        narrow = FactorCost([(a.astype(np.float32), b.astype(np.float32))], metric)
        expected = narrow.sinkhorn_duals(np.zeros(80), steps)
        np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_a_hint_to_pass_float64_is_for_other_types():
    for dtype, size, hint in (
        (np.float32, 1e30, "pass float64 or scale"),
        (np.float64, 1e200, "float64; scale"),
    ):
        factor = np.full((3, 2), size, dtype)
        with pytest.raises(ValueError, match=hint):
            FactorCost([(factor, factor)])


@pytest.mark.parametrize(
    "factors",
    [None, "ab", torch.ones(2, 2), (torch.ones(2, 2), torch.ones(2, 2)), [torch.ones(2, 2)], [(1, 2, 3)]],
)
def test_what_is_no_pair_of_matrices_is_named(factors):
    with pytest.raises(TypeError, match=r"^factors: expected pairs of matrices such as \[\(a, b\)\]"):
        FactorCost(factors)


@pytest.mark.parametrize("metric", ["dot", "l2", "l1"])
@pytest.mark.parametrize("widths", [(5,), (5, 3), (0, 4), (0,)])
def test_the_whole_matrix_is_the_sum_over_all_pairs(metric, widths):
    g = np.random.default_rng(fresh_seed())
    pairs = [(g.standard_normal((9, d)), g.standard_normal((11, d))) for d in widths]
    found = FactorCost(pairs, metric).dense()
    between = [a[:, None] - b for a, b in pairs]
    expected = {
        "dot": lambda: sum(a @ b.T for a, b in pairs),
        "l2": lambda: sum((x * x).sum(2) for x in between),
        "l1": lambda: sum(np.abs(x).sum(2) for x in between),
    }[metric]()
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def exact(factors: list[tuple[np.ndarray, np.ndarray]], metric: str) -> list[list[Fraction]]:
    """The matrix of a factor cost, without rounding."""
    pairs = [[[list(map(Fraction, row)) for row in x.tolist()] for x in pair] for pair in factors]
    term = {"dot": lambda x, y: x * y, "l2": lambda x, y: (x - y) ** 2, "l1": lambda x, y: abs(x - y)}[metric]
    rows, columns = (len(x) for x in factors[0])
    return [[sum(sum(map(term, a[i], b[j])) for a, b in pairs) for j in range(columns)] for i in range(rows)]


@pytest.mark.parametrize("metric", ["dot", "l2", "l1"])
@pytest.mark.parametrize("shape", [(9, 9), (9, 14), (14, 9)])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_bound_holds_for_the_product_without_rounding(metric, shape, maximize, dtype):
    """Two pairs that nearly cancel: entries are far smaller than their terms, whose rounding the bound covers."""
    g = np.random.default_rng(fresh_seed())
    a, b = (g.standard_normal((k, 40)) * 10.0 ** g.integers(-3, 4, (k, 1)) for k in shape)
    noise = 1e-6 * g.standard_normal((shape[0], 40))
    factors = [(x.astype(dtype), y.astype(dtype)) for x, y in ((a, b), (noise - a, b))]
    found = solve(FactorCost(factors, metric), maximize=maximize)
    sign = -1 if maximize else 1
    costs = [[sign * x for x in row] for row in exact(factors, metric)]
    u, v = ([sign * Fraction(x) for x in duals.tolist()] for duals in (found.u, found.v))
    matched = sum(costs[i][j] for i, j in zip(found.row_ind.tolist(), found.col_ind.tolist(), strict=True))
    excess = [[x + y - c for y, c in zip(v, row, strict=True)] for x, row in zip(u, costs, strict=True)]
    short = excess if shape[0] <= shape[1] else zip(*excess, strict=True)
    above = sum(max(0, *line) for line in short)
    free = [*(np.delete(found.u, found.row_ind)), *(np.delete(found.v, found.col_ind))]
    assert not any(free), "unmatched lines have duals of zero"
    oriented = FactorCost(factors if shape[0] <= shape[1] else [(b, a) for a, b in factors], metric)
    errors = 3 * oriented.entry_error().sum()
    assert errors <= found.gap_bound <= errors + 1e-12 * found.gap_bound + 1e-9 * float(abs(matched)) + 1e-6
    # No assignment costs less than the duals' sum, less what they are above the costs.
    assert matched - (sum(u) + sum(v)) + above <= Fraction(found.gap) + Fraction(found.gap_bound)
    assert found.is_certified
