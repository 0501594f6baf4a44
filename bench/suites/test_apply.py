"""Suite ``apply``: permuting and merging, against plain indexing and against the copy bandwidth of the machine."""

from __future__ import annotations

import pytest
import torch

from bench.lib.nets import mlp, pair
from bench.lib.paired import compare
from fastmatch.merging.average import merge_states
from fastmatch.permutations.apply import apply_permutations


def indexed(state, spec, perms):
    moved = {}
    for name, tensor in state.items():
        for axis, group in spec.axes_of(name):
            tensor = tensor.index_select(axis.dim, perms[group])
        moved[name] = tensor.clone() if tensor is state[name] else tensor
    return moved


def equal(name, ours, theirs):
    if not name.startswith("copy"):
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor)


@pytest.mark.widths(quick=(512,), full=(512, 1024, 2048, 4096, 8192))
@pytest.mark.parametrize("what", ["apply", "merge"])
def test_bandwidth(benchmark, what, width):
    """``copy``: cloning the result's bytes, read and written once."""
    (one, two), spec, _ = pair(lambda: mlp(width), (2, 784))
    a, b = one.state_dict(), two.state_dict()
    perms = spec.random(torch.Generator().manual_seed(0))
    plain, ours = {
        "apply": (lambda: indexed(b, spec, perms), lambda: apply_permutations(b, spec, perms)),
        "merge": (lambda: {k: 0.5 * a[k] + 0.5 * b[k] for k in a}, lambda: merge_states([a, b])),
    }[what]
    bytes_ = sum(t.numel() * t.element_size() for t in b.values())
    compare(
        benchmark, suite="apply", instance=what, size=width, ours=ours, check=equal, rounds=5,
        peers={"torch, plainly": plain, "copy of one model": lambda: {k: t.clone() for k, t in b.items()}},
        model_bytes=bytes_,
    )  # fmt: skip
