"""The package rebasin as it comes from PyPI, with and without the backend."""

from __future__ import annotations

import copy
import sys
import types
from pathlib import Path

import pytest
import rebasin
import torch
from rebasin import MergeMany, PermutationCoordinateDescent
from torch import nn

from fastmatch.backends import installed, which_rebasin
from fastmatch.backends.rebasin import calculate_permutations
from helpers.networks import ResNet, fresh_seed, mlp

NETWORKS = {
    "mlp": (lambda: mlp(48), (2, 12)),
    "deep mlp": (
        lambda: nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(20, 20), nn.ReLU())], nn.Linear(20, 4)),
        (2, 20),
    ),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.ReLU(),
            nn.Conv2d(24, 10, 1),
        ),
        (2, 3, 16, 16),
    ),
    "resnet": (ResNet, (2, 3, 16, 16)),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 24), nn.Linear(24, 5)),
        (2, 12),
    ),
}  # fmt: skip


def models(name: str, seed: int) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    build, shape = NETWORKS[name]
    torch.manual_seed(seed)
    return build().eval(), build().eval(), torch.randn(*shape)


def similarity(a: nn.Module, b: nn.Module) -> float:
    """Inner product of all parameters: what the permutation of one of them can raise."""
    return sum(
        float((p.detach().double() * q.detach().double()).sum())
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_the_objective_is_the_same_or_better_and_outputs_are_preserved(name):
    seed = fresh_seed()
    a, b, x = models(name, seed)
    plain, fast = copy.deepcopy(b), copy.deepcopy(b)
    torch.manual_seed(seed)
    PermutationCoordinateDescent(a, plain, x).rebasin()
    torch.manual_seed(seed)
    with installed("rebasin"):
        PermutationCoordinateDescent(a, fast, x).rebasin()
    start, reached = similarity(a, plain), similarity(a, fast)
    assert reached >= start - 1e-6 * abs(start)
    assert reached > similarity(a, b)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), b(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_with_the_solver_alone_replaced_the_result_is_rebasins_own(name, monkeypatch):
    monkeypatch.setattr("fastmatch.backends.patch_target.LEAST_SIZE", 0)
    seed = fresh_seed()
    a, b, x = models(name, seed)
    permutations = []
    for context in (installed(), installed("scipy")):
        torch.manual_seed(seed)
        descent = PermutationCoordinateDescent(a, copy.deepcopy(b), x)
        if context.targets[0].library == "scipy" and len(context.targets) == 1:
            with context:
                descent.calculate_permutations()
        else:
            descent.calculate_permutations()
        permutations.append([p.perm_indices for p, _ in descent.pinit.model_graph.permutation_to_info])
    assert permutations[0]
    assert all(torch.equal(one, other) for one, other in zip(*permutations, strict=True))


def test_a_planted_permutation_is_recovered_and_a_second_call_goes_on_from_the_first():
    seed = fresh_seed()
    a, _, x = models("mlp", seed)
    b = copy.deepcopy(a)
    order = torch.randperm(48)
    with torch.no_grad():
        b[0].weight.copy_(a[0].weight[order])
        b[0].bias.copy_(a[0].bias[order])
        b[2].weight.copy_(a[2].weight[:, order])
    descent = PermutationCoordinateDescent(a, b, x)
    calculate_permutations(descent)
    first = [p.perm_indices.clone() for p, _ in descent.pinit.model_graph.permutation_to_info]
    calculate_permutations(descent)
    again = [p.perm_indices for p, _ in descent.pinit.model_graph.permutation_to_info]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    descent.apply_permutations()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def test_merge_many_runs_on_the_backend():
    seed = fresh_seed()
    a, b, x = models("mlp", seed)
    with installed("rebasin"):
        merged = MergeMany([a, b, copy.deepcopy(b)], mlp(48), x).run()
    with torch.no_grad():
        assert torch.isfinite(merged(x)).all()


def test_attention_falls_back_where_ours_does_not_take_it():
    torch.manual_seed(fresh_seed())

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(12, 16)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.last = nn.Linear(16, 5)

        def forward(self, x):
            x = self.first(x)
            return self.last(self.attention(x, x, x)[0])

    a, b = Attending().eval(), Attending().eval()
    x = torch.randn(2, 3, 12)
    before = b(x).detach()
    with installed("rebasin"):
        PermutationCoordinateDescent(a, b, x).rebasin()
    torch.testing.assert_close(b(x).detach(), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from .permutation_coordinate_descent import PermutationCoordinateDescent", "rebasin"),
        ("from .rebasinnet import *", "sinkhorn-rebasin"),
        ("", None),
    ],
)
def test_the_two_packages_of_that_name_are_told_apart(tmp_path: Path, monkeypatch, text, expected):
    assert which_rebasin() == "rebasin"  # loaded
    (tmp_path / "rebasin").mkdir()
    (tmp_path / "rebasin" / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rebasin")
    assert which_rebasin() == expected
    assert "rebasin" not in sys.modules  # found without importing


def test_without_the_package_there_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "rebasin", types.ModuleType("rebasin"))
    assert which_rebasin() is None
    assert rebasin is not None
