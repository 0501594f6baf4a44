"""Least squares after alignment, against dense references in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import fastmatch as fm
from fastmatch.renorm.layers import by_outputs
from fastmatch.renorm.least_squares import LayerFit, input_rows
from fastmatch.studies.digits import Batches
from helpers.networks import build, fresh_seed

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (9, 6)),
    "linear of sequences": (lambda: nn.Linear(6, 5, bias=False), (4, 7, 6)),
    "padded": (lambda: nn.Conv2d(4, 6, 3, padding=1), (5, 4, 6, 7)),
    "strided": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1)), (5, 4, 6, 7)),
    "dilated": (lambda: nn.Conv1d(4, 6, 3, dilation=2, padding="same", bias=False), (5, 4, 11)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (5, 4, 6, 7)),
    "reflecting": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (5, 4, 6, 7)),
    "of volumes": (lambda: nn.Conv3d(2, 3, 2, padding=1), (3, 2, 4, 3, 4)),
}
pairs_of_layers = pytest.mark.parametrize("kind", LAYERS)


def drawn(kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(fresh_seed())
    make, shape = LAYERS[kind]
    layer = make().double()
    with (
        torch.no_grad()
    ):  # a weight that is zero counts as pruned and stays; one of some million random weights is
        layer.weight[layer.weight == 0] = 0.1
    return layer, torch.randn(shape, dtype=torch.float64)


def channels_last(layer: nn.Module, z: torch.Tensor) -> torch.Tensor:
    return (z if isinstance(layer, nn.Linear) else z.movedim(1, -1)).reshape(-1, layer.weight.shape[0])  # pyright: ignore


@pairs_of_layers
def test_rows_times_weight_are_the_layers_output(kind):
    layer, x = drawn(kind)
    rows = torch.cat(list(input_rows(layer, x)))  # pyright: ignore[reportArgumentType]
    weight = layer.weight.reshape(rows.shape[1], -1, rows.shape[2])  # pyright: ignore
    found = torch.einsum("rgf,gof->rgo", rows, weight).flatten(1)
    expected = channels_last(layer, layer(x) - (0 if layer.bias is None else _along_channels(layer)))
    torch.testing.assert_close(found, expected)


def _along_channels(layer: nn.Module) -> torch.Tensor:
    dims = 0 if isinstance(layer, nn.Linear) else layer.weight.ndim - 2  # pyright: ignore
    return layer.bias.view(-1, *[1] * dims)  # pyright: ignore


def objective(layer: nn.Module, x: torch.Tensor, goal: torch.Tensor, start: torch.Tensor, ridge: float):
    """What write() minimizes, and its minimizer under torch's own autograd."""
    rows = torch.cat(list(input_rows(layer, x)))  # pyright: ignore
    scale = rows.var(0, correction=0).mean(-1)  # of each group
    distance = (layer.weight - start).square().flatten(1).sum(1).view(len(scale), -1).sum(1)  # pyright: ignore
    error = (channels_last(layer, layer(x)) - channels_last(layer, goal)).square().sum(1).mean()
    return error + ridge * (scale * distance).sum()


@pairs_of_layers
def test_weight_and_bias_are_where_the_objective_is_flat_and_least(kind):
    layer, x = drawn(kind)
    goal = torch.randn_like(layer(x))
    start = layer.weight.detach().clone()  # pyright: ignore
    before = objective(layer, x, goal, start, 0.1).item()
    fit = LayerFit("layer", layer)  # pyright: ignore[reportArgumentType]
    for part, target in zip(x.split(2), goal.split(2), strict=True):
        fit.add(part, target)
    fit.write(0.1, restore_variance=False)
    assert layer.bias is not None
    value = objective(layer, x, goal, start, 0.1)
    gradients = torch.autograd.grad(value, [layer.weight, layer.bias])  # pyright: ignore
    assert all(float(g.abs().max()) < 1e-9 for g in gradients)
    assert value.item() < before


def test_zeros_of_a_pruned_weight_stay_and_the_others_are_the_best_ones():
    torch.manual_seed(fresh_seed())
    layer, x, goal = nn.Linear(8, 5).double(), torch.randn(60, 8).double(), torch.randn(60, 5).double()
    x[:, 1] += x[:, 0]  # inputs that are alike: a weight takes over what a pruned one did
    prune.l1_unstructured(layer, "weight", amount=0.5)
    mask = layer.weight_mask.bool()
    fit = LayerFit("layer", layer)
    fit.add(x, goal)
    fit.write(1e-12, restore_variance=False)
    assert torch.equal(layer.weight != 0, mask)
    for row in range(5):
        own = torch.cat([x[:, mask[row]], torch.ones(60, 1).double()], dim=1)
        best = torch.linalg.lstsq(own, goal[:, row]).solution
        torch.testing.assert_close(layer.weight[row, mask[row]], best[:-1], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(layer.bias[row], best[-1], rtol=1e-6, atol=1e-8)


def loader(count: int = 40, size: int = 16) -> Batches:
    return Batches(torch.randn(count, 3, 16, 16, dtype=torch.float64), torch.zeros(count), size)


class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))


