"""Suite ``moments``: cross moments of activations in one pass, against plain torch and the published batches."""

from __future__ import annotations

import pytest
import torch

from bench.lib.paired import compare
from fastmatch.statistics.moments import CrossMoments

SAMPLES, BATCH = 8192, 1024


@pytest.mark.widths(quick=(256, 512), full=(256, 512, 1024, 2048, 4096))
def test_correlation(benchmark, width):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SAMPLES, width, generator=generator).relu_() for _ in range(2))

    def ours():
        moments = CrossMoments()
        for u, v in zip(a.split(BATCH), b.split(BATCH), strict=True):
            moments.update(u, v)
        return moments.similarity("correlation")

    def plain():
        u, v = ((x - x.mean(0)) / x.std(0, correction=0) for x in (a, b))
        return u.T @ v / SAMPLES

    def streamed():
        sums = [
            torch.zeros(width, width, dtype=torch.float64),
            *(torch.zeros(width, dtype=torch.float64) for _ in range(4)),
        ]
        for u, v in zip(a.split(BATCH), b.split(BATCH), strict=True):
            u, v = u.double(), v.double()
            for total, new in zip(
                sums, (u.T @ v, u.sum(0), v.sum(0), (u * u).sum(0), (v * v).sum(0)), strict=True
            ):
                total += new
        cross, su, sv, uu, vv = (s / SAMPLES for s in sums)
        return (cross - torch.outer(su, sv)) / torch.outer((uu - su**2).sqrt(), (vv - sv**2).sqrt())

    def close(name, mine, theirs):
        assert float((mine - theirs).abs().max()) < 1e-4, name

    peers = {"torch float64, streamed": streamed, "torch float32, all at once": plain}
    compare(
        benchmark, suite="moments", instance=f"correlation of {SAMPLES} samples", size=width, ours=ours, peers=peers,
        check=close, neurons=width, passes=1,
    )  # fmt: skip
