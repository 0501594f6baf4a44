"""Renormalization against its forward form and a plain float64 reference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastmatch as fm
from fastmatch.renorm.fold import fold
from fastmatch.renorm.layers import survey
from fastmatch.renorm.targets import EPS, Target
from fastmatch.statistics.moments import ChannelMoments
from fastmatch.studies.digits import Batches
from helpers.networks import ResNet, build, fresh_seed

FOLDED = ("repair", "rescale", "reshift")


def moments_of(mean: torch.Tensor, variance: torch.Tensor) -> ChannelMoments:
    return ChannelMoments(1000, mean, variance * 1000)


def loader(count: int = 40, size: int = 16) -> Batches:
    return Batches(torch.randn(count, 3, 16, 16, dtype=torch.float64), torch.zeros(count), size)


@pytest.mark.parametrize("method", FOLDED)
@pytest.mark.parametrize("make", [
    lambda: nn.Linear(6, 5), lambda: nn.Linear(6, 5, bias=False), lambda: nn.Conv2d(6, 5, 3, bias=False),
    lambda: nn.Conv1d(6, 5, 3), lambda: nn.Conv3d(6, 5, 1), lambda: nn.Conv2d(6, 12, 3, groups=3),
])  # fmt: skip
def test_the_folded_form_equals_the_forward_form(method, make):
    torch.manual_seed(fresh_seed())
    layer = make().double()
    kind = type(layer).__name__
    x = torch.randn(
        {"Linear": (9, 6), "Conv1d": (9, 6, 7), "Conv2d": (9, 6, 7, 7)}.get(kind, (9, 6, 3, 3, 3))
    ).double()
    z = layer(x)
    channels = z.shape[1]
    shape = [1, channels, *[1] * (z.ndim - 2)]
    dims = [d for d in range(z.ndim) if d != 1]
    mean, variance = z.mean(dims).detach(), z.var(dims, correction=0).detach()
    # Gains from 0.5 to 1.5: one that would harm is not applied (test_harm.py).
    target_mean = torch.randn(channels).double()
    target_std = variance.sqrt() * (torch.rand(channels).double() + 0.5)
    g = (target_std / (variance + EPS).sqrt()).view(shape)
    mu, star = mean.view(shape), target_mean.view(shape)
    expected = {"repair": (z - mu) * g + star, "rescale": z * g, "reshift": z - mu + star}[method]
    fold(layer, moments_of(mean, variance), Target(target_mean, target_std), method)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-9)
    assert (layer.bias is None) == (method == "rescale" and not kind.startswith("Conv1") and z is not None
                                    and make().bias is None)  # fmt: skip


def joint_reference(model, ends, data, method, weights):
    """Joint mode, plainly: statistics of every batch kept in lists, float64, one layer list."""
    targets = {}
    for name in survey(model)[0]:
        mean = std = 0
        for weight, end in zip(weights, ends, strict=True):
            rows = []
            hook = end.get_submodule(name).register_forward_hook(
                lambda m, i, o, rows=rows: rows.append(o.clone().movedim(1, -1).reshape(-1, o.shape[1]))
            )
            with torch.no_grad():
                for x, _ in data:
                    end(x)
            hook.remove()
            everything = torch.cat(rows)
            mean = mean + weight * everything.mean(0)
            std = std + weight * (everything.var(0, correction=0) + EPS).sqrt()
        targets[name] = mean, std
    new = copy.deepcopy(model)
    kept = {name: [] for name in targets}

    def normalize(name):
        def hook(module, inputs, z):
            rows = z.clone().movedim(1, -1).reshape(-1, z.shape[1])
            kept[name].append(rows)
            mean, std = targets[name]
            g = std / (rows.var(0, correction=0) + EPS).sqrt()
            out = {
                "repair": (rows - rows.mean(0)) * g + mean,
                "rescale": rows * g,
                "reshift": rows - rows.mean(0) + mean,
            }[method]
            return out.reshape(z.movedim(1, -1).shape).movedim(-1, 1)

        return hook

    hooks = [new.get_submodule(n).register_forward_hook(normalize(n)) for n in targets]
    with torch.no_grad():
        for x, _ in data:
            new(x)
    for hook in hooks:
        hook.remove()
    for name, (mean, std) in targets.items():
        rows = torch.cat(kept[name])
        moments = moments_of(rows.mean(0), rows.var(0, correction=0))
        fold(new.get_submodule(name), moments, Target(mean, std), method)
    return new


@pytest.mark.grid
@pytest.mark.parametrize("method", FOLDED)
@pytest.mark.parametrize("name", ["vgg without norm", "resnet", "dense"])
def test_joint_mode_matches_a_plain_reference(method, name):
    seed = fresh_seed()
    a, b = (build(name, seed + k)[0].double() for k in range(2))
    data = loader()
    merged = fm.merge([a, b], [0.3, 0.7])
    before = copy.deepcopy(merged.state_dict())
    ours = fm.renormalize(merged, [a, b], data, method, weights=[0.3, 0.7])
    plain = joint_reference(merged, [a, b], data, method, [0.3, 0.7])
    x = data.inputs[:4]
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-8, atol=1e-10)
    assert all(torch.equal(v, before[k]) for k, v in merged.state_dict().items())


@pytest.mark.parametrize("method", FOLDED)
def test_a_network_renormalized_to_itself_stays_itself(method):
    a = build("vgg without norm", fresh_seed())[0].double()
    data = loader(32, 32)
    same = fm.renormalize(a, [a, copy.deepcopy(a)], data, method, weights=[0.5, 0.5])
    x = data.inputs[:4]
    torch.testing.assert_close(same(x), a(x), rtol=1e-9, atol=1e-12)


def test_repair_brings_the_statistics_to_the_targets():
    seed = fresh_seed()
    a, b = (build("vgg without norm", seed + k)[0].double() for k in range(2))
    data = loader(32, 32)
    data.inputs *= 1000  # variances far above eps, which alone keeps them from their targets, for every seed
    merged = fm.renormalize(fm.merge([a, b]), [a, b], data, "repair")
    targets = fm.endpoint_statistics([a, b], data).targets([0.5, 0.5])
    reached = fm.endpoint_statistics([merged], data).models[0]
    for name, (mean, std) in targets.items():
        torch.testing.assert_close(reached[name].mean, mean, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close((reached[name].variance + EPS).sqrt(), std, rtol=1e-3, atol=1e-3)


def test_the_data_is_read_once_for_the_endpoints_and_once_for_each_merge():
    a, b = (build("vgg", k)[0].double() for k in range(2))
    data = loader()
    fm.renormalize(fm.merge([a, b]), [a, b], data, "repair")
    assert data.reads == 2
    data.reads = 0
    statistics = fm.endpoint_statistics([a, b], data)
    for weight in (0.25, 0.5, 0.75):
        fm.renormalize(fm.merge([a, b], [1 - weight, weight]), statistics, data, weights=[1 - weight, weight])
    assert data.reads == 4
    data.reads = 0
    fm.renormalize(fm.merge([a, b]), None, data, "reset")
    assert data.reads == 1


def test_reset_pools_over_all_samples_and_leaves_modes():
    seed = fresh_seed()
    a, b = (build("resnet", seed + k)[0].double() for k in range(2))
    merged = fm.merge([a, b])
    merged.train()
    merged.stage1.eval()
    data = loader(40, 16)
    new = fm.renormalize(merged, None, data, "reset")
    assert [m.training for m in new.modules()] == [m.training for m in merged.modules()]
    rows = merged.stem(data.inputs).movedim(1, -1).reshape(-1, 8).detach()
    torch.testing.assert_close(new.norm.running_mean, rows.mean(0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(new.norm.running_var, rows.var(0), rtol=1e-9, atol=1e-12)
    assert int(new.norm.num_batches_tracked) == 3
    assert all(torch.equal(p, q) for p, q in zip(new.parameters(), merged.parameters(), strict=True))


def test_endpoint_statistics_of_a_permuted_model_are_the_permuted_statistics():
    model, x = build("resnet", fresh_seed())
    model = model.double()
    spec = fm.PermutationSpec.trace(model, x.double())
    perms = spec.random()
    data = loader()
    plain = fm.endpoint_statistics([model], data).models[0]
    moved = fm.endpoint_statistics([fm.Alignment(perms, spec).apply(model)], data).models[0]
    groups = {a.parameter: g for g in spec.groups.values() for a in g.axes if a.dim == 0}
    for name, moments in plain.items():
        group = groups.get(f"{name}.weight")
        expected = moments.permuted(perms[group.name]) if group else moments
        torch.testing.assert_close(moved[name].mean, expected.mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(moved[name].variance, expected.variance, rtol=1e-9, atol=1e-12)


def test_frozen_half_and_dead_channels():
    a, b = (build("vgg without norm", k)[0] for k in range(2))
    for model in (a, b):
        model.bfloat16().requires_grad_(False)
        model.features[0].weight[2], model.features[0].bias[2] = 0, 0
    data = [x.bfloat16() for x, _ in loader()]
    merged = fm.renormalize(fm.merge([a, b]), [a, b], data, "repair")
    for p in merged.parameters():
        assert p.dtype == torch.bfloat16
        assert not p.requires_grad
        assert bool(torch.isfinite(p).all())
    resnet = ResNet(nn.Identity).eval().requires_grad_(False)
    made = fm.renormalize(resnet, [resnet], [torch.randn(8, 3, 16, 16)], "repair")
    assert made.stem.bias is not None
    assert not made.stem.bias.requires_grad
    assert resnet.stem.bias is None


def test_a_method_in_the_place_of_the_loader_is_told():
    """The batches of the loader were taken for endpoints, and counted."""
    model, data = build("vgg", 0)[0].double(), loader()
    with pytest.raises(
        TypeError, match=r'data: expected a loader, .* renormalize\(model, None, loader, "reset"\)'
    ):
        fm.renormalize(model, data, "reset")  # pyright: ignore
    with pytest.raises(
        TypeError, match=r'data: expected a loader, .* renormalize\(model, endpoints, loader, "repair"\)'
    ):
        fm.renormalize(model, data, "repair")  # pyright: ignore


def test_bad_input():
    a, b = (build("vgg", k)[0].double() for k in range(2))
    data = loader()
    cases = [
        ({"method": "fix"}, ValueError, "method: expected one of"),
        ({"data": []}, ValueError, "yielded no batch"),
        (
            {"method": fm.Renormalization("repair", layers=["features.1"])},
            ValueError,
            "'features.1' is not a linear or convolution layer",
        ),
        ({"weights": [1.0]}, ValueError, "weights: expected 2"),
        ({"weights": [1.0, -1.0]}, ValueError, "which do not sum to zero"),
        ({"endpoints": None}, ValueError, "endpoints: expected the merged models"),
        ({"endpoints": [a, build("resnet", 0)[0]]}, ValueError, r"endpoints\[1\]: has no tensor"),
    ]
    for change, kind, message in cases:
        arguments = {
            "model": a,
            "endpoints": [a, b],
            "data": data,
            "method": "repair",
            "weights": [0.5, 0.5],
            **change,
        }
        with pytest.raises(kind, match=message):
            fm.renormalize(**arguments)
    for call in (
        lambda: fm.renormalize(a.state_dict(), [a, b], data),
        lambda: fm.renormalize(a, [a.state_dict(), b], data, "repair", weights=[0.5, 0.5]),
        lambda: fm.interpolate(a.state_dict(), b, data),
        lambda: fm.evaluate(a.state_dict(), data),
    ):
        with pytest.raises(TypeError, match="expected a torch module, since it is run on data"):
            call()
    with pytest.warns(UserWarning, match="renormalize: weights sum to 8, not one"):
        fm.renormalize(a, [a, b], data, "repair", weights=[3, 5])
    with pytest.raises(ValueError, match="in the pass for repair of the merge; a generator"):
        fm.renormalize(a, [a, b], iter(list(data)), "repair", weights=[0.5, 0.5])
    with pytest.raises(ValueError, match="needs batch norm"):
        fm.renormalize(build("mlp", 0)[0], None, [torch.randn(4, 12)], "reset")
    with pytest.raises(ValueError, match="has no linear or convolution"):
        fm.endpoint_statistics([nn.ReLU()], data)

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    data = [torch.randn(4, 4)]
    with pytest.raises(ValueError, match="'idle' was never run"):
        fm.renormalize(Idle(), [Idle()], data, fm.Renormalization(layers=["idle"]))
    with pytest.warns(UserWarning, match="leaves these alone: idle: is never run"):
        fm.renormalize(Idle(), [Idle()], data)
