"""Shortlists of factor costs against the whole matrix in float64: the right entries, and a bound that holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmatch.assignment import FactorCost
from fastmatch_kernels.gain.reference import gathered
from fastmatch_kernels.ops import row_min, row_topk
from fastmatch_kernels.row_topk import reference
from fastmatch_kernels.row_topk.cpu import merge_tile, round_rows, screening_pair
from helpers.networks import fresh_seed


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


# ------------------------------------------------------------------------------------- precision "bf16"

ADVERSE = (
    "gaussian", "norms", "ties", "near ties", "midpoints", "one sign", "zero rows", "subnormal", "tiny", "mixed", "huge", "largest"
)  # fmt: skip


def adverse(g: np.random.Generator, kind: str, n: int, m: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 factors on which a careless bound would fail."""
    a, b = (g.standard_normal((x, d)) for x in (n, m))
    if kind == "norms":
        a *= 10.0 ** g.integers(-9, 9, (n, 1))
        b *= 10.0 ** g.integers(-9, 9, (m, 1))
    elif kind == "ties":
        a, b = np.rint(a), np.rint(b)
    elif kind == "near ties":
        a, b = 1 + 2.0**-20 * a, 1 + 2.0**-20 * b
    elif kind == "midpoints":  # every rounding errs as much as it can, and all one way
        a, b = 1 + 2.0**-8 * (1 - 2e-5 * (a > 0)), 1 + 2.0**-8 * (1 - 2e-5 * (b > 0))
    elif kind == "one sign":
        a, b = np.exp(a), np.exp(b)
    elif kind == "zero rows":
        a[g.random(n) < 0.5], b[g.random(m) < 0.5] = 0, 0
    elif kind == "subnormal":  # taken as zero by matrix units, though the other factor is large
        a, b = 1e-39 * a, 1e30 * b
    elif kind == "tiny":
        a, b = 1e-20 * a, 1e-20 * b
    elif kind == "mixed":
        a *= 10.0 ** g.integers(-30, 5, (n, d))
        b *= 10.0 ** g.integers(-30, 5, (m, d))
    elif kind == "huge":
        a, b = 1e17 * a, 1e17 * b
    elif kind == "largest":  # rounds to infinity
        a, b = np.full((n, d), np.finfo(np.float32).max), 1e-3 * b
    return tuple(torch.from_numpy(x.astype(np.float32)) for x in (a, b))


def check_screened(result, true: torch.Tensor, v: torch.Tensor, k: int, least: torch.Tensor) -> None:
    """``true``: c - v in float64. ``least``: (n,) what a bound may not fall below."""
    index, costs, bound = result
    n, m = true.shape
    assert index.shape == costs.shape == (n, k)
    assert ((index >= 0).sum(1) == min(k, m)).all()
    outside = true.clone()
    listed = index >= 0
    for i in range(n):
        assert len(index[i][listed[i]].unique()) == min(k, m)
        outside[i, index[i][listed[i]]] = torch.inf
    assert (bound.double() <= outside.amin(1)).all(), "the bound is above a value outside the list"
    if m > k:
        assert (bound.double() >= least).all(), "the bound is needlessly low"
    else:
        assert (bound == torch.inf).all()
    slack = 2.0**-22 * (costs.abs() + v[index.clamp(min=0)].abs()).double()
    values = costs.double() - v[index.clamp(min=0)].double()
    assert (values <= true.gather(1, index.clamp(min=0)) + slack + 1e-30)[listed].all()


