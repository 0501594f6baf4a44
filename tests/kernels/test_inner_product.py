"""Inner products through indices, by the kernel and by torch, against the plain form in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastmatch_kernels.inner_product import (
    change_of_inner,
    inner,
    row_products,
    row_squares,
    squares_and_inner,
)
from helpers.networks import fresh_seed


@pytest.fixture(autouse=True, params=["kernel", "torch"])
def by(request, monkeypatch):
    """Small tensors go through torch, so the kernel is asked for by their size."""
    if request.param == "kernel":
        monkeypatch.setattr("fastmatch_kernels.inner_product.SMALL", -1)


SHAPES = {
    (40,): [(), (0,)],
    (6, 40): [(), (0,), (1,), (0, 1)],
    (12, 5, 3, 3): [(0,), (1,), (0, 1), (2,), (0, 2), (1, 3)],
    (0, 4): [(1,)],
}
CASES = [(shape, dims) for shape, choices in SHAPES.items() for dims in choices]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def pair(shape, dtype, generator):
    """Two tensors, the first not contiguous, with a mean that float32 sums would drown in."""
    a, b = (torch.randn(shape, generator=generator).add(100).to(dtype) for _ in range(2))
    return a.t().contiguous().t() if a.ndim == 2 else a, b


def plain(a, b, indices):
    for dim, index in indices.items():
        b = b.index_select(dim, index)
    return float((a.double() * b.double()).sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dims"), CASES)
def test_inner_and_its_change(shape, dims, dtype):
    generator = torch.Generator().manual_seed(fresh_seed())
    a, b = pair(shape, dtype, generator)
    then = {dim: torch.randperm(shape[dim], generator=generator) for dim in dims}
    assert inner(a, b, then) == pytest.approx(plain(a, b, then), rel=1e-13)
    assert change_of_inner(a, b, then, then) == 0.0
    for dim in dims:
        now = {**then, dim: then[dim].clone()}
        now[dim][:3] = now[dim][:3].roll(1)
        size = 1e-13 * float((a.double() * b.double()).sum())  # of what the plain difference cancels
        change = change_of_inner(a, b, now, then)
        assert change == pytest.approx(plain(a, b, now) - plain(a, b, then), abs=size + 1e-12)
        identity = {other: index for other, index in then.items() if other != dim}
        every = torch.arange(shape[dim])
        assert change_of_inner(a, b, identity, {**identity, dim: every}) == 0.0
    if len(dims) > 1:
        far = {dim: index.flip(0) for dim, index in then.items()}
        change = change_of_inner(a, b, far, then)
        assert change == pytest.approx(plain(a, b, far) - plain(a, b, then), abs=size + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_small_change_of_a_large_product_is_not_rounded_away(dtype):
    """The change is a difference of parameters, not of two sums of 1e12."""
    a, b = torch.full((64, 2048), 4096.0, dtype=dtype), torch.full((64, 2048), 4096.0, dtype=dtype)
    b[0, 0], b[1, 0] = 4100.0, 4104.0
    a[0, 0] = 4100.0
    swap = torch.arange(64)
    swap[:2] = torch.tensor([1, 0])
    assert change_of_inner(a, b, {0: swap}, {}) == 16.0  # 4 * 4


def test_the_sum_does_not_depend_on_threads():
    """Work large enough to be shared, twice."""
    a, b = (torch.randn(4096, 2100, generator=torch.Generator().manual_seed(k)) for k in range(2))
    index = {0: torch.randperm(4096), 1: torch.randperm(2100)}
    first = inner(a, b, index)
    assert first == inner(a, b, index)
    assert first == pytest.approx(plain(a, b, index), abs=1e-9 * float(a.norm() * b.norm()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 41), (0, 4), ()])
def test_squares_and_inner(shape, dtype):
    generator = torch.Generator().manual_seed(fresh_seed())
    a, b = pair(shape, dtype, generator)
    expected = [plain(x, y, {}) for x, y in ((a, a), (b, b), (a, b))]
    assert squares_and_inner(a, b) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_square_of_what_is_not_finite_is_not_finite(value):
    a, b = torch.ones(50), torch.ones(50)
    b[17] = value
    square_a, square_b, inner_product = squares_and_inner(a, b)
    assert square_a == 50
    assert not math.isfinite(square_b)
    assert not math.isfinite(inner_product)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "columns", "mixed", "strided"])
def test_products_of_rows(layout, dtype):
    generator = torch.Generator().manual_seed(fresh_seed())
    a, b = (torch.randn(size, 37, generator=generator).add(100).to(dtype) for size in (9, 14))
    if layout != "rows":
        a = a.t().contiguous().t()
    if layout == "columns":
        b = b.t().contiguous().t()
    if layout == "strided":
        a, b = a[:, ::2], b[:, ::2]
    rows, cols = (torch.randint(size, (50,), generator=generator) for size in (9, 14))
    expected = (a[rows].double() * b[cols].double()).sum(1)
    torch.testing.assert_close(row_products(a, b, rows, cols), expected, rtol=1e-13, atol=0)
    assert row_products(a[:, :0], b[:, :0], rows, cols).tolist() == [0.0] * 50
    assert row_products(a, b, rows[:0], cols[:0]).shape == (0,)
    torch.testing.assert_close(row_squares(a), a.double().square().sum(1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)))
def test_products_of_rows_of_two_dtypes(dtypes, monkeypatch):
    monkeypatch.setattr("fastmatch_kernels.inner_product.CAST", 50)
    generator = torch.Generator().manual_seed(fresh_seed())
    a, b = (torch.randn(9, 37, generator=generator).add(100).to(dtype) for dtype in dtypes)
    rows, cols = (torch.randint(9, (50,), generator=generator) for _ in range(2))
    expected = (a[rows].double() * b[cols].double()).sum(1)
    for x, y in ((a, b), (a.t().contiguous().t(), b)):
        torch.testing.assert_close(row_products(x, y, rows, cols), expected, rtol=1e-13, atol=0)
