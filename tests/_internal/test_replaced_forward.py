"""Copies of modules whose ``forward`` was replaced: they run with their own weights, or are refused by name."""

from __future__ import annotations

from functools import partial, wraps
from types import MethodType

import pytest
import torch
from torch import nn

import fastmatch as fm


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return tuple(nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 4)).eval() for _ in range(2))


def doubled(module, x):
    return 2 * type(module).forward(module, x)


def times_three(function):
    @wraps(function)
    def run(x):
        return 3 * function(x)

    return run


X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
OWN = {
    "a method": lambda layer: MethodType(doubled, layer),
    "a partial function": lambda layer: partial(doubled, layer),
    "a compiled method": lambda layer: torch.compile(layer.forward, backend="eager"),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", OWN)
def test_a_copy_runs_with_its_own_weights(kind, pair):
    for model in pair:
        model[2].forward = OWN[kind](model[2])
    expected = [model(X) for model in pair]
    alignment = fm.align(*pair, X)
    assert torch.allclose(alignment.apply(pair[1])(X), expected[1], atol=1e-5)
    merged = fm.merge(list(pair))
    factor = 1 if "compiled" in kind else 2
    hidden = torch.relu(nn.functional.linear(X, merged[0].weight, merged[0].bias))
    assert torch.allclose(
        merged(X), factor * nn.functional.linear(hidden, merged[2].weight, merged[2].bias), atol=1e-5
    )
    assert all(torch.equal(model(X), before) for model, before in zip(pair, expected, strict=True))


def test_a_function_that_holds_the_module_is_refused_by_name(pair):
    for model in pair:
        model[2].forward = times_three(model[2].forward)
    with pytest.raises(TypeError, match="forward of '2' was replaced by a function that holds the module"):
        fm.merge(list(pair))


def test_a_function_that_holds_no_module_is_kept(pair):
    for model in pair:
        model[1].forward = lambda x, slope=0.1: nn.functional.leaky_relu(x, slope)
    aligned = fm.align(*pair, X).apply(pair[1])
    assert torch.allclose(aligned(X), pair[1](X), atol=1e-5)
