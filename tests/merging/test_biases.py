"""The data-free forms: biases by powers of the weights, biases removed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastmatch as fm
from fastmatch._internal.coefficients import remembered_weights
from fastmatch.merging.biases import bias_depths
from helpers.networks import build, fresh_seed


def test_biases_take_the_power_of_their_depth_and_all_else_is_the_average():
    seed = fresh_seed()
    ends = [build("vgg", seed + k)[0] for k in range(2)]
    weights = [0.3, 0.7]
    with pytest.warns(
        UserWarning, match=r"is for networks without norms, .*; got \['features.1', 'features.5'\]"
    ):
        new = fm.merge(ends, weights, biases="normalize")
    merged = fm.merge(ends, weights).state_dict()
    depths = {"features.0.bias": 1, "features.4.bias": 2, "classifier.0.bias": 3, "classifier.3.bias": 4}
    for name, tensor in new.state_dict().items():
        h = depths.get(name)
        if h is None:
            assert torch.equal(tensor, merged[name]), name  # norms and running statistics too, nothing zeroed
        else:
            expected = sum(w**h * e.state_dict()[name] for w, e in zip(weights, ends, strict=True))
            torch.testing.assert_close(tensor, expected)


def test_a_network_merged_with_silence_keeps_its_argmax():
    """With b = 0, weights and biases scale so that the output is exactly alpha^L times the network's."""
    torch.manual_seed(fresh_seed())
    a = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 4)).double()
    silent = {name: torch.zeros_like(t) for name, t in a.state_dict().items()}
    mixed = fm.merge([dict(a.state_dict()), silent], [0.5, 0.5], biases="normalize")
    half = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 4)).double()
    half.load_state_dict(mixed)
    x = torch.randn(20, 6).double()
    torch.testing.assert_close(half(x), a(x) / 8)


def test_removal_zeroes_the_last_biases_only():
    model, _ = build("vgg", fresh_seed())
    new = fm.remove_biases(model, last=2).state_dict()
    for name, tensor in model.state_dict().items():
        if name in ("classifier.0.bias", "classifier.3.bias"):
            assert not new[name].any()
        else:
            assert torch.equal(new[name], tensor)
    every = fm.remove_biases(model.state_dict())
    assert sum(not t.any() for t in every.values() if t.is_floating_point()) == 4


def test_a_merge_without_biases_is_the_average_with_its_biases_removed():
    ends = [build("vgg", fresh_seed())[0] for _ in range(2)]
    found = fm.merge(ends, [0.25, 0.75], biases="remove")
    expected = fm.remove_biases(fm.merge(ends, [0.25, 0.75])).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    assert not found.classifier[3].bias.any()
    alone = fm.merge([ends[0].state_dict()], biases="remove")
    removed = fm.remove_biases(ends[0].state_dict())
    assert all(torch.equal(tensor, removed[name]) for name, tensor in alone.items())


@pytest.mark.parametrize("biases", ["average", "normalize", "remove"])
def test_every_merge_notes_its_weights_and_warns_when_they_scale(biases):
    ends = [build("vgg without norm", fresh_seed())[0] for _ in range(2)]
    assert remembered_weights(fm.merge(ends, [0.25, 0.75], biases=biases)) == (0.25, 0.75)
    with pytest.warns(UserWarning, match="weights sum to 1.5"):
        fm.merge(ends, [0.75, 0.75], biases=biases)


def test_bad_input():
    model, _ = build("mlp", 0)
    with pytest.raises(ValueError, match="last: expected 0 to 3"):
        fm.remove_biases(model, last=4)
    with pytest.raises(ValueError, match="weights: expected numbers of at least 0"):
        fm.merge([model, model], [1.5, -0.5], biases="normalize")
    with pytest.raises(ValueError, match="models: expected at least one"):
        fm.merge([], biases="normalize")
    with pytest.raises(
        ValueError, match="biases: expected one of 'average', 'normalize', 'remove'; got 'drop'"
    ):
        fm.merge([model], biases="drop")
    with pytest.raises(TypeError, match="expected a torch module or a state dict"):
        fm.remove_biases(3)


class Backwards(nn.Module):
    """Layers are run in another order than they are defined in, and one path is longer than the other."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.third = nn.Linear(6, 6)
        self.short = nn.Linear(6, 6)
        self.first = nn.Linear(6, 6)
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first(x))
        z = torch.relu(nn.functional.linear(y, self.weight, self.bias))
        return self.head(torch.relu(self.third(z)) + self.short(x))


def test_depth_is_that_of_the_graph_and_not_of_the_definition():
    model = Backwards()
    expected = {"first.bias": 1, "bias": 2, "third.bias": 3, "short.bias": 1, "head.bias": 4}
    assert bias_depths(model) == expected
    ends = [Backwards() for _ in range(2)]
    new = fm.merge(ends, [0.5, 0.5], biases="normalize").state_dict()
    for name, depth in expected.items():
        total = sum(end.state_dict()[name] for end in ends)
        torch.testing.assert_close(new[name], total * 0.5**depth)


WRAPS = {
    "mask": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "mask of the bias": lambda m: prune.l1_unstructured(m, "bias", 0.5),
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "weight_norm of a parametrization": parametrizations.weight_norm,
    "parametrization": parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("wrap", WRAPS)
def test_layers_that_compute_their_weight_or_bias_count_too(wrap):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    WRAPS[wrap](model[2])
    for given in (model, model.state_dict()):
        assert list(bias_depths(given).values()) == [1, 2, 3]
    without = fm.remove_biases(model)
    without(torch.randn(2, 4))  # computes the weights
    assert [bool(without[k].bias.any()) for k in (0, 2, 4)] == [False] * 3
    assert torch.equal(without[3].weight, model[3].weight)


def test_a_partial_merge_counts_layers_kept_apart_by_their_place_in_the_network():
    ends = [build("vgg without norm", fresh_seed())[0] for _ in range(2)]
    x = torch.randn(2, 3, 16, 16)
    found = fm.merge_partial(ends, x, fm.Identity(), start_at=1).model
    depths = bias_depths(found)
    plain = bias_depths(ends[0])
    assert sorted(plain.values()) == [1, 2, 3, 4]
    for name, depth in depths.items():
        assert depth == plain[name.split(".", 2 if name.startswith("apart") else 1)[-1]], name


def test_a_module_that_cannot_be_traced_and_a_state_dict_are_counted_in_order():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)) if x.sum() > 0 else self.second(x)

    model = Branching()
    assert bias_depths(model) == bias_depths(model.state_dict()) == {"first.bias": 1, "second.bias": 2}


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_normalized_biases_of_a_network_with_norms_are_warned_of(norm):
    model = nn.Sequential(nn.Linear(4, 4), norm(4), nn.ReLU(), nn.Linear(4, 2))
    for given in ([model, model], [model.state_dict()] * 2):
        with pytest.warns(UserWarning, match=r"without norms, .*; got \['1'\]"):
            fm.merge(given, biases="normalize")