@pytest.mark.parametrize("kind", ADVERSE)
@pytest.mark.parametrize(("n", "m", "d"), [(40, 70, 24), (30, 20, 1), (5, 200, 130), (3, 4, 0), (1, 1, 3)])
def test_screening_never_claims_too_much(kind, n, m, d):
    g = np.random.default_rng(fresh_seed())
    a, b = adverse(g, kind, n, m, d)
    product = a.double() @ b.double().T
    scale = float(product.abs().max()) if product.numel() else 0.0
    pair = screening_pair([(a, b)])
    raised = pair[0].double() @ pair[1].double().T
    sizes = a.double().norm(dim=1)[:, None] * b.double().norm(dim=1)
    assert (raised >= product - 1e-13 * sizes).all(), "an inner product of the pair is below the true one"
    for v in (torch.zeros(m), torch.from_numpy(g.standard_normal(m)).float() * scale):
        true = -product - v.double()
        for k in (1, 6):
            # Half a hundredth for each factor's rounding and for the result's, and terms that may be flushed to zero.
            allowed = 2.0**-5 * sizes.amax(1) + 1e-6 * float(v.abs().max()) + 1e-33 * (d + 2)
            allowed += 2.0**-125 * (b.double().norm(dim=1).max() + a.double().norm(dim=1)) * 64 * max(d, 1)
            best = true.sort(dim=1).values[:, min(k, m - 1)]
            result = row_topk([(a, b)], v, k, precision="bf16", tile=(16, 64))
            check_screened(result, true, v, k, best - allowed)
        value, column = row_min([(a, b)], v, precision="bf16")
        slack = 2.0**-20 * (sizes.amax(1) + float(v.abs().max())) + 1e-33 * (d + 2)
        assert (value.double() <= true.amin(1) + slack).all()
        assert ((column >= 0) & (column < m)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_screening_of_several_pairs_reordered(dtype):
    g = np.random.default_rng(fresh_seed())
    factors = [tuple(x.to(dtype) for x in adverse(g, "gaussian", 30, 50, d)) for d in (20, 7)]
    rows = torch.from_numpy(g.integers(0, 50, 60))
    inner = [torch.from_numpy(g.integers(0, 20, 20)), None]
    v = torch.from_numpy(g.standard_normal(60)).float()
    true = -v.double() - sum(
        a.double() @ gathered(b.double(), rows, index).T for (a, b), index in zip(factors, inner, strict=True)
    )
    result = row_topk(factors, v, 5, b_index=rows, contraction_index=inner, precision="bf16")
    check_screened(result, true, v, 5, true.sort(dim=1).values[:, 5] - 3)


def test_every_bfloat16_number_is_lowered_by_its_rounding():
    numbers = np.arange(1 << 16, dtype=np.uint16)
    inner = torch.from_numpy(numbers).view(torch.bfloat16).double().numpy()
    kept = np.flatnonzero(np.isfinite(inner))
    values, items = np.full((len(kept), 1), np.inf, np.float32), np.full((len(kept), 1), -1, np.int32)
    merge_tile(numbers[kept][:, None].copy(), np.zeros(1, np.float32), 0, len(kept), 0, values, items)
    x = inner[kept]
    with np.errstate(over="ignore"):
        expected = (-x - 2.0**-8 * np.abs(x)).astype(np.float32)
    normal = np.abs(x) >= 2.0**-110
    np.testing.assert_array_equal(values[normal, 0], expected[normal])
    np.testing.assert_allclose(values[~normal, 0], expected[~normal], rtol=0, atol=1e-40)


@pytest.mark.parametrize("low", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_rounding_is_to_nearest_but_for_infinity_and_subnormals(low):
    x = torch.from_numpy(((np.arange(1 << 16, dtype=np.uint32) << 16) | low).view(np.float32).copy())
    info = torch.finfo(torch.bfloat16)
    expected = torch.where(x.isfinite(), x.clamp(info.min, info.max), x).bfloat16()
    expected.masked_fill_(expected.abs() < info.tiny, 0)
    near, squares = np.empty((1 << 16, 1), np.uint16), np.empty((3, 1 << 16))
    round_rows(x[:, None].numpy(), near, squares, 0, 1 << 16)
    got = torch.from_numpy(near).view(torch.bfloat16)[:, 0]
    assert ((got == expected) | (got.isnan() & expected.isnan())).all()
    finite = x.isfinite().numpy()
    for square, values in zip(squares, (x, expected, x.double() - expected.double()), strict=True):
        np.testing.assert_allclose(square[finite], values.double().square().numpy()[finite], rtol=1e-12)


def test_minus_infinity_among_the_duals_keeps_a_column_out():
    g = np.random.default_rng(fresh_seed())
    a, b = adverse(g, "gaussian", 10, 30, 8)
    v = torch.zeros(30)
    v[11] = -torch.inf
    index, costs, _ = row_topk([(a, b)], v, 30, precision="bf16")
    assert not (index == 11).any()
    assert (index[:, 29] == -1).all()
    assert (costs[:, 29] == torch.inf).all()


def test_screening_takes_what_it_can():
    ones, v = torch.ones(3, 2), torch.zeros(3)
    for reduce in (lambda *given, **more: row_topk(*given, 1, **more), row_min):
        with pytest.raises(
            ValueError, match="precision: 'bf16' is of backend 'cpu', got 'triton', which takes"
        ):
            reduce([(ones, ones)], v, precision="bf16", backend="triton")
        with pytest.raises(ValueError, match=r"'bf16' takes factors of at most float32, got torch\.float64"):
            reduce([(ones.double(), ones.double())], v, precision="bf16")
        with pytest.raises(ValueError, match="precision: expected one of"):
            reduce([(ones, ones)], v, precision="fp8")
        assert reduce([(ones, ones)], v, precision="bf16", backend="reference")[0].shape[0] == 3
        assert reduce([(ones[:0], ones)], v, precision="bf16")[0].shape[0] == 0
        assert reduce([(ones, ones[:0])], v[:0], precision="bf16")[-1].shape[0] == 3


@pytest.mark.parametrize("metric", ["dot", "l2"])
@pytest.mark.parametrize("kind", ["gaussian", "norms", "ties", "near ties", "midpoints", "zero rows"])
def test_screened_factor_costs_answer_as_exactly(metric, kind):
    g = np.random.default_rng(fresh_seed())
    n, m = 40, 90
    a, b = adverse(g, kind, n, m, 12)
    if kind == "norms":
        a, b = a / 1e6, b / 1e6
    cost = FactorCost([(a, b)], metric, (16, 64), precision="bf16")
    whole = reference.cost([(a, b)], metric).numpy()
    v = g.standard_normal(m) * np.abs(whole).max()
    rows = np.sort(g.permutation(n)[:20])
    size = cost._size.max() + np.abs(v).max()
    for sign in (1.0, -1.0):
        for duals in (v, 0 * v):
            given = sign * whole - duals
            for k in (1, 5, m):
                items, costs, bound = cost.row_topk(duals, k, rows, sign)
                outside = given[rows].copy()
                np.put_along_axis(outside, items.astype(int), np.inf, 1)
                assert (bound <= outside.min(axis=1) + 1e-12 * size).all()
                wanted = sign * np.take_along_axis(whole[rows], items.astype(int), 1)
                np.testing.assert_allclose(costs, wanted, rtol=1e-11, atol=1e-12 * size)
            np.testing.assert_allclose(
                cost.row_min(duals, sign), given.min(axis=1), rtol=1e-12, atol=1e-12 * size
            )
