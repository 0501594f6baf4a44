"""Pruners by second-order information, against dense float64 computations with explicit inverses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from fastmatch.studies.digits import Batches
from fastmatch.studies.pruning import accuracy_by_sparsity, layer_magnitude, mask_of, sparsity
from fastmatch.studies.second_order import (
    SparseGPT,
    WoodFisher,
    damped,
    surgeon,
    woodbury_saliency,
    woodbury_update,
)
from helpers.networks import fresh_seed


def correlated(count: int, features: int, seed: int | None = None) -> torch.Tensor:
    """Inputs that tell much about each other; of this draw, or of a new one."""
    torch.manual_seed(fresh_seed() if seed is None else seed)
    few = torch.randn(count, 3).double() @ torch.randn(3, features).double()
    return few + 0.3 * torch.randn(count, features).double() + 0.5


def by_explicit_inverses(
    weights: torch.Tensor, hessians: torch.Tensor, amount: float, block: int
) -> torch.Tensor:
    """Prune the groups (groups, outputs, features) together, block after block."""
    weights, (groups, outputs, features) = weights.clone(), weights.shape
    gone = 0
    for start in range(0, features, block):
        columns = range(start, min(start + block, features))
        inverses = {(g, j): torch.linalg.inv(hessians[g, j:, j:]) for g in range(groups) for j in columns}
        places = [(g, i, j) for g in range(groups) for i in range(outputs) for j in columns]
        saliency = {(g, i, j): float(weights[g, i, j] ** 2 / inverses[g, j][0, 0]) for g, i, j in places}
        count = round(amount * groups * outputs * columns.stop) - gone
        gone += count
        goes = set(sorted(places, key=saliency.__getitem__)[:count])
        for j in columns:
            for g, i, _ in (place for place in goes if place[2] == j):
                weights[g, i, j:] -= weights[g, i, j] / inverses[g, j][0, 0] * inverses[g, j][0]
    return weights


@pytest.mark.parametrize("block", [1, 3, 8, 100])
@pytest.mark.parametrize("amount", [0.0, 0.4, 0.75, 1.0])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_surgeon_equals_explicit_inverses(block, amount, groups):
    hessian = damped(torch.stack([x.T @ x / 50 for x in (correlated(50, 8) for _ in range(groups))]), 0.01)
    weight = torch.randn(groups, 5, 8).double()
    found = surgeon(weight, hessian, amount, block)
    expected = by_explicit_inverses(weight, hessian, amount, block)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert bool(((found == 0) == (expected.abs() < 1e-12)).all())


def test_one_weight_in_the_last_row_is_removed_at_the_least_cost():
    x = correlated(60, 6)
    hessian, weight = x.T @ x / 60, torch.randn(1, 6).double()
    weight[0, 0] = 1e-3  # the first column goes, all others may make up for it
    found = surgeon(weight[None], hessian[None], 1 / 6, 6)[0]
    best = torch.linalg.lstsq(x[:, 1:], x @ weight[0]).solution
    assert found[0, 0] == 0
    torch.testing.assert_close(found[0, 1:], best)


def test_channels_of_a_depthwise_convolution_are_not_all_pruned_away_by_rounding():
    torch.manual_seed(fresh_seed())
    net = nn.Sequential(nn.Conv2d(12, 12, 3, groups=12), nn.Flatten(), nn.Linear(48, 3)).double()
    data = Batches(torch.randn(40, 12, 4, 4).double(), torch.zeros(40), 16)
    for block in (1, 4, 128):
        pruned = SparseGPT(data, block=block)(net, 0.95)
        zeros = int((pruned[0].weight == 0).sum())
        assert zeros == round(0.95 * 108), "a channel has nine weights, and 0.95 of nine is rounded to nine"


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, stride=2, groups=2)
        self.last = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(x).relu()).relu().flatten(1))


def test_layers_are_pruned_in_order_with_the_inputs_that_pruned_layers_give():
    torch.manual_seed(fresh_seed())
    dense, x = Convolutional().double(), torch.randn(30, 2, 6, 6).double()
    data = Batches(x, torch.zeros(30), 8)
    pruned = SparseGPT(data, damping=0.02, block=5)(dense, 0.5)
    assert data.reads == 1

    def parts(inputs: torch.Tensor, layer: nn.Conv2d) -> list[torch.Tensor]:
        rows = F.unfold(inputs, 3, padding=layer.padding, stride=layer.stride).movedim(1, 2)
        return list(rows.reshape(-1, rows.shape[2]).chunk(layer.groups, dim=1))

    def expected(weight: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        hessians = damped(torch.stack([rows.T @ rows / len(rows) for rows in parts]), 0.02)
        groups = weight.flatten(1).reshape(len(parts), -1, hessians.shape[-1])
        return by_explicit_inverses(groups, hessians, 0.5, 5).reshape(len(weight), -1)

    with torch.no_grad():
        after_first = pruned.first(x).relu()
        after_second = pruned.second(after_first).relu().flatten(1)
        found = expected(dense.first.weight, parts(x, dense.first)[0])
        torch.testing.assert_close(pruned.first.weight.flatten(1), found, rtol=1e-6, atol=1e-9)
        found = expected(dense.second.weight, *parts(after_first, dense.second))
        torch.testing.assert_close(pruned.second.weight.flatten(1), found, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(
            pruned.last.weight, expected(dense.last.weight, after_second), rtol=1e-6, atol=1e-9
        )
        for name in ("first", "second", "last"):
            assert torch.equal(pruned.get_submodule(name).bias, dense.get_submodule(name).bias)


def test_a_group_without_input_takes_no_weights_from_the_others():
    torch.manual_seed(fresh_seed())
    net = nn.Conv2d(8, 8, 3, groups=8).double()
    x = 0.01 * torch.randn(64, 8, 6, 6).double()
    x[:, 0] = 0  # a channel that died
    pruned = SparseGPT(Batches(x, torch.zeros(64), 32))(net, 0.5)
    kept = (pruned.weight != 0).flatten(1).sum(1)
    assert int(kept[0]) == 0
    assert int(kept.sum()) == 36


def small() -> tuple[nn.Module, Batches]:
    torch.manual_seed(fresh_seed())
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x = torch.randn(40, 5).double()
    return net, Batches(x, net(x).argmax(1), 16)


def dense_fisher(net: nn.Module, data: Batches, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The damped Fisher information of the first layer's weight, and the gradients."""
    rows = []
    for x, y in zip(data.inputs, data.targets, strict=True):
        net.zero_grad()
        F.cross_entropy(net(x[None]), y[None]).backward()
        rows.append(net[0].weight.grad.flatten().clone())
    net.zero_grad()
    gradients = torch.stack(rows)
    fisher = damping * torch.eye(gradients.shape[1]).double() + gradients.T @ gradients / len(gradients)
    return fisher, gradients


