"""Renormalization of pruned networks: any mask, kept to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

import fastmatch as fm
from fastmatch.renorm.layers import survey
from fastmatch.renorm.least_squares import LayerFit
from fastmatch.studies.digits import Batches
from fastmatch.studies.pruning import (
    Reconstruction,
    accuracy_by_sparsity,
    diagonal_fisher,
    global_magnitude,
    input_norms,
    layer_magnitude,
    mask_of,
    n_of_m,
    pruned_copy,
    sparsity,
)
from helpers.networks import build, fresh_seed


class RMSBlock(nn.Module):
    """A block of a transformer: RMS norm, attention of one head, layer norm, a gated feed-forward part."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.before = nn.RMSNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.between = nn.LayerNorm(width)
        self.up, self.gate = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.before(x)
        x = x + self.out(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        y = self.between(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.blocks = nn.Sequential(RMSBlock(), RMSBlock())
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embed(x)).mean(1))


def transformer() -> tuple[nn.Module, Batches]:
    torch.manual_seed(fresh_seed())
    return Transformer().double().eval(), Batches(
        torch.randn(40, 6, 12).double(), torch.randint(5, (40,)), 16
    )


def network(name: str) -> tuple[nn.Module, Batches]:
    if name == "transformer":
        return transformer()
    model = build(name, fresh_seed())[0].double()
    return model, Batches(torch.randn(40, 3, 16, 16).double(), torch.randint(5, (40,)), 16)


NAMES = ["vgg without norm", "resnet with layer norm", "transformer"]


