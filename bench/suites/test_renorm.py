"""Suite ``renorm``: endpoint statistics in one pass, against hooks written plainly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.lib.nets import pair, vgg16
from bench.lib.paired import compare
from fastmatch.renorm import endpoint_statistics
from fastmatch.studies.digits import Batches


def hooked(model, batches):
    """Mean and variance of every layer's output, from sums in float64, one hook a layer."""
    sums: dict[str, list[torch.Tensor]] = {}

    def add(name, output):
        rows = output.movedim(1, -1).reshape(-1, output.shape[1]).double()
        new = [rows.sum(0), rows.square().sum(0), torch.tensor(len(rows))]
        sums[name] = [s + t for s, t in zip(sums[name], new, strict=True)] if name in sums else new

    handles = [
        layer.register_forward_hook(lambda layer, inputs, output, name=name: add(name, output))
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        for x in batches:
            model(x)
    for handle in handles:
        handle.remove()
    return {name: (s / n, q / n - (s / n) ** 2) for name, (s, q, n) in sums.items()}


@pytest.mark.widths(quick=(64,), full=(64, 128, 256, 512))
def test_endpoint_statistics(benchmark, width):
    """VGG16 with ``width`` units in its widest layers; the statistics REPAIR needs of both endpoints."""
    models, _, _ = pair(lambda: vgg16(width / 512), (2, 3, 32, 32))
    inputs = torch.randn(256, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    data = Batches(inputs, torch.zeros(256, dtype=torch.long), 64)

    def plain():
        return [hooked(model, [x for x, _ in data]) for model in models]

    def forward_alone():
        with torch.no_grad():
            for x, _ in data:
                for model in models:
                    model(x)

    def check(name, ours, theirs):
        if theirs is None:
            return
        for mine, other in zip(ours.models, theirs, strict=True):
            for layer, (mean, variance) in other.items():
                torch.testing.assert_close(mine[layer].mean, mean, rtol=1e-3, atol=1e-5)
                torch.testing.assert_close(mine[layer].variance, variance, rtol=1e-3, atol=1e-6)

    compare(
        benchmark, suite="renorm", instance="VGG16, statistics of two endpoints", size=width, check=check, passes=1,
        ours=lambda: endpoint_statistics(models, data, progress=False),
        peers={"torch float64 hooks": plain, "the forward passes alone": forward_alone},
    )  # fmt: skip
