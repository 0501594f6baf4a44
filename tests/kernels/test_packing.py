"""Packed factors: what float16 keeps of rows of any size, and products in several pieces."""

from __future__ import annotations

import pytest
import torch

import fastmatch as fm
from fastmatch_kernels._triton.packing import DEPTH, pack
from fastmatch_kernels.gain import triton as gain_triton
from fastmatch_kernels.ops import gain, row_min, row_topk
from fastmatch_kernels.row_topk import triton as cost_rows
from helpers.kernel_cases import DEVICE, fresh_generator


def any_size(rows, columns):
    """Rows from the smallest to the largest normal numbers, with elements far below the row's largest."""
    generator = fresh_generator()
    x = torch.randn(rows, columns, generator=generator)
    x *= 2.0 ** torch.linspace(-126, 125, rows)[:, None]
    x *= 2.0 ** -(60 * torch.rand(rows, columns, generator=generator) ** 4)
    return x.to(DEVICE)


def meant(packed, rows, depth):
    """(high, low) as what they stand for, in float64."""
    scale = packed.scale.double()[:, None] * 2.0**-12
    return packed.high[:rows, :depth].double() * scale, packed.low[:rows, :depth].double() * scale


@pytest.mark.parametrize("strided", [False, True])
def test_scaled_parts_hold_their_bound_for_rows_of_any_size(strided):
    x = any_size(70, 90)
    x = x.T.contiguous().T if strided else x
    packed = pack([x], "fp16x3")
    high, low = meant(packed, 70, 90)
    largest = x.double().abs().amax(1, keepdim=True)
    floor = 2.0**-37 * largest
    assert torch.all((x.double() - high).abs() <= 2.0**-11 * x.double().abs() + floor)
    assert torch.all((x.double() - high - low).abs() <= 2.0**-22 * x.double().abs() + floor)
    assert packed.high.shape == (70, 2 * DEPTH)
    assert not packed.high[:, 90:].any()
    assert packed.high.abs().max() <= 2**13


def test_rows_of_zeros_and_subnormals():
    x = torch.zeros(3, 8, device=DEVICE)
    x[1, 2], x[2] = 2.0**-149, torch.arange(8) * 2.0**-140
    high, low = meant(pack([x], "fp16x3"), 3, 8)
    assert torch.equal(high + low, x.double())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy inside the interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("precision", ["fp16", "fp16x3"])
def test_bounds_hold_beside_what_is_not_finite_and_what_overflows(precision):
    generator = fresh_generator()
    a, b = (
        torch.randn(4, 8, generator=generator).to(DEVICE),
        torch.randn(40, 8, generator=generator).to(DEVICE),
    )
    v = torch.zeros(40, device=DEVICE)
    a[1, 2], a[2, 3] = float("nan"), float("inf")
    for left, right in ((a, b), (1e30 * a, 1e30 * b)):
        _, _, bound = row_topk([(left, right)], v, 3, precision=precision, backend="triton")
        assert torch.all(bound[1:3] == -float("inf"))
        assert bound[[0, 3]].isfinite().all() == (left is a)
    assert torch.all(row_topk([(1e30 * a, 1e30 * b)], v, 3, backend="triton")[2][[0, 3]] == -float("inf"))


def test_pairs_lie_side_by_side_in_the_order_asked_for():
    generator = fresh_generator()
    first, second = (torch.randn(9, d, generator=generator).to(DEVICE) for d in (5, 70))
    rows, order = torch.tensor([4, 4, 0], device=DEVICE), torch.randperm(70, generator=generator).to(DEVICE)
    expected = torch.cat([first[rows], second[rows][:, order]], 1)
    for precision in ("fp16x3", "ieee"):
        packed = pack([first, second], precision, rows, [None, order])
        got = sum(meant(packed, 3, 75)) if precision == "fp16x3" else packed.high[:, :75].double()
        torch.testing.assert_close(got, expected.double(), rtol=2.0**-21, atol=1e-9)
    half = pack([first.bfloat16(), second.bfloat16()], "half", rows, [None, order])
    assert torch.equal(half.high[:, :75], expected.bfloat16())