def weights_of(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def errors(model: nn.Module, dense: nn.Module, data: Batches) -> float:
    """How far the layers' means and deviations are from the dense model's, relative, summed."""
    ours, theirs = (fm.endpoint_statistics([m], data).models[0] for m in (model, dense))
    total = 0.0
    for name, want in theirs.items():
        got = ours[name]
        scale = want.variance.sqrt().mean()
        total += float((got.mean - want.mean).abs().mean() / scale)
        total += float((got.variance.sqrt() - want.variance.sqrt()).abs().mean() / scale)
    return total


def masks(kind: str, dense: nn.Module, data: Batches) -> dict[str, torch.Tensor]:
    layers = weights_of(dense)
    if kind == "N:M":
        widths = {n: m.weight[0].numel() for n, m in layers.items()}
        m_of = {n: 4 if width % 4 == 0 else 2 for n, width in widths.items() if width % 2 == 0}
        return {n: n_of_m(layers[n].weight, m // 2, m) for n, m in m_of.items()}
    if kind == "Wanda":
        norms = input_norms(dense, data)
        scores = {n: m.weight.abs() * norms[n] for n, m in layers.items() if n in norms}
        return {n: mask_of(s, 0.5, by_row=True) for n, s in scores.items()}
    fisher = diagonal_fisher(dense, data)
    return {n: mask_of(m.weight**2 * fisher[f"{n}.weight"], 0.6) for n, m in layers.items()}


METHODS = [("repair", "joint"), ("rescale", "joint"), ("repair", "sequential"), ("reshift", "sequential")]
PLACES = [(name, kind) for name in NAMES for kind in ("N:M", "Wanda", "Fisher")]


@pytest.mark.grid
@pytest.mark.parametrize("options", METHODS, ids="-".join)
@pytest.mark.parametrize("place", PLACES, ids="-".join)
def test_any_mask_is_kept_and_sparsity_unchanged(place, options):
    (name, kind), (method, mode) = place, options
    dense, data = network(name)
    chosen = masks(kind, dense, data)
    assert chosen
    pruned = pruned_copy(dense, chosen)
    before = copy.deepcopy(pruned.state_dict())
    new = fm.renormalize(pruned, [dense], data, fm.Renormalization(method, mode))
    for layer, mask in chosen.items():
        weight = new.get_submodule(layer).weight
        assert torch.equal(weight != 0, mask)
    assert sparsity(new) == sparsity(pruned) > 0.1
    assert all(torch.equal(t, before[n]) for n, t in pruned.state_dict().items())
    if method == "repair":
        assert errors(new, dense, data) < 0.5 * errors(pruned, dense, data)


@pytest.mark.parametrize("how", ["global", "layer-wise"])
@pytest.mark.parametrize("name", NAMES)
def test_torch_pruned_modules_keep_their_masks_through_renormalization_and_remove(name, how):
    dense, data = network(name)
    pruned = copy.deepcopy(dense)
    layers = list(weights_of(pruned).values())
    if how == "global":
        prune.global_unstructured([(m, "weight") for m in layers], prune.L1Unstructured, amount=0.7)
    else:
        for module in layers:
            prune.l1_unstructured(module, "weight", amount=0.7)
    kept = {n: m.weight_mask.clone() for n, m in weights_of(pruned).items()}
    x = data.inputs[:4]
    statistics = fm.endpoint_statistics([dense], data)
    new = fm.renormalize(pruned, statistics, data, fm.Renormalization("repair", "sequential"))
    out = new(x)
    for layer, mask in kept.items():
        module = new.get_submodule(layer)
        assert torch.equal(module.weight_mask, mask)
        assert torch.equal(module.weight, module.weight_orig * mask)
    assert errors(new, dense, data) < 0.5 * errors(pruned, dense, data)
    for module in weights_of(new).values():
        prune.remove(module, "weight")
    torch.testing.assert_close(new(x), out)
    assert set(new.state_dict()) >= set(dense.state_dict())


def test_pruned_biases_stay_masked_and_forward_and_fold_agree():
    dense, data = network("vgg without norm")
    pruned = copy.deepcopy(dense)
    prune.random_unstructured(pruned.features[0], "bias", 0.5)
    prune.l1_unstructured(pruned.features[0], "weight", 0.5)
    one = [(data.inputs, data.targets)]
    new = fm.renormalize(pruned, [dense], one, "repair")
    mask = pruned.features[0].bias_mask
    assert torch.equal(new.features[0].bias != 0, mask != 0)
    again = fm.renormalize(pruned, [dense], one, fm.Renormalization("repair", "sequential"))
    torch.testing.assert_close(new(data.inputs), again(data.inputs))
    reached = fm.endpoint_statistics([new], data).models[0]["features.3"]
    goal = fm.endpoint_statistics([dense], data).models[0]["features.3"]
    torch.testing.assert_close(
        reached.mean, goal.mean, rtol=1e-6, atol=1e-9
    )  # measured after what is upstream


def test_a_parametrized_mask_is_scaled_and_a_parametrization_that_cannot_be_is_left():
    class Mask(nn.Module):
        def __init__(self, mask):
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, weight):
            return weight * self.mask

    class Unit(nn.Module):
        def forward(self, weight):
            return F.normalize(weight, dim=1)

    torch.manual_seed(fresh_seed())
    dense = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    pruned = copy.deepcopy(dense)
    mask = (torch.rand(9, 8) < 0.5).double()
    parametrize.register_parametrization(pruned[0], "weight", Mask(mask))
    parametrize.register_parametrization(pruned[2], "weight", Unit())
    data = [torch.randn(50, 8).double()]
    with pytest.warns(UserWarning, match="2: its parametrized weight does not scale with its rows"):
        new = fm.renormalize(pruned, [dense], data, "repair")
    assert torch.equal(new[0].weight != 0, mask != 0)
    want = fm.endpoint_statistics([dense], data).models[0]
    got = fm.endpoint_statistics([new], data).models[0]
    torch.testing.assert_close(got["0"].mean, want["0"].mean)
    assert torch.equal(new[2].weight, pruned[2].weight)


def test_reset_of_a_pruned_batch_norm_net_leaves_every_weight():
    dense, data = network("vgg")
    pruned = pruned_copy(dense, {n: mask_of(m.weight.abs(), 0.8) for n, m in weights_of(dense).items()})
    new = fm.renormalize(pruned, [dense], data, "reset")
    for (name, p), q in zip(new.named_parameters(), pruned.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert not torch.equal(new.features[1].running_mean, pruned.features[1].running_mean)


def test_masks_of_scores():
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0], [0.1, 0.4, 0.2, 0.3]])
    assert mask_of(scores, 0.5).tolist() == [[True] * 4, [False] * 4]
    assert mask_of(scores, 0.5, by_row=True).tolist() == [
        [True, False, True, False],
        [False, True, False, True],
    ]
    assert n_of_m(scores, 1, 2).tolist() == [[True, False, True, False], [False, True, False, True]]
    ties = mask_of(torch.ones(10), 0.3)
    assert int(ties.sum()) == 7
    for bad in (lambda: mask_of(scores, 1.5), lambda: n_of_m(scores, 3, 2), lambda: n_of_m(scores, 1, 3)):
        with pytest.raises(ValueError, match="expected"):
            bad()
    with pytest.raises(ValueError, match="no tensor '9"):
        pruned_copy(nn.Sequential(nn.Linear(2, 2)), {"9": torch.ones(2, 2)})


