"""Streaming moments against two passes in float64."""

from __future__ import annotations

import pytest
import torch

from fastmatch.statistics.moments import ChannelMoments, CrossMoments
from helpers.networks import fresh_seed


@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 4, 2), (1, 5), (64, 5, 9)])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_channel_moments(shape, offset):
    torch.manual_seed(fresh_seed())
    batches = [torch.randn(n, *shape[1:]) * 3 + offset for n in (shape[0], 1, shape[0] + 2)]
    moments = ChannelMoments()
    for batch in batches:
        moments.update(batch)
    rows = torch.cat([b.double().movedim(1, -1).reshape(-1, 5) for b in batches])
    assert moments.count == len(rows)
    torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments.variance, rows.var(0, correction=0), rtol=1e-4, atol=1e-5)
    index = torch.randperm(5)
    assert torch.equal(moments.permuted(index).variance, moments.variance[index])


def test_channel_moments_of_float64_are_exact_and_of_half_are_float32():
    torch.manual_seed(fresh_seed())
    rows = torch.randn(50, 6, dtype=torch.float64) + 10
    moments = ChannelMoments()
    for part in rows.split([7, 1, 42]):
        moments.update(part)
    torch.testing.assert_close(moments.variance, rows.var(0, correction=0), rtol=1e-12, atol=0)
    half = ChannelMoments()
    half.update(rows.half())
    torch.testing.assert_close(half.mean, rows.half().double().mean(0), rtol=1e-6, atol=0)
    with pytest.raises(TypeError, match="floating point"):
        half.update(torch.arange(4)[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_cross_moments_equal_one_pass_over_everything(dtype):
    torch.manual_seed(fresh_seed())
    a, b = torch.randn(5000, 9) + 20, torch.randn(5000, 4) * 0.1 - 3
    b[:, 1] = a[:, 2] * 2 + 1
    a[:, 5], b[:, 3] = 7.0, 0.0  # dead units
    a, b = a.to(dtype), b.to(dtype)
    moments = CrossMoments()
    for pa, pb in zip(a.split(1234), b.split(1234), strict=True):
        moments.update(pa, pb)
    x, y = a.double(), b.double()
    covariance = (x - x.mean(0)).T @ (y - y.mean(0)) / len(x)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(moments.similarity("covariance"), covariance, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(moments.similarity("inner"), x.T @ y / len(x), rtol=tolerance, atol=tolerance)
    correlation = moments.similarity("correlation")
    deviations = x.std(0, correction=0), y.std(0, correction=0)
    expected = covariance / deviations[0][:, None] / deviations[1][None, :]
    expected = torch.where(torch.isfinite(expected), expected, 0.0)
    expected[5], expected[:, 3] = 0.0, 0.0
    torch.testing.assert_close(
        correlation, expected, rtol=1e-3 if dtype == torch.float16 else 1e-4, atol=1e-4
    )
    assert float(correlation[2, 1]) == pytest.approx(1.0, abs=1e-3)


def test_moments_refuse_what_they_cannot_use():
    moments = CrossMoments()
    with pytest.raises(ValueError, match="no sample"):
        moments.similarity()
    with pytest.raises(ValueError, match="equally many rows"):
        moments.update(torch.zeros(3, 2), torch.zeros(4, 2))
    moments.update(torch.rand(3, 2), torch.rand(3, 2))
    moments.update(torch.zeros(0, 2), torch.zeros(0, 2))
    assert moments.count == 3
    with pytest.raises(ValueError, match="similarity: expected one of"):
        moments.similarity("cosine")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_maps_as_they_lie_give_what_their_rows_give(layout):
    generator = torch.Generator().manual_seed(fresh_seed())
    a, b = (torch.randn(6, c, 5, 4, generator=generator).to(memory_format=layout) + 3 for c in (7, 9))
    maps, rows = CrossMoments(), CrossMoments()
    for part in (slice(4), slice(4, None)):
        maps.update(a[part], b[part])
        rows.update(*(x[part].movedim(1, -1).flatten(0, 2) for x in (a, b)))
    assert maps.count == rows.count == 120
    for kind in ("correlation", "covariance", "inner"):
        torch.testing.assert_close(maps.similarity(kind), rows.similarity(kind), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="dimension 1 aside, got"):
        maps.update(a, b[:, :, :4])
