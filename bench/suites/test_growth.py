"""Suite ``growth``: time and memory against width and depth. Time outside of the gain's products must not outgrow them."""

from __future__ import annotations

import time

import pytest
import torch

from bench.lib.nets import mlp, pair
from bench.lib.paired import compare
from fastmatch.matching.weights import WeightMatching


@pytest.mark.widths(quick=(256, 512, 1024), full=(256, 512, 1024, 2048, 4096, 8192, 16384))
def test_width(benchmark, width):
    """One square hidden layer, one sweep: a gain of 2 n^3 operations, an assignment, the check in float64."""
    (one, two), spec, _ = pair(lambda: mlp(width, depth=1, inputs=width), (2, width))
    a, b = one.state_dict(), two.state_dict()
    product = {"the gain's product alone": lambda: a["0.weight"] @ b["0.weight"].T}
    compare(
        benchmark, suite="growth", instance="one sweep of one layer", size=width, peers=product,
        check=lambda *_: None, ours=lambda: WeightMatching(max_sweeps=1).match(a, b, spec, progress=False),
        rounds=3 if width < 8192 else 0, neurons=width,
    )  # fmt: skip
    benchmark.extra_info["beside_seconds"] = max(
        benchmark.extra_info["seconds"]["fastmatch"]
        - benchmark.extra_info["seconds"]["the gain's product alone"],
        1e-9,
    )


@pytest.mark.depths(quick=(2, 4, 8), full=(2, 4, 8, 16, 32, 64))
def test_depth(benchmark, depth):
    """One sweep of ``depth`` layers of 512 units."""
    (one, two), spec, _ = pair(lambda: mlp(512, depth=depth, inputs=512), (2, 512))
    a, b = one.state_dict(), two.state_dict()
    compare(
        benchmark, suite="growth", instance="one sweep of layers of 512", size=depth, along="depth", peers={},
        check=lambda *_: None, ours=lambda: WeightMatching(max_sweeps=1).match(a, b, spec, progress=False),
        neurons=512 * depth,
    )  # fmt: skip


@pytest.mark.widths(quick=(256, 512), full=(256, 1024, 4096))
def test_trace(benchmark, width):
    """Tracing runs the model once: its time should not follow the width."""
    import fastmatch as fm

    model, x = mlp(width), torch.randn(2, 784)
    start = time.perf_counter()
    with torch.no_grad():
        model(x)
    forward = time.perf_counter() - start
    compare(
        benchmark, suite="growth", instance="tracing an MLP", size=width, peers={}, check=lambda *_: None,
        ours=lambda: fm.PermutationSpec.trace(model, x), forward_seconds=forward,
    )  # fmt: skip
