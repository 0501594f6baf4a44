"""A model that passes inputs to its layers by name is read like one that passes them by position."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastmatch as fm
from fastmatch._internal.layer_calls import on_call, on_input
from fastmatch.studies.pruning import Reconstruction, input_norms


class Network(nn.Module):
    """Layers that are called by position, or with ``input=``."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.by_name = by_name

    def forward(self, x):
        call = (lambda layer, x: layer(input=x)) if self.by_name else (lambda layer, x: layer(x))
        x = call(self.norm, call(self.conv, x)).relu()
        return call(self.last, x.mean((2, 3)))


@pytest.fixture
def networks():
    """(a, b, data) twice: by position, and the same by name."""
    torch.manual_seed(0)
    plain = [Network(False).eval() for _ in range(2)]
    data = [torch.randn(16, 3, 6, 6) for _ in range(3)]
    named = copy.deepcopy(plain)
    for model in named:
        model.by_name = True
    return (*plain, data), (*named, data)


@pytest.mark.parametrize("mode", ["joint", "sequential"])
@pytest.mark.parametrize("method", ["reset", "repair", "least-squares"])
def test_renormalize(networks, method, mode):
    states = []
    for a, b, data in networks:
        merged = fm.renormalize(fm.merge([a, b]), [a, b], data, fm.Renormalization(method, mode))
        states.append(merged.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_statistics_of_layers_and_pruning(networks):
    plain, named = networks
    first, second = (fm.layer_table({"a": a}, data) for a, _, data in networks)
    assert str(first) == str(second)
    norms, others = input_norms(plain[0], plain[2]), input_norms(named[0], named[2])
    assert all(torch.equal(norm, others[name]) for name, norm in norms.items())
    one, two = (Reconstruction(data)(a, 0.5).state_dict() for a, _, data in networks)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


class Scaled(nn.Linear):
    """A layer whose input has another name, and that takes a second tensor."""

    def forward(self, hidden, scale=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(hidden) * (1 if scale is None else scale)


class Loose(nn.Linear):
    """A layer whose signature names nothing."""

    def forward(self, **given):  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(next(iter(given.values())))


X, SCALE = torch.randn(2, 3), torch.randn(2, 4)


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (nn.Linear, lambda layer: layer(X)),
        (nn.Linear, lambda layer: layer(input=X)),
        (Scaled, lambda layer: layer(X, SCALE)),
        (Scaled, lambda layer: layer(X, scale=SCALE)),
        (Scaled, lambda layer: layer(scale=SCALE, hidden=X)),
        (Loose, lambda layer: layer(hidden=X)),
        (Loose, lambda layer: layer(hidden=X, training=False)),
        (Loose, lambda layer: layer(hidden=X, input=X)),
    ],
)
def test_hooks_see_the_first_argument_by_whatever_name_it_is_passed(kind, call):
    layer, seen = kind(3, 4), []
    handles = [on_input(layer, seen.append), on_call(layer, lambda given, _: seen.append(given))]
    call(layer)
    for handle in handles:
        handle.remove()
    assert len(seen) == 2
    assert all(given is X for given in seen)


@pytest.mark.parametrize("given", [{"hidden": X, "scale": SCALE}, {"flag": True}])
def test_a_layer_whose_input_cannot_be_told_is_named(given):
    layer = Loose(3, 4)
    on_input(layer, lambda _: None)
    with pytest.raises(
        ValueError, match=f"a Loose is called with the names {', '.join(map(repr, given))}, of which none"
    ):
        layer(**given)