def test_woodbury_gives_what_the_dense_inverse_gives():
    net, data = small()
    fisher, gradients = dense_fisher(net, data, 1e-3)
    weight = net[0].weight.detach().flatten()
    inverse = torch.linalg.inv(fisher)
    saliency = woodbury_saliency(weight, gradients, 1e-3)
    torch.testing.assert_close(saliency, weight**2 / (2 * inverse.diagonal()), rtol=1e-8, atol=0)
    keep = mask_of(saliency, 0.6)
    found = woodbury_update(weight, gradients, keep, 1e-3)
    change = torch.linalg.solve(fisher[keep][:, keep], fisher[keep][:, ~keep] @ weight[~keep])
    torch.testing.assert_close(found[keep], weight[keep] + change, rtol=1e-8, atol=1e-12)
    assert bool((found[~keep] == 0).all())


def test_one_removal_is_the_published_update():
    net, data = small()
    fisher, gradients = dense_fisher(net, data, 1e-3)
    weight, inverse = net[0].weight.detach().flatten(), torch.linalg.inv(fisher)
    for q in (0, 11, 34):
        keep = torch.arange(35) != q
        found = woodbury_update(weight, gradients, keep, 1e-3)
        torch.testing.assert_close(
            found, weight - weight[q] * inverse[q] / inverse[q, q], rtol=1e-8, atol=1e-12
        )
        rise = 0.5 * (found - weight) @ fisher @ (found - weight)
        torch.testing.assert_close(rise, woodbury_saliency(weight, gradients, 1e-3)[q], rtol=1e-8, atol=0)


@pytest.mark.parametrize("by_layer", [False, True])
def test_woodfisher_prunes_all_layers_by_their_saliency(by_layer):
    net, data = small()
    pruned = WoodFisher(data, samples=None, damping=1e-3, by_layer=by_layer)(net, 0.5)
    assert data.reads == 1
    zeros = [int((layer.weight == 0).sum()) for layer in (pruned[0], pruned[2])]
    assert sum(zeros) == 28
    if by_layer:
        assert zeros == [18, 10]
    _, gradients = dense_fisher(net, data, 1e-3)
    weight, keep = net[0].weight.detach().flatten(), pruned[0].weight.detach().flatten() != 0
    torch.testing.assert_close(
        pruned[0].weight.detach().flatten(),
        woodbury_update(weight, gradients, keep, 1e-3),
        rtol=1e-6,
        atol=1e-9,
    )
    saliency = woodbury_saliency(weight, gradients, 1e-3)
    assert saliency[keep].min() >= saliency[~keep].max()


def test_pruners_of_second_order_sweep_sparsities_and_keep_outputs_better_than_magnitude():
    by_magnitude = by_sparse_gpt = 0.0
    for seed in range(8):  # how much better it is depends on the draw
        x = correlated(200, 12, seed).float()
        dense = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 4))
        data = Batches(x, dense(x).argmax(1), 100)
        with torch.no_grad():
            by_magnitude += float((layer_magnitude(dense, 0.6)(x) - dense(x)).square().mean())
            by_sparse_gpt += float((SparseGPT(data)(dense, 0.6)(x) - dense(x)).square().mean())
    assert by_sparse_gpt < 0.5 * by_magnitude
    for pruner in (SparseGPT(data), WoodFisher(data)):
        table = accuracy_by_sparsity(dense, data, data, sparsities=[0.0, 0.6], pruner=pruner, method="repair")
        assert table.rows[0]["accuracy"] == 1.0
        assert sparsity(pruner(dense, 0.6)) == pytest.approx(0.6, abs=0.02)


def test_options_out_of_range_and_weights_that_are_computed_are_named():
    net, data = small()
    with pytest.raises(ValueError, match="damping"):
        SparseGPT(data, damping=0.0)
    with pytest.raises(ValueError, match="block"):
        SparseGPT(data, block=0)
    with pytest.raises(ValueError, match="damping"):
        WoodFisher(data, damping=-1.0)
    with pytest.raises(ValueError, match="amount: expected 0 to 1"):
        SparseGPT(data)(net, 1.5)
    prune.l1_unstructured(net[0], "weight", amount=0.5)
    with pytest.raises(ValueError, match=r"'0\.weight' is computed from another tensor"):
        WoodFisher(data)(net, 0.5)
    with pytest.raises(ValueError, match="weight of '0' is computed from another tensor"):
        SparseGPT(data)(net, 0.5)


def test_layers_that_do_not_run_are_named():
    net, data = small()
    net[0].spare = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"never run as modules on it.*0\.spare"):
        SparseGPT(data)(net, 0.5)