def reference(merged: nn.Sequential, ends, x: torch.Tensor, weights, ridge: float, *, mode: str):
    """One layer after the other, on all samples at once, by an augmented system."""
    new = copy.deepcopy(merged)
    own, theirs = x, [x for _ in ends]
    for k, layer in enumerate(new):
        if isinstance(layer, nn.Linear):
            goals = sum(w * end[k](t) for w, end, t in zip(weights, ends, theirs, strict=True))
            rows = own if mode == "sequential" else sum(w * t for w, t in zip(weights, theirs, strict=True))
            shift = rows.mean(0), goals.mean(0)
            scale = ridge * rows.var(0, correction=0).mean() * len(rows)
            system = torch.cat([rows - shift[0], scale.sqrt() * torch.eye(rows.shape[1]).double()])
            right = torch.cat([goals - shift[1], scale.sqrt() * layer.weight.T])
            weight = torch.linalg.lstsq(system, right).solution.T
            layer.weight.data, bias = weight, shift[1] - weight @ shift[0]
            layer.bias = nn.Parameter(bias)
        own, theirs = new[k](own), [end[k](t) for end, t in zip(ends, theirs, strict=True)]
    return new


@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_a_network_equals_a_plain_reference_layer_by_layer(mode):
    torch.manual_seed(fresh_seed())
    ends = [Plain().double() for _ in range(2)]
    x, weights = torch.randn(50, 6).double(), [0.3, 0.7]
    merged = fm.merge(ends, weights)
    before = copy.deepcopy(merged.state_dict())
    options = fm.Renormalization("least-squares", mode=mode, ridge=0.05, restore_variance=False)
    found = fm.renormalize(merged, ends, [x[:20], x[20:]], options)
    with torch.no_grad():
        expected = reference(merged, ends, x, weights, 0.05, mode=mode)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-8, atol=1e-10)
    assert all(torch.equal(before[n], t) for n, t in merged.state_dict().items())
    plan = fm.applied_plan(found)
    assert plan is not None
    assert plan.method == "least-squares"
    assert plan.layers == ("0", "2", "4")


def test_the_variance_that_a_fit_loses_is_restored_at_every_layer():
    torch.manual_seed(fresh_seed())
    ends, x = [Plain().double() for _ in range(2)], torch.randn(400, 6).double()
    merged = fm.merge(ends)
    lost, restored = (
        fm.renormalize(
            merged,
            ends,
            [x],
            fm.Renormalization("least-squares", mode="sequential", restore_variance=restore),
        )
        for restore in (False, True)
    )

    def output(model: nn.Module, count: int) -> torch.Tensor:
        with torch.no_grad():
            return nn.Sequential(*list(model.children())[:count])(x)

    for count in (3, 5):
        goal = (output(ends[0], count) + output(ends[1], count)) / 2
        ratios = [(output(m, count).var(0) / goal.var(0)).sqrt() for m in (lost, restored)]
        torch.testing.assert_close(output(restored, count).mean(0), goal.mean(0))
        assert bool((ratios[0] < 0.999).any())
        # At most threefold; outputs that the inputs hardly explain keep less.
        assert float(((ratios[1] - 1).abs() < 1e-6).double().mean()) > 0.5
        assert bool((ratios[1] < 1 + 1e-6).all())


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_a_disturbed_copy_computes_its_endpoint_again(name):
    # With batch norm, whose running statistics are measured on the way.
    seed = fresh_seed()
    model = build(name, seed)[0].double().eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.ndim > 1:
                parameter += 0.3 * parameter.std() * torch.randn_like(parameter)
    data = Batches(torch.randn(300, *_shape(name), dtype=torch.float64), torch.zeros(300), 100)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = None
    model.train()
    with torch.no_grad():
        model(data.inputs)
    model.eval()
    options = fm.Renormalization("least-squares", mode="sequential", ridge=1e-9)
    found = fm.renormalize(other, [model], data, options, weights=[1.0])
    with torch.no_grad():
        errors = [float((m(data.inputs) - model(data.inputs)).square().mean()) for m in (other, found)]
    assert errors[1] < 1e-3 * errors[0]


