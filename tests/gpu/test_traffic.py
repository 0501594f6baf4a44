"""What crosses from a GPU to the host in each call: lists of candidates, and never a matrix of 2048 units and more."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastmatch as fm
from fastmatch.matching import gain_solves
from fastmatch.matching.objective import WeightObjective
from fastmatch_kernels.row_topk import entries, reference
from helpers.networks import fresh_seed

UNITS = 256
"""As many as make a gain stay on the device in these tests; 2048 by default."""

LISTED = 64
"""Numbers per unit that one copy to the host may hold."""


@pytest.fixture
def siblings(monkeypatch):
    """A wide network, one with the same units in another order and some noise, and the order."""
    assert gain_solves.LISTED <= 2048
    monkeypatch.setattr(gain_solves, "LISTED", UNITS)
    torch.manual_seed(fresh_seed())
    a = nn.Sequential(nn.Linear(6, UNITS), nn.ReLU(), nn.Linear(UNITS, 3)).eval()
    b, order = copy.deepcopy(a), torch.randperm(UNITS)
    with torch.no_grad():
        b[0].weight.copy_(a[0].weight[order])
        b[0].bias.copy_(a[0].bias[order])
        b[2].weight.copy_(a[2].weight[:, order])
        for parameter in b.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    return a, b, order.argsort()


def check_crossed(gpu, units: int = UNITS, passes: int = 16) -> None:
    """One copy holds at most ``LISTED`` float64 numbers per unit, and all copies together those of a few passes."""
    assert gpu.traffic.largest_to_host <= 8 * LISTED * units, gpu.traffic.bytes_to_host.most_common(3)
    assert gpu.traffic.total <= passes * 12 * LISTED * units, gpu.traffic.bytes_to_host.most_common(3)


@pytest.mark.slow
def test_align_by_weights(gpu, siblings):
    a, b, order = siblings
    spec = fm.PermutationSpec.trace(a, torch.randn(2, 6))
    ga, gb = gpu.module(a), gpu.module(b)
    gpu.traffic.clear()
    found = fm.align(ga, gb, spec=spec)
    assert torch.equal(*(p for p in (next(iter(found.permutations.values())), order)))
    check_crossed(gpu)


def test_align_by_activations(gpu, siblings):
    a, b, order = siblings
    spec = fm.PermutationSpec.trace(a, torch.randn(2, 6))
    ga, gb, data = gpu.module(a), gpu.module(b), [torch.randn(96, 6)]
    gpu.traffic.clear()
    found = fm.align(ga, gb, spec=spec, matcher=fm.ActivationMatching(data))
    assert (next(iter(found.permutations.values())) == order).double().mean() > 0.95
    assert gpu.traffic.operations["moments_update"] > 0
    check_crossed(gpu)


def test_apply_and_merge_move_nothing_to_the_host(gpu, siblings):
    a, b, _ = siblings
    found = fm.align(a, b, torch.randn(2, 6))
    ga, gb = gpu.module(a), gpu.module(b)
    gpu.traffic.clear()
    aligned = found.apply(gb)
    fm.merge([ga, aligned])
    assert gpu.traffic.total == 0
    assert (
        gpu.traffic.operations["permute_merge"] == 4
    )  # the merge; each tensor of apply moves along one axis
    assert len([site for site in gpu.traffic.waits if "kernels/" in site]) == 0
    assert sum(gpu.traffic.waits.values()) <= 2  # that the weights of each model are finite


@pytest.mark.parametrize("mode", ["joint", "sequential"])
@pytest.mark.parametrize("method", ["repair", "rescale", "reshift", "reset"])
def test_renormalize_moves_nothing_to_the_host(gpu, method, mode):
    torch.manual_seed(fresh_seed())
    nets = [
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)
        ).eval()
        for _ in range(2)
    ]
    data = [torch.randn(4, 3, 6, 6) for _ in range(2)]
    placed = [gpu.module(m) for m in nets]
    merged = fm.merge(placed)
    gpu.traffic.clear()
    fm.renormalize(merged, placed, data, fm.Renormalization(method, mode=mode))
    assert gpu.traffic.total == 0
    # That the activations of each network are finite, and that the merge still holds the tensors that were merged.
    assert sum(gpu.traffic.waits.values()) <= 4
    assert gpu.traffic.operations["moments_update"] > 0


def test_a_solve_waits_for_its_check_once(gpu):
    """The objective's change over all tensors of a group is one copy of a number for each."""
    torch.manual_seed(fresh_seed())
    nets = [
        nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3))
        for _ in range(2)
    ]
    spec = fm.PermutationSpec.trace(nets[0], torch.randn(2, 6))
    on_cpu, on_gpu = (
        WeightObjective(*(m.state_dict() for m in models), spec, "affine")
        for models in (nets, [gpu.module(m) for m in nets])
    )
    old = {name: torch.randperm(group.size) for name, group in spec.groups.items()}
    for name in spec.groups:
        new = {name: torch.randperm(spec.groups[name].size)}
        gpu.traffic.clear()
        assert on_gpu.change(new, old) == pytest.approx(on_cpu.change(new, old), rel=1e-10)
        assert sum(gpu.traffic.waits.values()) == 1
        assert gpu.traffic.total <= 8 * len(on_cpu.names())
    assert on_gpu.value(old) == pytest.approx(on_cpu.value(old), rel=1e-10)
    assert on_gpu.scale() == pytest.approx(on_cpu.scale(), rel=1e-10)


@pytest.mark.parametrize(("metric", "dtype", "n"), [
    ("dot", torch.float64, 48),
    pytest.param("dot", torch.float32, 48, marks=pytest.mark.slow), pytest.param("l2", torch.bfloat16, 48, marks=pytest.mark.slow),
    # Only from 128 on is a matrix in float32 larger than what may cross; Triton's interpreter takes a minute for it.
    *(pytest.param(metric, dtype, 160, marks=pytest.mark.slow)
      for metric in ("dot", "l2") for dtype in (torch.float32, torch.bfloat16, torch.float64)),
])  # fmt: skip
def test_a_factor_cost_brings_lists(gpu, metric, dtype, n):
    torch.manual_seed(fresh_seed())
    a, b = torch.randn(n, 20).to(dtype), torch.randn(n, 20).to(dtype)
    maximize = metric == "dot"
    expected = fm.solve(fm.assignment.FactorCost([(a, b)], metric).dense(), maximize=maximize)
    cost = fm.assignment.FactorCost([(gpu.tensor(a), gpu.tensor(b))], metric)
    gpu.traffic.clear()
    found = fm.solve(cost, maximize=maximize, solver=fm.assignment.CandidateLists())
    assert found.is_certified
    assert found.objective == pytest.approx(expected.objective, rel=1e-11)
    if dtype != torch.float64:
        assert gpu.traffic.operations["row_topk"] > 0
    assert gpu.traffic.largest_to_host <= 8 * LISTED * n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("metric", ["dot", "l2", "l1"])
def test_entries_are_exact_in_float64(gpu, metric, dtype):
    torch.manual_seed(fresh_seed())
    factors = [(torch.randn(30, d).to(dtype), torch.randn(50, d).to(dtype)) for d in (7, 130)]
    rows, items = torch.randint(30, (11,)), torch.randint(-1, 50, (11, 19))
    on_gpu = [(gpu.tensor(x), gpu.tensor(y)) for x, y in factors]
    found = entries(on_gpu, gpu.tensor(rows), gpu.tensor(items), metric)
    torch.testing.assert_close(
        found.cpu(), reference.entries(factors, rows, items, metric), rtol=1e-13, atol=1e-12
    )
