"""Traces without values: the same spec as with them, nothing computed, and the model left as it was."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import fastmatch as fm
from fastmatch.spec import uncomputed
from fastmatch.spec.record import ValuesNeeded
from helpers.networks import NETWORKS, build, fresh_seed

module = sys.modules["fastmatch.spec.trace"]  # the package exports a function of its name


@pytest.fixture
def passes(monkeypatch):
    """Whether each pass that ended computed values; ValuesNeeded where one ended for lack of them."""
    monkeypatch.setattr(uncomputed, "LEAST", 0)
    found, real = [], module._trace

    def spy(*args, computes=True, **kwargs):
        try:
            result = real(*args, computes=computes, **kwargs)
        except ValuesNeeded:
            found.append(ValuesNeeded)
            raise
        found.append(computes)
        return result

    monkeypatch.setattr(module, "_trace", spy)
    return found


def both(model, x, monkeypatch):
    """The specs without values and with them."""
    without = fm.PermutationSpec.trace(model, x)
    monkeypatch.setattr(uncomputed, "LEAST", 1 << 60)
    return without, fm.PermutationSpec.trace(model, x)


def assert_equal(one, other):
    assert list(one.groups.items()) == list(other.groups.items())
    assert (one.pins, one.sites, one.shapes) == (other.pins, other.sites, other.shapes)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_spec_is_that_of_a_pass_with_values(name, passes, monkeypatch):
    model, x = build(name, fresh_seed())
    assert_equal(*both(model, x, monkeypatch))
    assert passes == [False, True]


class Branching(nn.Module):
    """Takes another way for large activations."""

    def __init__(self, read) -> None:
        super().__init__()
        self.read = read
        self.first, self.second, self.third = nn.Linear(4, 9), nn.Linear(9, 9), nn.Linear(9, 3)

    def forward(self, x):
        hidden = self.first(x)
        try:
            is_large = self.read(hidden)
        except Exception:
            is_large = True
        return self.third(torch.relu(self.second(hidden) if is_large else hidden))


READS = {
    "a number": lambda h: float(h.detach().abs().max()) < 1e9,
    "a comparison": lambda h: bool((h < 1e9).all()),
    "numpy": lambda h: h.detach().numpy().max() < 1e9,
    "a list": lambda h: max(h.flatten().tolist()) < 1e9,
    "a shape": lambda h: len(torch.nonzero(h < 1e9)) > 0,
    "equality": lambda h: not torch.equal(h, h + 1),
    "the order": lambda h: h.sort(dim=1).indices.shape[1] > 0,
}


@pytest.mark.parametrize("how", READS)
def test_a_model_that_reads_its_activations_is_traced_with_values(how, passes, monkeypatch):
    torch.manual_seed(fresh_seed())
    model = Branching(READS[how])
    assert_equal(*both(model, torch.randn(2, 4), monkeypatch))
    assert passes == [ValuesNeeded, True, True]


class Remembering(nn.Module):
    """Keeps what it computes from a parameter, and counts in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.kept, self.seen = nn.Parameter(torch.randn(6, 8)), {}, []
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.ones(8))

    def forward(self, x):
        if "bias" not in self.kept:
            self.kept["bias"] = self.table.sum(0)
        hidden = torch.relu(self.first(x) + self.kept["bias"])
        self.mean.mul_(0.9).add_(hidden.mean(0))
        self.seen.append(hidden)
        return self.second(hidden)


def test_what_a_model_keeps_of_the_pass_is_thrown_away(passes):
    torch.manual_seed(fresh_seed())
    model, x = Remembering(), torch.randn(2, 4)
    expected = fm.PermutationSpec.trace(model, x)
    assert passes == [False]
    assert expected.groups
    assert not model.kept
    assert not model.seen
    assert torch.equal(model.mean, torch.ones(8))
    assert torch.allclose(model(x), model.second(torch.relu(model.first(x) + model.table.sum(0))))


def test_a_hook_before_a_module_is_given_real_activations(passes):
    model, seen = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), []
    model[2].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    x = torch.randn(2, 4)
    fm.PermutationSpec.trace(model, x)
    assert torch.equal(seen[-1], model[1](model[0](x)))
    assert passes == [True]


def test_a_hook_is_given_real_activations(passes):
    torch.manual_seed(fresh_seed())
    model, x, seen = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.randn(2, 4), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    fm.PermutationSpec.trace(model, x)
    assert passes == [True]
    assert torch.equal(seen[0], nn.functional.linear(x, model[0].weight, model[0].bias))


def test_an_error_is_that_of_a_pass_with_values(passes):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(9, 3))
    with pytest.raises(ValueError, match="the model does not run on them"):
        fm.PermutationSpec.trace(model, torch.randn(2, 4))


class Reusing(nn.Module):
    """Adds a tensor to itself and to another, in place and into a third."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        a, b = self.first(x), self.first(x + 1)
        a.add_(a)
        b.add_(a)
        into = torch.empty_like(a)
        torch.add(a, b, out=a)
        torch.add(a, b, out=into)
        return self.second(into)


def test_operations_that_write_to_their_operands(passes, monkeypatch):
    torch.manual_seed(fresh_seed())
    assert_equal(*both(Reusing(), torch.randn(2, 4), monkeypatch))
    assert passes == [False, True]


def test_a_large_network_is_traced_without_its_products():
    """They would take a minute, and the activations 6 GB."""
    width = 1024
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    x = torch.zeros(1).expand(1 << 19, width)
    spec = fm.PermutationSpec.trace(model, x)
    assert [group.size for group in spec.groups.values()] == [width]
