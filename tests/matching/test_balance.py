"""Balanced networks do not depend on the scales of units, and compute the same function."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmatch as fm
from fastmatch.checkpoint import align_checkpoints
from fastmatch.matching.balance import LARGEST_POWER, _depthwise, _scaled, _Sides
from fastmatch.spec.trace import trace
from fastmatch.studies.digits import digits, train_new
from fastmatch.studies.networks import mlp
from helpers.networks import build, fresh_seed


class Residual(nn.Module):
    """A residual network without norms: a stream, a block, a pooled head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.inner, self.back = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.leaky_relu(self.stem(x))
        x = F.relu(x + self.back(F.relu(self.inner(x))))
        return self.head(x.mean((2, 3)))


class Depthwise(nn.Module):
    """A convolution, a depthwise one and a 1 x 1 one; the first has one input channel, and so weights shaped as the second's."""

    def __init__(self, shortcut: bool) -> None:
        super().__init__()
        self.stem, self.back = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.inner = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.head, self.shortcut = nn.Linear(6, 4), shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.back(F.relu(self.inner(x))))
        return self.head((x + y if self.shortcut else y).mean((2, 3)))


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(fresh_seed())
    if name == "residual":
        return Residual().double(), torch.randn(3, 3, 8, 8).double()
    if name.startswith("depthwise"):
        return Depthwise("shortcut" in name).double(), torch.randn(3, 1, 8, 8).double()
    if name == "chain":
        return mlp(12, shape=(3, 2, 2)).double(), torch.randn(3, 3, 2, 2).double()
    model, x = build(name, fresh_seed())
    return model.double().eval(), x.double()


def rescaled(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """The same function, with every unit scaled at random."""
    found = trace(model, x)
    spec = fm.PermutationSpec(found.groups, found.shapes, found.pins, found.sites).flat()
    scales = []
    for name in spec.groups:
        sides = _Sides.of(spec, name, found.entries, _depthwise(model))
        scales.append((sides, torch.exp(torch.randn(sides.size).double())))
    new = copy.deepcopy(model)
    new.load_state_dict(_scaled(model.state_dict(), scales))
    torch.testing.assert_close(new(x), model(x))
    assert not torch.allclose(next(new.parameters()), next(model.parameters()))
    return new


@pytest.mark.parametrize(
    "name", ["chain", "vgg without norm", "residual", "depthwise", "depthwise, shortcut"]
)
def test_scales_of_units_are_forgotten_and_the_function_is_kept(name):
    model, x = network(name)
    found = fm.balance(model, x)
    assert found.left_alone == ()
    torch.testing.assert_close(found.model(x), model(x))
    again = fm.balance(rescaled(model, x), x)
    for key, tensor in found.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[key], tensor, rtol=1e-6, atol=1e-9)
    squares = [sum(float(p.detach().square().sum()) for p in m.parameters()) for m in (found.model, model)]
    assert squares[0] <= squares[1]


@pytest.mark.parametrize("name", ["chain", "vgg without norm", "residual"])
def test_matching_and_merging_of_balanced_networks_do_not_depend_on_scales(name):
    (a, x), (b, _) = network(name), network(name)
    merges, permutations = [], []
    for ends in ((a, b), (a, rescaled(b, x)), (rescaled(a, x), rescaled(b, x))):
        one, other = (fm.balance(model, x).model for model in ends)
        alignment = fm.align(one, other, x)
        permutations.append(alignment.permutations)
        merges.append(fm.merge([one, alignment.apply(other)])(x))
    for found, merged in zip(permutations[1:], merges[1:], strict=True):
        assert all(torch.equal(p, found[group]) for group, p in permutations[0].items())
        torch.testing.assert_close(merged, merges[0], rtol=1e-6, atol=1e-8)


def test_a_rescaled_network_of_digits_merges_as_the_original_does():
    train_data, test_data = digits()
    a, b = (train_new(lambda: mlp(128), train_data, epochs=12, seed=k, progress=False) for k in range(2))
    x = train_data.inputs[:2]
    torch.manual_seed(0)
    other = rescaled(b.double(), x.double()).float()
    a, b = a.float(), b.float()

    def midpoint(one: nn.Module, two: nn.Module) -> float:
        merged = fm.merge([one, fm.align(one, two, x).apply(two)])
        return fm.evaluate(merged, test_data, progress=False)[1]

    plain, broken = midpoint(a, b), midpoint(a, other)
    first, second = (midpoint(*(fm.balance(m, x).model for m in ends)) for ends in ((a, b), (a, other)))
    assert broken < plain - 0.1
    assert first == second
    assert second > broken + 0.1


