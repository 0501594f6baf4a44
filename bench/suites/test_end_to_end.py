"""Suite ``end-to-end``: rebasin's networks with and without the backend, and align, apply and merge of a VGG."""

from __future__ import annotations

import copy

import pytest
import rebasin
import torch

import fastmatch as fm
from bench.lib.nets import mlp, pair, resnet18, vgg16
from bench.lib.paired import compare
from bench.lib.published import weight_matching_torch
from fastmatch.backends import installed


def similarity(a, b) -> float:
    return sum(
        float(torch.dot(p.detach().double().flatten(), q.detach().double().flatten()))
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


NETS = {
    "MLP 3 x width": (lambda width: mlp(width), (2, 784)),
    "MLP 15 x width": (lambda width: mlp(width, depth=15, inputs=50), (2, 50)),
    "ResNet18": (resnet18, (1, 3, 32, 32)),
}


@pytest.mark.widths(quick=(256,), full=(256, 512, 1024))
@pytest.mark.parametrize("name", NETS)
def test_rebasin(benchmark, name, width):
    """Construction (rebasin's own tracing), matching and applying, on the networks its tests and README name."""
    if (name == "MLP 15 x width" and width > 256) or (name == "ResNet18" and width > 512):
        pytest.skip("minutes for rebasin alone")
    build, example = NETS[name]
    size = width // 8 if name == "ResNet18" else width
    (a, b), _, x = pair(lambda: build(size), example)

    def plain():
        model = copy.deepcopy(b)
        torch.manual_seed(0)
        rebasin.PermutationCoordinateDescent(a, model, x).rebasin()
        return model

    def ours():
        with installed():
            return plain()

    before = b(x).detach()

    def check(peer, mine, theirs):
        assert similarity(a, mine) >= similarity(a, theirs) - 1e-6 * abs(similarity(a, theirs))
        torch.testing.assert_close(mine(x).detach(), before, rtol=1e-3, atol=1e-4)

    compare(
        benchmark, suite="end-to-end", instance=f"rebasin, {name}", size=size, ours=ours, check=check,
        peers={"rebasin": plain}, rounds=3 if width <= 256 else 0,
    )  # fmt: skip


@pytest.mark.widths(quick=(128,), full=(256, 512))
def test_align_apply_merge(benchmark, width):
    models, spec, _ = pair(lambda: vgg16(width / 512), (2, 3, 32, 32))
    a, b = models

    def ours():
        alignment = fm.align(a, b, spec=spec, progress=False)
        return fm.merge([a, alignment.apply(b)])

    def published():
        state_a, state_b = a.state_dict(), b.state_dict()
        perms = weight_matching_torch(state_a, state_b, spec, 0)
        merged = copy.deepcopy(a)
        for name, tensor in state_b.items():
            for axis, group in spec.axes_of(name):
                tensor = tensor.index_select(axis.dim, perms[group])
            state_b[name] = (state_a[name] + tensor) / 2
        merged.load_state_dict(state_b)
        return merged

    def check(name, mine, theirs):  # the closer the two models, the longer their average
        assert similarity(mine, mine) >= similarity(theirs, theirs) * (1 - 1e-5)

    compare(
        benchmark, suite="end-to-end", instance="VGG16: align, apply, merge", size=width, ours=ours, check=check,
        peers={"torch float32": published}, rounds=3 if width <= 128 else 0,
    )  # fmt: skip
