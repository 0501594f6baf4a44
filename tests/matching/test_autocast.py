"""Under torch.autocast: what is found does not depend on casts that an earlier pass has left."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastmatch as fm


def network():
    return nn.Sequential(
        nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9), nn.ReLU(), nn.Flatten(), nn.Linear(144, 12), nn.ReLU(), nn.Linear(12, 4)
    ).eval()  # fmt: skip


@pytest.fixture
def pair():
    torch.manual_seed(2)
    return network(), network()


X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
DATA = [(X + k, torch.arange(4)) for k in range(3)]
CALLS = {
    "align by weights": lambda a, b: fm.align(a, b, X).permutations,
    "align by activations": lambda a, b: fm.align(a, b, X, fm.ActivationMatching(DATA)).permutations,
    "align by Fisher information": lambda a, b: fm.align(a, b, X, fm.FisherMatching(DATA)).permutations,
    "align by training": lambda a, b: fm.align(a, b, X, fm.StraightThrough(DATA, epochs=1)).permutations,
    "align many": lambda a, b: fm.align_many([a, b], X)[1].permutations,
    "partial": lambda a, b: fm.merge_partial([a, b], X, fm.Zip(DATA)).model.state_dict(),
    "balance": lambda a, b: fm.balance(a, X).scales,
    "repair": lambda a, b: fm.renormalize(fm.merge([a, b]), [a, b], DATA, "repair").state_dict(),
    "least squares": lambda a, b: fm.renormalize(
        fm.merge([a, b]), [a, b], DATA, "least-squares"
    ).state_dict(),
    "verify": lambda a, b: {
        group: torch.ones(1) for group in fm.verify(b, fm.PermutationSpec.trace(b, X), X).groups
    },
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_finds_the_same_after_the_models_have_run(name, pair):
    call = CALLS[name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = call(*pair)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.is_autocast_cache_enabled()
        for model in pair:
            model(X)  # its casts are kept until the context ends
        second = call(*pair)
        assert torch.is_autocast_cache_enabled()
    assert first.keys() == second.keys()
    assert first
    for key, value in first.items():
        assert torch.equal(value, second[key])
