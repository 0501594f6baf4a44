"""Data that a model does not take, and arguments in each other's place: errors name the argument and say what to do."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fastmatch as fm
from fastmatch._internal.ranks import RanksError


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return network(), network()


X, CLASSES = torch.randn(32, 6), torch.randint(4, (32,))
IMAGES = [(torch.randn(8, 3, 4, 4), CLASSES[:8])]


@pytest.mark.parametrize("call", [
    lambda a, b: fm.align(a, b, X, fm.ActivationMatching(IMAGES)),
    lambda a, b: fm.renormalize(fm.merge([a, b]), [a, b], IMAGES, "repair"),
    lambda a, b: fm.evaluate(a, IMAGES),
    lambda a, b: fm.interpolate(a, b, IMAGES, points=3),
])  # fmt: skip
def test_batches_of_another_shape_are_the_data_s_fault(pair, call):
    with pytest.raises(
        ValueError, match=r"data: Sequential does not run on a batch \(\(8, 3, 4, 4\) float32\)"
    ):
        call(*pair)


@pytest.mark.parametrize(("data", "error", "message"), [
    ([(X, CLASSES, CLASSES)], ValueError, r"expected inputs or \(inputs, targets\), or forward="),
    ([(X.numpy(), CLASSES.numpy())], ValueError, r"does not run on a batch \(ndarray\)"),
    ([X.double()], ValueError, r"does not run on a batch \(\(\d+, 6\) float64\)"),
    ([], ValueError, "yielded no batch"),
    (X, TypeError, "expected batches, got one tensor"),
    (torch.utils.data.TensorDataset(X, CLASSES), TypeError, "expected a loader or any iterable of batches"),
])  # fmt: skip
@pytest.mark.parametrize("call", [
    lambda a, b, data: fm.align(a, b, X, fm.ActivationMatching(data)),
    lambda a, b, data: fm.renormalize(fm.merge([a, b]), [a, b], data, "repair"),
    lambda a, b, data: fm.layer_table({"a": a, "b": b}, data),
])  # fmt: skip
def test_what_is_no_loader_of_a_models_inputs_is_told(pair, call, data, error, message):
    with pytest.raises(error, match=message):
        call(*pair, data)


@pytest.mark.parametrize("error", [
    RanksError("rank 1 does not answer"),
    torch.distributed.DistBackendError("NCCL communicator was aborted"),
    RuntimeError("[/torch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
])  # fmt: skip
def test_errors_of_other_ranks_are_not_the_data_s_fault(error):
    class Failing(nn.Linear):
        def forward(self, input):
            raise error

    with pytest.raises(type(error)) as caught:
        fm.score(Failing(6, 4), [(X, CLASSES)])
    assert caught.value is error


def test_inputs_that_are_not_finite_are_named(pair):
    with pytest.raises(ValueError, match=r"data: batch 1 .* has inputs that are NaN"):
        fm.evaluate(pair[0], [(X, CLASSES), (X * torch.nan, CLASSES)])
    broken = network()
    nn.init.constant_(broken[0].weight, torch.inf)
    loss, _ = fm.evaluate(broken, [(X, CLASSES)])
    assert not np.isfinite(loss), "the loss of a network that has diverged is what it is"


def test_targets_that_do_not_fit_are_the_data_s_fault(pair):
    with pytest.raises(
        ValueError, match=r"data: targets are classes from 0 to 5[0-9], and the model has 4 outputs"
    ):
        fm.evaluate(pair[0], [(X, torch.arange(32) * 58 // 31)])
    with pytest.raises(ValueError, match="data: a batch has 32 samples and 31 targets"):
        fm.evaluate(pair[0], [(X, CLASSES[:31])])
    ignored = CLASSES.clone()
    ignored[:3] = -100
    assert np.isfinite(fm.evaluate(pair[0], [(X, ignored)])[0])


@pytest.mark.parametrize("loader", [
    [(X, CLASSES)] * 2, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, CLASSES), 8),
])  # fmt: skip
def test_a_loader_in_the_place_of_inputs_is_told(pair, loader):
    with pytest.raises(
        TypeError, match=r"example_inputs: expected the inputs of one batch.*ActivationMatching"
    ):
        fm.align(*pair, loader)


def test_tensors_and_their_lengths_are_inputs_though_they_look_like_batches():
    class Towers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(3, 8), torch.nn.Linear(8, 2)

        def forward(self, *pairs: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
            return [self.second(self.first(x).relu()) / lengths[:, None] for x, lengths in pairs]

    pairs = [(torch.randn(4, 3), torch.tensor([1, 2, 2, 3])), (torch.randn(2, 3), torch.tensor([1, 3]))]
    assert list(fm.align(Towers(), Towers(), pairs).permutations) == ["first"]


def test_an_array_in_the_place_of_a_tensor_is_told(pair):
    with pytest.raises(ValueError, match=r"got no tensor but ndarray; torch\.from_numpy"):
        fm.align(*pair, X.numpy())


def test_one_model_in_the_place_of_endpoints_is_told(pair):
    with pytest.raises(
        TypeError, match=r"endpoints: expected a list of models, got one Sequential; give \[model\]"
    ):
        fm.renormalize(*pair, [(X, CLASSES)], "repair")


def test_values_of_other_types_are_told(pair):
    alignment = fm.align(*pair, X)
    with pytest.raises(TypeError, match="then: expected an Alignment, got int"):
        alignment.compose(3)
    with pytest.raises(TypeError, match="models: expected a mapping"):
        fm.layer_table(list(pair), [(X, CLASSES)])


def test_a_warning_points_at_the_caller_and_names_the_parameter():
    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.place = network(), nn.Parameter(torch.zeros(6))

        def forward(self, x):
            return self.inner(x + self.place)

    models = [Placed(), Placed()]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fm.renormalize(fm.merge(models), models, [(X, CLASSES)], "repair")
        fm.renormalize_many([fm.merge(models)], models, [(X, CLASSES)], "repair")
    told = [w for w in seen if "leaves these alone" in str(w.message)]
    assert [w.filename for w in told] == [__file__] * 2
    assert "place: is a parameter of Placed" in str(told[0].message)