@pytest.mark.parametrize(
    "activation", [nn.GELU, nn.Tanh, nn.ReLU6, nn.Hardtanh, nn.Sigmoid, nn.Softplus, nn.ELU]
)
def test_units_before_other_activations_are_left_alone(activation):
    torch.manual_seed(fresh_seed())
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), activation(), nn.Linear(6, 3))
    x = torch.randn(4, 5)
    found = fm.balance(model, x)
    assert found.left_alone == ("2",)
    assert list(found.scales) == ["0"]
    assert "left alone: 2" in repr(found)
    torch.testing.assert_close(found.model(x), model(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.model[4].weight, model[4].weight)


class Clipped(nn.Module):
    """Operations that are linear in parts, in a form that a trace knows no activation of."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        bent = {
            "clamp": lambda: y.clamp(0, 3), "where": lambda: torch.where(y > 0.5, y, 0 * y),
            "minimum": lambda: torch.minimum(y, torch.ones(6).to(y)), "hardshrink": lambda: F.hardshrink(y),
            "product": lambda: y * y, "softmax": lambda: y.softmax(-1),
        }  # fmt: skip
        return self.b(bent[self.how]())


@pytest.mark.parametrize("how", ["clamp", "where", "minimum", "hardshrink", "product", "softmax"])
def test_units_before_operations_that_are_linear_in_parts_are_left_alone(how):
    torch.manual_seed(fresh_seed())
    model, x = Clipped(how), torch.randn(4, 5)
    found = fm.balance(model, x)
    assert found.scales == {}
    assert all(torch.equal(t, found.model.state_dict()[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("name", ["vgg", "resnet with layer norm"])
def test_units_of_norms_are_left_alone_and_the_function_is_kept(name):
    model, x = network(name)
    found = fm.balance(model, x)
    assert found.left_alone
    torch.testing.assert_close(found.model(x), model(x))


def test_dead_units_keep_their_weights_and_half_precision_its_type():
    torch.manual_seed(fresh_seed())
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0, 0
        model[2].weight[:, 4] = 0
    found = fm.balance(model, torch.randn(4, 5))
    assert found.scales["0"][[2, 4]].tolist() == [1, 1]
    for key, tensor in found.model.state_dict().items():
        assert bool(tensor.isfinite().all()), key
    half = fm.balance(model.bfloat16(), torch.randn(4, 5).bfloat16()).model
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    assert LARGEST_POWER > 10


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="model: expected a torch module"):
        fm.balance({}, torch.randn(2, 5))
    model = nn.Linear(5, 2)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model.*weight"):
        fm.balance(model, torch.randn(2, 5))


@pytest.mark.parametrize("name", ["chain", "residual"])
def test_matching_of_balanced_copies_does_not_depend_on_the_scales_of_units(name):
    (a, x), (b, _) = network(name), network(name)
    matcher = fm.WeightMatching(balance=True)
    found, other = (fm.align(a, model, x, matcher) for model in (b, rescaled(b, x)))
    assert found.permutations.keys() == other.permutations.keys()
    for group, permutation in found.permutations.items():
        assert torch.equal(permutation, other.permutations[group])
    expected = fm.align(fm.balance(a, x).model, fm.balance(b, x).model, x)
    assert all(torch.equal(p, expected.permutations[g]) for g, p in found.permutations.items())
    torch.testing.assert_close(found.apply(b)(x), b(x))  # the networks themselves are not scaled
    assert torch.equal(
        found.apply(b).state_dict()[_last(b)].sort().values, b.state_dict()[_last(b)].sort().values
    )


def _last(model: nn.Module) -> str:
    return list(model.state_dict())[-1]


def test_balance_is_refused_where_it_cannot_be_proved():
    a, x = network("chain")
    matcher = fm.WeightMatching(balance=True)
    spec = fm.PermutationSpec.trace(a, x)
    with pytest.raises(ValueError, match="balance: needs two modules and example inputs"):
        fm.align(a, a, None, matcher, spec=spec)
    with pytest.raises(ValueError, match="balance: needs modules and example inputs"):
        fm.align_many([a, a], x, fm.ToReference(matcher))
    data = [(x, torch.zeros(len(x), dtype=torch.long))]
    for make in (
        lambda: fm.Mixture(matcher, fm.ActivationMatching(data)),
        lambda: fm.FisherMatching(data, ascent=matcher),
        lambda: fm.StraightThrough(data, projection=matcher),
        lambda: fm.MergeMany(fm.WeightMatching(init="identity", balance=True)),
        lambda: align_checkpoints(__file__, __file__, "out", matcher),
    ):  # before any work
        with pytest.raises(ValueError, match="balance: needs modules and example inputs"):
            make()
    with pytest.raises(TypeError, match="balance: expected a bool"):
        fm.WeightMatching(balance=1)  # type: ignore[arg-type]