def test_half_precision_is_read_in_place_where_it_can_be():
    x = torch.zeros(4, 2 * DEPTH, dtype=torch.bfloat16, device=DEVICE)
    assert pack([x], "half").high is x
    assert pack([x.T.contiguous().T], "half").high is not x
    assert pack([x[:, 1:]], "half").high.stride(0) % 16 == 0


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy inside the interpreter
@pytest.mark.parametrize("precision", ["fp16", "fp16x3"])
def test_products_of_rows_of_any_size_hold_their_bound(precision):
    a, b = any_size(40, 30), any_size(50, 30).flip(0)
    exact = a.double() @ b.double().T
    fits = exact.abs() < 1e38
    got = gain([(a, b)], precision=precision, backend="triton").double()
    each = torch.stack(
        [
            cost_rows.product_error([(a, b[j : j + 1])], torch.zeros(1, device=DEVICE), precision)
            for j in range(50)
        ],
        1,
    )
    assert fits.sum() > 500
    assert torch.all(((got - exact).abs() <= each)[fits])
    big = exact.abs() > 1e39
    assert torch.all(got[big].isinf())


@pytest.mark.parametrize("precision", ["fp16", "fp16x3"])
@pytest.mark.parametrize("apart", [24, 30, 50])
def test_bounds_hold_for_pairs_of_opposite_sizes(precision, apart):
    generator = fresh_generator()
    draw = lambda n: torch.randn(n, 12, generator=generator).to(DEVICE)  # noqa: E731
    small = 2.0**-apart
    factors = [(draw(20), small * draw(60)), (small * draw(20), draw(60))]
    v = torch.zeros(60, device=DEVICE)
    exact = -sum(a.double() @ b.double().T for a, b in factors)
    index, costs, bound = row_topk(factors, v, 4, precision=precision, backend="triton")
    error = cost_rows.product_error(factors, v, precision)[:, None]
    assert torch.all((costs.double() - exact.gather(1, index)).abs() <= error)
    outside = exact.scatter(1, index, torch.inf).amin(1)
    assert torch.all(bound.double() <= outside)
    cost = fm.assignment.FactorCost([(a.cpu(), b[:20].cpu()) for a, b in factors], backend="triton")
    best = fm.solve(cost.dense(), maximize=True).objective
    if DEVICE == "cpu":
        found = fm.solve(cost, maximize=True, solver=fm.assignment.CandidateLists())
        assert found.objective == pytest.approx(best, rel=1e-9)


@pytest.mark.slow
def test_the_longest_lists_have_candidates():
    few = [cost_rows.few_of(k, tiles) for k in (1021, 1024, 4000) for tiles in (2, 4, 16, 64)]
    assert all(f >= 1 for f in few)
    a, b = torch.randn(2, 4, device=DEVICE), torch.randn(1500, 4, device=DEVICE)
    index, _, _ = row_topk([(a, b)], torch.zeros(1500, device=DEVICE), 1024, backend="triton")
    assert torch.all(index.sort(1).values.diff(dim=1) > 0)


@pytest.mark.parametrize("precision", ["ieee", "fp16x3"])
def test_least_values_a_few_bits_apart_are_told_apart(precision):
    a = torch.ones(1, 1, device=DEVICE)
    b = -(1 + torch.arange(32, device=DEVICE).flip(0)[:, None] * 2.0**-23)
    value, column = row_min([(a, b)], torch.zeros(32, device=DEVICE), precision=precision, backend="triton")
    exact = (-b[:, 0]).double()
    allowed = cost_rows.product_error([(a, b)], torch.zeros(32, device=DEVICE), precision)
    assert abs(value.double() - exact.min()) <= allowed
    assert exact[column] - exact.min() <= 2 * allowed


def test_deep_factors_are_added_in_pieces(monkeypatch):
    generator = fresh_generator()
    pairs = [tuple(torch.randn(n, d, generator=generator).to(DEVICE) for n in (33, 40)) for d in (150, 90)]
    order = [torch.randperm(150, generator=generator).to(DEVICE), None]
    whole = gain(pairs, contraction_index=order, precision="fp16x3", backend="triton")
    monkeypatch.setattr(gain_triton, "PACKED", 4 * 73 * 70)  # 64 columns a piece
    calls = []
    monkeypatch.setattr(gain_triton, "factor_arguments", lambda *x: calls.append(x) or factor_arguments(*x))
    from fastmatch_kernels._triton.product import factor_arguments

    pieces = gain(pairs, contraction_index=order, precision="fp16x3", backend="triton")
    assert len(calls) == 4
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-4)


def test_zeros_of_both_signs_tie():
    a, b = torch.ones(1, 2, device=DEVICE), torch.zeros(40, 2, device=DEVICE)
    b[1::2] = -0.0
    for precision in ("ieee", "fp16", "fp16x3"):
        index, _, _ = row_topk(
            [(a, b)], torch.zeros(40, device=DEVICE), 3, precision=precision, backend="triton"
        )
        assert index.tolist() == [[0, 1, 2]]
