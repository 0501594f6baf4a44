"""Packed factors: what float16 keeps of rows of any size, and products in several pieces."""

from __future__ import annotations

import pytest
import torch

from fastmatch_kernels._triton.packing import DEPTH, pack
from fastmatch_kernels.gain import triton as gain_triton
from fastmatch_kernels.ops import gain, row_topk
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
def test_what_is_not_finite_stays_so():
    x = torch.ones(3, 8, device=DEVICE)
    x[0, 1], x[1, 2], x[2, 3] = float("nan"), float("inf"), -float("inf")
    high, low = meant(pack([x], "fp16x3"), 3, 8)
    assert torch.equal(high.isnan(), x.isnan())
    assert torch.equal(high[1:].isinf(), x[1:].isinf())
    assert torch.equal(low[1:].isnan(), torch.zeros_like(low[1:], dtype=torch.bool))


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