class KeepHalf(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * (torch.arange(weight.shape[1]) % 2)


@pytest.mark.parametrize("kind", ["mask", "parametrization"])
@pytest.mark.parametrize("pruner", [layer_magnitude, global_magnitude])
def test_layers_that_are_masked_already_stay_pruned_when_they_run(kind, pruner):
    torch.manual_seed(fresh_seed())
    net = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20))
    for layer in (net[0], net[2]):
        if kind == "mask":
            prune.random_unstructured(layer, "weight", 0.1)
        else:
            parametrize.register_parametrization(layer, "weight", KeepHalf())
    new = pruner(net, 0.9)
    assert sparsity(new) >= 0.9
    new(torch.randn(2, 20))
    assert sparsity(new) >= 0.9
    assert sparsity(net) < 0.6


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_a_weight_that_is_computed_otherwise_cannot_be_pruned(wrap):
    net = nn.Sequential(wrap(nn.Linear(3, 3)), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="masks: expected layers that hold their weight; '0' computes"):
        pruned_copy(net, {"0": torch.eye(3)})


class Conv1D(nn.Module):
    """GPT-2's linear layer: its weight is (inputs, outputs)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def test_input_norms_lie_along_the_inputs_of_the_weight():
    torch.manual_seed(fresh_seed())
    x = torch.randn(9, 5) * torch.arange(1, 6)
    norms = x.norm(dim=0)
    for layer, expected in (
        (Conv1D(5, 5), norms[:, None]),
        (Conv1D(3, 5), norms[:, None]),
        (nn.Linear(5, 5), norms[None]),
    ):
        torch.testing.assert_close(input_norms(nn.Sequential(layer), [x])["0"], expected)
    image = torch.randn(4, 2, 6, 6)
    found = input_norms(nn.Sequential(nn.Conv2d(2, 3, 3)), [image])["0"]
    torch.testing.assert_close(found, image.square().sum((0, 2, 3)).sqrt().view(1, 2, 1, 1))


def test_the_diagonal_fisher_is_the_mean_squared_gradient_of_single_samples():
    torch.manual_seed(fresh_seed())
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = Batches(torch.randn(20, 4).double(), torch.randint(3, (20,)), 7)
    fisher = diagonal_fisher(model, data)
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, y in zip(data.inputs, data.targets, strict=True):
        model.zero_grad()
        F.cross_entropy(model(x[None]), y[None]).backward()
        for name, p in model.named_parameters():
            expected[name] += p.grad**2 / 20
    model.zero_grad()
    for name, tensor in fisher.items():
        torch.testing.assert_close(tensor, expected[name])


def test_accuracy_by_sparsity_is_what_plain_evaluation_says():
    dense, data = network("vgg without norm")
    table = accuracy_by_sparsity(dense, data, data, sparsities=(0.5, 0.9), method="repair", progress=False)
    assert table.column("sparsity") == [0.5, 0.9]
    for row in table.rows:
        chosen = {n: mask_of(m.weight.abs(), row["sparsity"]) for n, m in weights_of(dense).items()}
        pruned = pruned_copy(dense, chosen)
        assert row["accuracy"] == fm.evaluate(pruned, data)[1]
        renewed = fm.renormalize(pruned, [dense], data, "repair")
        assert row["renormalized accuracy"] == pytest.approx(fm.evaluate(renewed, data)[1])


def test_sparsities_are_measured_with_any_pruner_and_name_the_method():
    (dense, data), calls = network("vgg"), []
    test = Batches(data.inputs, torch.randint(5, (len(data.inputs),)), data.size)

    def by_library(model, amount):
        calls.append(amount)
        new = copy.deepcopy(model)
        for layer in survey(new)[0].values():
            prune.l1_unstructured(layer, "weight", amount=amount)
        return new

    for pruner in (layer_magnitude, global_magnitude, by_library):
        rows = accuracy_by_sparsity(
            dense, data, test, sparsities=(0.5, 0.9), pruner=pruner, method="repair", progress=False
        ).rows
        assert [(r["sparsity"], r["method"]) for r in rows] == [(0.5, "repair"), (0.9, "repair")]
    assert calls == [0.5, 0.9]
    assert sparsity(global_magnitude(dense, 0.9)) == pytest.approx(0.9, abs=1e-3)
    smallest = min(
        m.weight[m.weight != 0].abs().min() for m in survey(global_magnitude(dense, 0.9))[0].values()
    )
    largest = max((m.weight * (g.weight == 0)).abs().max() for m, g in zip(
        survey(dense)[0].values(), survey(global_magnitude(dense, 0.9))[0].values(), strict=True))  # fmt: skip
    assert smallest >= largest


def correlated(count: int, features: int) -> torch.Tensor:
    return (
        torch.randn(count, 3).double() @ torch.randn(3, features).double()
        + 0.3 * torch.randn(count, features).double()
    )


def test_saliency_is_what_the_loss_rises_by_if_the_other_weights_make_up_for_one():
    torch.manual_seed(fresh_seed())
    layer, x = nn.Linear(6, 2).double(), correlated(80, 6)
    fit = LayerFit("layer", layer)
    fit.add(x, layer(x).detach())
    found = fit.saliency(1e-12)
    rows = x - x.mean(0)
    for i in range(2):
        for j in range(6):
            others = [k for k in range(6) if k != j]
            target = rows[:, j] * layer.weight[i, j].detach()
            best = torch.linalg.lstsq(rows[:, others], target).solution
            rise = (target - rows[:, others] @ best).square().mean() / 2
            assert float(found[i, j]) == pytest.approx(float(rise), rel=1e-6)


def test_reconstruction_keeps_the_outputs_better_than_magnitude_at_the_same_sparsity():
    torch.manual_seed(fresh_seed())
    dense = nn.Sequential(
        nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)
    ).double()
    data = Batches(correlated(300, 12), torch.zeros(300), 100)
    with torch.no_grad():
        errors = []
        for prune_to in (layer_magnitude, Reconstruction(data)):
            pruned = prune_to(dense, 0.6)
            assert sparsity(pruned) == pytest.approx(0.6, abs=0.01)
            errors.append(float((pruned(data.inputs) - dense(data.inputs)).square().mean()))
    assert errors[1] < 0.5 * errors[0]
    assert data.reads == 2


def test_accuracy_by_sparsity_takes_any_pruner_and_least_squares():
    torch.manual_seed(fresh_seed())
    dense = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))
    x = correlated(200, 12).float()
    data = Batches(x, dense(x).argmax(1), 100)
    for pruner in (global_magnitude, Reconstruction(data)):
        table = accuracy_by_sparsity(
            dense, data, data, sparsities=[0.0, 0.7], pruner=pruner, method="least-squares"
        )
        assert table.column("method") == ["least-squares"] * 2
        first, second = table.rows
        assert first["renormalized accuracy"] == first["accuracy"] == 1.0
        assert second["accuracy"] < 1.0
