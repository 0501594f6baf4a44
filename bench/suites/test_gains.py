"""Suite ``gains``: the gain of one layer, built and followed, against the products alone and the published form."""

from __future__ import annotations

import pytest
import torch

from bench.lib.nets import mlp, pair
from bench.lib.paired import compare
from bench.lib.published import gain as published
from fastmatch.matching.gains import Gains


def close(name, ours, theirs):
    theirs = torch.as_tensor(theirs).to(torch.float64)
    assert float((ours.double() - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max()), name


@pytest.mark.widths(quick=(256, 512), full=(256, 512, 1024, 2048, 4096))
@pytest.mark.parametrize("share", [1.0, 0.05])
def test_middle_layer(benchmark, width, share):
    """The gain of the middle of three hidden layers after a share of the first one's units has moved."""
    (one, two), spec, _ = pair(lambda: mlp(width), (2, 784))
    a, b = one.state_dict(), two.state_dict()
    group, neighbour = list(spec.groups.values())[1], next(iter(spec.groups))
    generator = torch.Generator().manual_seed(0)
    perms = spec.random(generator)
    then, now = dict(perms), dict(perms)
    picked = torch.randperm(width, generator=generator)[: int(share * width)]
    now[neighbour] = perms[neighbour].clone()
    now[neighbour][picked] = perms[neighbour][picked.roll(1)]
    gains = Gains(a, b, spec, budget=2**40)
    gains.of(group, group.axes, then)
    turn = [then]

    def follow():
        turn[0] = now if turn[0] is then else then
        return gains.of(group, group.axes, turn[0])

    def products():
        return a["2.weight"] @ b["2.weight"][:, turn[0][neighbour]].T

    for _ in range(2):
        found = follow()
        wide = [{k: v.double().numpy() for k, v in s.items()} for s in (a, b)]
        close("numpy", found, published(*wide, spec, group, {k: v.numpy() for k, v in turn[0].items()}))
    peers = {"torch, one product alone": products}
    if width <= 2048:
        peers["numpy float64"] = lambda: published(
            *wide, spec, group, {k: v.numpy() for k, v in turn[0].items()}
        )
    name = "all units moved" if share == 1 else "5% of units moved"
    compare(
        benchmark, suite="gains", instance=name, size=width, peers=peers,
        ours=follow, check=lambda *_: None, neurons=width,
    )  # fmt: skip
