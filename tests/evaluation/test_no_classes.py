"""Networks without classes: cross entropy is refused where it would be taken without a word."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmatch as fm
from fastmatch.statistics.fisher import diagonal_fisher
from helpers.networks import fresh_seed


def network(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, outputs))


@pytest.fixture(params=[1, 3], ids=["one output", "three values"])
def regression(request):
    """Two networks, data with values as targets, and what an error says."""
    torch.manual_seed(fresh_seed())
    a, b = network(request.param), network(request.param)
    data = [(torch.randn(8, 5), torch.randn(8, request.param)) for _ in range(2)]
    return a, b, data, "has one output" if request.param == 1 else "are no probabilities of classes"


def test_the_default_loss_is_refused_and_another_one_is_taken(regression):
    a, b, data, message = regression
    with pytest.raises(ValueError, match=f"loss: needed, because cross entropy is for classes.*{message}"):
        fm.evaluate(a, data)
    with pytest.raises(ValueError, match=message):
        fm.interpolate(a, b, data, points=3)
    with torch.no_grad():
        expected = sum(float(F.mse_loss(a(x), y)) for x, y in data) / len(data)
    assert fm.evaluate(a, data, loss=F.mse_loss)[0] == pytest.approx(expected)


@pytest.mark.parametrize("labels", ["data", "sampled"])
def test_fisher_information_is_refused(regression, labels):
    a, b, data, message = regression
    if labels == "sampled":
        data = [(x, torch.zeros(len(x), dtype=torch.long)) for x, _ in data]
        message = "has one output"
    if labels == "sampled" and a[2].out_features > 1:  # classes are drawn
        assert fm.align(a, b, data[0][0], fm.FisherMatching(data, labels=labels)).matching is not None
        return
    message = "(has one output|are no probabilities of classes)"
    with pytest.raises(ValueError, match=f"data: expected classes of a classifier.*{message}"):
        fm.align(a, b, data[0][0], fm.FisherMatching(data, labels=labels))


def test_straight_through_takes_a_loss_of_values(regression):
    a, b, data, message = regression
    with pytest.raises(ValueError, match=rf"give StraightThrough\(data, loss=...\).*{message}"):
        fm.align(a, b, data[0][0], fm.StraightThrough(data, epochs=1))
    found = fm.align(a, b, data[0][0], fm.StraightThrough(data, epochs=1, loss=F.mse_loss))
    assert found.matching.objective[-1] < 0


def test_probabilities_of_classes_are_classes():
    torch.manual_seed(fresh_seed())
    a = network(3)
    x, y = torch.randn(8, 5), torch.randn(8, 3).softmax(1)
    with torch.no_grad():
        expected = float(F.cross_entropy(a(x), y))
    assert fm.evaluate(a, [(x, y)])[0] == pytest.approx(expected)
    assert fm.evaluate(a.half(), [(x.half(), y.half())])[0] > 0


def test_a_sample_that_is_not_finite_is_named_by_its_batch():
    torch.manual_seed(fresh_seed())
    a, b = network(3), network(3)
    data = [(torch.randn(4, 5), torch.tensor([0, 1, 2, 0])) for _ in range(3)]
    data[1][0][2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"data: the gradient of '.*' on batch 1 \(counted from 0\)"):
        diagonal_fisher(a, data)
    with pytest.raises(ValueError, match=r"data: the model's outputs on batch 1 \(counted from 0\)"):
        diagonal_fisher(a, data, labels="sampled")
    with pytest.raises(ValueError, match=r"data: the midpoint's loss on batch 1 \(counted from 0\) is nan"):
        fm.align(a, b, data[0][0], fm.StraightThrough(data, epochs=1))