@pytest.mark.parametrize("mode", ["joint", "sequential"])
@pytest.mark.parametrize("merges", [1, 2])
def test_batch_norms_have_the_statistics_of_the_fitted_layers(mode, merges):
    seed = fresh_seed()
    ends = [build("vgg", seed + k)[0].double().eval() for k in range(2)]
    data = Batches(torch.randn(96, *_shape("vgg"), dtype=torch.float64), torch.zeros(96), 96)
    for end in ends:  # whose own statistics are not those of the data
        for norm in (m for m in end.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_var.fill_(4.0)  # pyright: ignore[reportOptionalMemberAccess]
    models = [fm.merge(ends, row) for row in ([0.5, 0.5], [0.2, 0.8])[:merges]]
    before = [{n: t.clone() for n, t in model.state_dict().items()} for model in models]
    options = fm.Renormalization("least-squares", mode=mode)
    for new in fm.renormalize_many(models, ends, data, options):
        measured = fm.renormalize(new, None, data, "reset").state_dict()
        for name, tensor in new.state_dict().items():
            torch.testing.assert_close(tensor, measured[name], rtol=1e-8, atol=1e-10)
    for model, old in zip(models, before, strict=True):
        assert all(torch.equal(t, old[n]) for n, t in model.state_dict().items())


def _shape(name: str) -> tuple[int, ...]:
    example = build(name, 0)[1]
    return tuple(example.shape[1:])


def test_several_merges_are_fitted_to_the_same_endpoints_each_by_its_weights():
    torch.manual_seed(fresh_seed())
    ends = [Plain().double() for _ in range(2)]
    data = [torch.randn(30, 6).double()]
    merges = [fm.merge(ends, [1 - t, t]) for t in (0.0, 0.5, 1.0)]
    options = fm.Renormalization("least-squares", mode="sequential", ridge=1e-9)
    found = fm.renormalize_many(merges, ends, iter(data), options)
    for end, new in ((ends[0], found[0]), (ends[1], found[2])):
        torch.testing.assert_close(new(data[0]), end(data[0]), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[1](data[0]), ends[0](data[0]), atol=1e-2)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.relu(self.shared(F.relu(self.shared(x)))))


@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_a_layer_that_runs_twice_is_refused_by_name_and_the_others_can_be_fitted(mode):
    ends, data = [Twice(), Twice()], [torch.randn(30, 6)]
    merged = fm.merge(ends)
    with pytest.raises(ValueError, match=r"layers: 'shared' runs more than once"):
        fm.renormalize(merged, ends, data, fm.Renormalization("least-squares", mode=mode))
    new = fm.renormalize(merged, ends, data, fm.Renormalization("least-squares", mode=mode, layers=["last"]))
    assert torch.equal(new.shared.weight, merged.shared.weight)  # pyright: ignore
    assert not torch.equal(new.last.weight, merged.last.weight)  # pyright: ignore


def test_what_it_cannot_use_is_refused_by_name():
    ends, data = [Plain(), Plain()], [torch.randn(30, 6)]
    merged = fm.merge(ends)
    statistics = fm.endpoint_statistics(ends, data)
    with pytest.raises(ValueError, match=r"endpoints: .*needs the models; got EndpointStatistics"):
        fm.renormalize(merged, statistics, data, "least-squares")
    with pytest.raises(ValueError, match=r"endpoints: expected"):
        fm.renormalize(merged, None, data, "least-squares")
    for name, value in {"target": "equal", "std_factor": 2.0, "ridge": 0.0}.items():
        with pytest.raises(ValueError, match=name):
            fm.Renormalization("least-squares", **{name: value})
    for name, value in {"ridge": 0.5, "restore_variance": False}.items():
        with pytest.raises(ValueError, match=name):
            fm.Renormalization("repair", **{name: value})
    with pytest.raises(ValueError, match=r"batch 1 .*NaN"):
        fm.renormalize(merged, ends, [data[0], data[0] * float("nan")], "least-squares")


def test_inputs_that_never_vary_leave_the_weight_and_set_the_bias():
    ends = [nn.Sequential(nn.Linear(4, 3)) for _ in range(2)]
    x = torch.ones(8, 4)
    found = fm.renormalize(fm.merge(ends), ends, [x], "least-squares")
    torch.testing.assert_close(found(x), (ends[0](x) + ends[1](x)) / 2)
    assert torch.equal(by_outputs(found[0], found[0].weight), fm.merge(ends)[0].weight)  # pyright: ignore


def test_half_precision_is_fitted_in_float32_and_kept():
    torch.manual_seed(fresh_seed())
    ends = [Plain().to(torch.bfloat16) for _ in range(2)]
    x = torch.randn(200, 6).to(torch.bfloat16)
    options = fm.Renormalization("least-squares", mode="sequential", ridge=1e-4)
    merged = fm.merge(ends)
    found = fm.renormalize(merged, ends, [x], options)
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        goal = (ends[0](x) + ends[1](x)).float() / 2
        errors = [float((m(x).float() - goal).square().mean()) for m in (merged, found)]
    assert errors[1] < errors[0]


def test_layers_that_never_run_are_left_alone_with_a_warning_or_refused_if_they_were_named():
    class Idle(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.Sequential(*list(self)[:5])(x)

    ends, data = [Idle(), Idle()], [torch.randn(40, 6)]
    merged = fm.merge(ends)
    for mode in ("joint", "sequential"):
        with pytest.warns(UserWarning, match="leaves these alone: idle: is never run"):
            new = fm.renormalize(merged, ends, data, fm.Renormalization("least-squares", mode=mode))
        assert torch.equal(new.idle.weight, merged.idle.weight)  # pyright: ignore
        options = fm.Renormalization("least-squares", mode=mode, layers=["idle"])
        with pytest.raises(ValueError, match="no statistics for layer 'idle'"):
            fm.renormalize(merged, ends, data, options)
