"""Compiled models are read as they were written, by every call that looks inside; only scores run what was compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastmatch as fm
from fastmatch._internal.eager import eagerly

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
DATA = [(X + k, torch.arange(4)) for k in range(3)]


def network():
    return nn.Sequential(
        nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9), nn.ReLU(), nn.Flatten(), nn.Linear(144, 12), nn.ReLU(), nn.Linear(12, 4)
    ).eval()  # fmt: skip


def merged(method, mode="joint"):
    how = fm.Renormalization(method, mode)
    return lambda a, b: fm.renormalize(fm.merge([a, b]), [a, b], DATA, how).state_dict()


def permutations(matcher=None):
    return lambda a, b: fm.align(a, b, X, matcher).permutations


CALLS = {
    "weights": permutations(),
    "activations": permutations(fm.ActivationMatching(DATA)),
    "Fisher": permutations(fm.FisherMatching(DATA)),
    "training": permutations(fm.StraightThrough(DATA, epochs=1)),
    "partial": lambda a, b: fm.merge_partial([a, b], X, fm.Zip(DATA)).model.state_dict(),
    "repair": merged("repair"),
    "reset, layer by layer": merged("reset", "sequential"),
    "least squares": merged("least-squares", "sequential"),
    "layers": lambda a, b: {"variance": torch.tensor(fm.layer_table({"a": a}, DATA).column("variance"))},
}


@pytest.fixture
def compiled():
    """Two networks, and the same compiled, whole and in part; a list of the graphs that were compiled."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(3)
    plain = network(), network()
    wrapped = []
    for model in plain:
        inner = nn.Sequential(*copy.deepcopy(model))
        inner[4].forward = torch.compile(inner[4].forward, backend=backend)
        wrapped.append(torch.compile(inner, backend=backend))
    yield plain, wrapped, graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CALLS)
def test_a_call_compiles_nothing_and_finds_what_it_finds_in_the_plain_models(name, compiled):
    plain, wrapped, graphs = compiled
    expected, found = CALLS[name](*plain), CALLS[name](*wrapped)
    assert not graphs
    assert expected
    assert [key.removeprefix("_orig_mod.") for key in found] == list(expected)
    for value, other in zip(found.values(), expected.values(), strict=True):
        assert torch.equal(value, other)


def test_scores_run_the_compiled_model(compiled):
    plain, wrapped, graphs = compiled
    assert fm.score(wrapped[0], DATA).loss == pytest.approx(fm.score(plain[0], DATA).loss, rel=1e-5)
    assert graphs


def test_passes_may_end_in_any_order():
    first, second = eagerly(), eagerly()
    graphs = []

    @torch.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    def double(x):
        return 2 * x

    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    double(X)
    assert not graphs
    second.__exit__(None, None, None)
    double(X)
    assert graphs
