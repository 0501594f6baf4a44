"""The gain of weight matching on a GPU: products of the tensors where they are, read through indices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastmatch as fm
from fastmatch.matching.device_gain import factor_views
from fastmatch.matching.gains import Gains
from fastmatch.spec import Axis
from helpers.networks import VGG, ResNet, fresh_seed, mlp


@pytest.mark.parametrize(
    ("shape", "axis", "size"),
    [
        ((6, 10), Axis("w", 0), 6),
        ((6, 10), Axis("w", 1), 10),
        ((6, 5, 3, 3), Axis("w", 0), 6),
        ((6, 5, 3, 3), Axis("w", 1), 5),
        ((4, 5 * 6), Axis("w", 1, inner=6), 5),
        ((3 * 4 * 2, 7), Axis("w", 0, outer=3, stride=8, inner=2), 4),
        ((4, 20), Axis("w", 1, start=7), 6),
        ((3, 8, 5), Axis("w", 2, at=((0, 1, 1),)), 5),
        ((6, 1), Axis("w", 0), 6),
    ],
)
def test_views_multiply_to_the_gain_of_reordered_copies(shape, axis, size):
    torch.manual_seed(fresh_seed())
    a, b = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    part = axis.slice_of(a)
    order = {d: torch.randperm(part.shape[d]) for d in range(a.ndim) if d != axis.dim and part.shape[d] > 1}
    views = factor_views(a, b, axis, size, order)
    assert views is not None
    found = sum(x @ (y if views.order is None else y[:, views.order]).T for x, y in views.pairs)
    moved = axis.slice_of(b)
    for d, index in order.items():
        moved = moved.index_select(d, index)
    positions = axis.positions(size)
    rows = [
        x.movedim(axis.dim, 0)[positions].movedim(1, 0).reshape(size, -1) for x in (axis.slice_of(a), moved)
    ]
    torch.testing.assert_close(found, rows[0] @ rows[1].T)
    assert all(x.untyped_storage().data_ptr() == a.untyped_storage().data_ptr() for x, _ in views.pairs)


def test_groups_that_move_the_units_own_dimension_are_left_to_copies():
    x = torch.randn(6, 4)
    assert factor_views(x, x, Axis("w", 0, inner=2), 3, {0: torch.arange(6)}) is None


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("network", [mlp, VGG, ResNet])
def test_gains_equal_the_cpus_while_groups_move(gpu, network, dtype):
    seed = fresh_seed()
    torch.manual_seed(seed)
    a, b = network().to(dtype), network().to(dtype)
    x = torch.randn(2, 12) if network is mlp else torch.randn(2, 3, 8, 8)
    spec = fm.PermutationSpec.trace(a, x.to(dtype))
    states = [m.state_dict() for m in (a, b)]
    placed = [gpu.module(m).state_dict() for m in (a, b)]
    ours, theirs = (Gains(*pair, spec, 1 << 30) for pair in (placed, states))
    permutations, rng = spec.identity(), np.random.default_rng(seed)
    gpu.traffic.clear()
    for _ in range(12):
        group = spec.groups[str(rng.choice(spec.top_level()))]
        axes = [axis for axis in group.axes if states[0][axis.parameter].is_floating_point()]
        found, expected = (g.of(group, axes, permutations) for g in (ours, theirs))
        scale = float(expected.abs().max())
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=2e-5 * scale)
        moved = torch.from_numpy(rng.permutation(group.size))
        permutations = {**permutations, group.name: moved if rng.random() < 0.5 else permutations[group.name]}
    assert gpu.traffic.operations["gain"] > 0
    sites = [site for site in gpu.traffic.waits if not site.startswith("tests")]
    assert not [s for s in sites if "gains.py" in s or "kernels/" in s], "the GPU was waited for"
