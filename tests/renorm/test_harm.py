"""No gain takes a channel farther from its target than the layer's worst channel was, or much farther than itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastmatch as fm
from fastmatch.renorm.fold import fold
from fastmatch.renorm.targets import Target
from fastmatch.statistics.moments import ChannelMoments
from fastmatch.studies.digits import Batches
from helpers.networks import fresh_seed


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 36, 4),
    )  # fmt: skip


def worst(model: nn.Module, statistics: fm.EndpointStatistics, data: Batches) -> dict[str, float]:
    """The largest distance of a channel from its target, by layer."""
    found = fm.endpoint_statistics([model], data).models[0]
    distances = {}
    for name, (mean, std) in statistics.targets([1.0]).items():
        moments = found[name]
        distance = (moments.mean - mean).square() + (moments.variance.sqrt() - std).square()
        distances[name] = float(distance.max())
    return distances


@pytest.mark.parametrize("mode", ["joint", "sequential"])
@pytest.mark.parametrize("method", ["repair", "rescale", "reshift"])
def test_channels_without_weights_keep_gain_one_and_are_listed(method, mode):
    torch.manual_seed(fresh_seed())
    dense = chain()
    with torch.no_grad():
        dense[0].bias.add_(1.0)
    pruned = copy.deepcopy(dense)
    with torch.no_grad():
        pruned[0].weight[[1, 4]] = 0
    data = Batches(torch.randn(64, 1, 6, 6), torch.zeros(64), 64)
    new = fm.renormalize(pruned, [dense], data, fm.Renormalization(method, mode), weights=[1.0])
    plan = fm.applied_plan(new)
    assert plan is not None
    if method == "reshift":
        assert plan.kept == {}
    else:
        assert plan.kept["0"] == (1, 4)
        assert "gain one in 0: 2 channels (1, 4)" in str(plan)
    statistics = fm.endpoint_statistics([dense], data)
    assert worst(new, statistics, data)["0"] <= worst(pruned, statistics, data)["0"] * (1 + 1e-5)
    if method == "rescale":
        torch.testing.assert_close(new[0].bias[[1, 4]], pruned[0].bias[[1, 4]])
    else:
        mean = statistics.targets([1.0])["0"].mean.float()
        torch.testing.assert_close(new[0].bias[[1, 4]], mean[[1, 4]], rtol=1e-4, atol=1e-5)


def test_a_channel_that_sees_only_dead_inputs_is_not_amplified():
    torch.manual_seed(fresh_seed())
    dense = chain()
    pruned = copy.deepcopy(dense)
    with torch.no_grad():
        pruned[0].bias[2] = -100.0  # never active on the data
        pruned[2].weight[3] = 0
        pruned[2].weight[3, 2] = dense[2].weight[3, 2]
    data = Batches(torch.randn(64, 1, 6, 6), torch.zeros(64), 64)
    for method in ("repair", "rescale"):
        layers = fm.Renormalization(method, layers=["2"])
        new = fm.renormalize(pruned, [dense], data, layers, weights=[1.0])
        torch.testing.assert_close(new[2].weight[3], pruned[2].weight[3])


def test_a_large_gain_of_a_mean_that_it_does_not_set_is_not_applied():
    layer = nn.Linear(3, 3)
    mean = torch.tensor([0.1, -2.0, 0.01]).double()
    moments = ChannelMoments(100, mean, torch.tensor([0.5, 1e-3, 1e-3]).double() * 100)
    target = Target(mean, torch.ones(3).double())
    before = layer.weight.detach().clone()
    assert fold(layer, moments, target, "rescale").tolist() == [False, True, False]
    torch.testing.assert_close(layer.weight[1], before[1])
    assert (layer.weight[2] / before[2]).mean() > 29  # a mean near zero suffers little from the same gain
    assert fold(nn.Linear(3, 3), moments, target, "repair").tolist() == [False] * 3  # which sets the mean


@pytest.mark.parametrize("offset", [0.0, 5.0, 500.0])
@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_one_channel_that_is_far_off_does_not_let_the_others_go_as_far(offset, mode):
    torch.manual_seed(fresh_seed())
    dense = nn.Sequential(nn.Linear(4, 6))
    merged = copy.deepcopy(dense)
    with torch.no_grad():
        merged[0].weight[0] *= 1e-3  # almost constant, around one
        merged[0].bias[0] = 1.0
        merged[0].bias[5] += offset
    data = Batches(torch.randn(512, 4), torch.zeros(512), 512)
    options = fm.Renormalization("rescale", mode)
    new = fm.renormalize(merged, [dense], data, options, weights=[1.0])
    plan = fm.applied_plan(new)
    assert plan is not None
    assert plan.kept == {"0": (0,)}
    torch.testing.assert_close(new[0].bias[0], merged[0].bias[0])


def test_rescale_of_a_heavily_pruned_network_does_not_explode():
    torch.manual_seed(fresh_seed())
    dense = nn.Sequential(*[m for _ in range(8) for m in (nn.Linear(32, 32), nn.ReLU())], nn.Linear(32, 5))
    with torch.no_grad():
        for layer in dense[::2]:
            nn.init.kaiming_normal_(layer.weight)
            layer.bias.normal_(std=0.5)
    pruned = copy.deepcopy(dense)
    with torch.no_grad():
        for layer in pruned[::2]:
            layer.weight.mul_(layer.weight.abs() > layer.weight.abs().flatten().quantile(0.97))
    data = Batches(torch.randn(256, 32), torch.zeros(256), 256)
    new = fm.renormalize(pruned, [dense], data, "rescale", weights=[1.0])
    plan = fm.applied_plan(new)
    assert plan is not None
    assert sum(map(len, plan.kept.values())) > 10
    outputs = [model(data.inputs).detach() for model in (dense, pruned, new)]
    assert outputs[2].abs().max() < 10 * max(o.abs().max() for o in outputs[:2])
