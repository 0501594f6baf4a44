"""Copies of modules whose ``forward`` was replaced: they run with their own weights, or are refused by name."""

from __future__ import annotations

import weakref
from functools import lru_cache, partial, wraps
from types import MethodType

import pytest
import torch
from torch import nn

import fastmatch as fm
from fastmatch._internal.modules import copy_module


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


class Caller:
    """A callable object with a function."""

    def __init__(self, function):
        self.function = function

    def __call__(self, x):
        return self.function(x)


def applied(function, x):
    return 2 * function(x)


def of_weights(layer):
    weight = layer.weight
    return lambda x: nn.functional.linear(x, weight)


def by_reference(layer):
    reference = weakref.ref(layer)
    return lambda x: nn.Linear.forward(reference(), x)


def method_of_a_closure(layer):
    def run(_self, x):
        return layer.weight.sum() + x

    return MethodType(run, layer)


def by_name(layer):
    """Leave the layer where a function finds it by a global name, in a function that another one calls."""
    NAMED["layer"] = layer
    source = "def inner(x):\n    return layer.weight.sum() + x\ndef outer(x):\n    return inner(x)"
    exec(source, NAMED)
    return NAMED["outer"]


NAMED: dict = {"__name__": "a_script"}
HELD = {
    "a closure over its forward": lambda layer: times_three(layer.forward),
    "a partial function of a closure": lambda layer: partial(times_three(layer.forward)),
    "nested partial functions of a closure": lambda layer: partial(partial(applied, times_three(layer.forward))),
    "a partial function by a keyword": lambda layer: partial(lambda x, run: run(x), run=times_three(layer.forward)),
    "a closure over a partial function": lambda layer: times_three(partial(layer.forward)),
    "a closure over closures": lambda layer: times_three(times_three(times_three(times_three(times_three(layer.forward))))),
    "a cached closure": lambda layer: lru_cache(times_three(layer.forward)),
    "an object with a closure": lambda layer: Caller(times_three(layer.forward)),
    "a closure over a list": lambda layer: (lambda found: lambda x: found[0](x))([layer]),
    "a default": lambda layer: lambda x, layer=layer: type(layer).forward(layer, x),
    "a default by name": lambda layer: lambda x, *, layer=layer: type(layer).forward(layer, x),
    "a method of a closure": method_of_a_closure,
    "a closure over its weight": of_weights,
    "a weak reference": by_reference,
    "a global name": by_name,
    "a compiled closure": lambda layer: torch.compile(times_three(layer.forward), backend="eager"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HELD)
def test_a_function_that_holds_the_module_is_refused_by_name(kind, pair):
    model, _ = pair
    model[2].forward = HELD[kind](model[2])
    with pytest.raises(TypeError, match="forward of '2' was replaced by a function that holds the module"):
        copy_module(model)


def test_a_function_that_holds_no_module_is_kept(pair):
    table = {"slope": 0.1}
    for model in pair:
        model[1].forward = partial(lambda x, by: nn.functional.leaky_relu(x, by["slope"]), by=table)
    aligned = fm.align(*pair, X).apply(pair[1])
    assert torch.allclose(aligned(X), pair[1](X), atol=1e-5)
