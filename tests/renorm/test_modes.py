"""Sequential mode, several merges at once, the plan, targets, budgets, and what is left alone."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import fastmatch as fm
from fastmatch._internal.coefficients import remembered_weights
from fastmatch.renorm.fold import fold
from fastmatch.renorm.layers import channel_dim, survey
from fastmatch.renorm.lockstep import Lockstep
from fastmatch.renorm.targets import EPS, Target
from fastmatch.statistics.moments import ChannelMoments
from fastmatch.studies.digits import Batches
from helpers.networks import build, fresh_seed

FOLDED = ("repair", "rescale", "reshift")


def loader(count: int = 40, size: int = 16) -> Batches:
    return Batches(torch.randn(count, 3, 16, 16, dtype=torch.float64), torch.zeros(count), size)


def pair(name: str) -> list[nn.Module]:
    seed = fresh_seed()
    return [build(name, seed + k)[0].double() for k in range(2)]


class Twice(nn.Module):
    """One linear layer called twice, on inputs of other statistics each time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        return self.last(F.relu(self.shared(F.relu(3 * self.shared(x) + 1))))


def outputs_of(model: nn.Module, name: str, data) -> torch.Tensor:
    rows: list[torch.Tensor] = []
    layer = model.get_submodule(name)

    def hook(_module, _inputs, z):
        rows.append(z.detach().clone().movedim(channel_dim(layer, z), -1).flatten(0, -2))

    handle = layer.register_forward_hook(hook)
    with torch.no_grad():
        for x, _ in data:
            model(x)
    handle.remove()
    return torch.cat(rows)


def sequential_reference(model, ends, data, method, weights):
    """One full pass a layer, in forward order, with every layer before already folded."""
    new = copy.deepcopy(model)
    order: list[str] = []
    handles = [
        layer.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, layer in survey(new)[0].items()
    ]
    with torch.no_grad():
        new(next(iter(data))[0])
    for handle in handles:
        handle.remove()
    for name in order:
        theirs = [outputs_of(end, name, data) for end in ends]
        mean = sum(w * z.mean(0) for w, z in zip(weights, theirs, strict=True))
        std = sum(w * (z.var(0, correction=0) + EPS).sqrt() for w, z in zip(weights, theirs, strict=True))
        z = outputs_of(new, name, data)
        moments = ChannelMoments(len(z), z.mean(0), z.var(0, correction=0) * len(z))
        fold(new.get_submodule(name), moments, Target(mean, std), method)
    return new


@pytest.mark.grid
@pytest.mark.parametrize("method", FOLDED)
@pytest.mark.parametrize("name", ["vgg without norm", "resnet with layer norm", "inception"])
def test_sequential_mode_matches_a_pass_for_every_layer(method, name):
    ends = pair(name)
    data = loader(40, 16)  # the last batch is short
    merged = fm.merge(ends, [0.3, 0.7])
    plain = sequential_reference(merged, ends, data, method, [0.3, 0.7])
    data.reads = 0
    ours = fm.renormalize(merged, ends, data, fm.Renormalization(method, "sequential"))
    assert data.reads == 2  # once for the endpoints, once for every layer of the merge
    x = data.inputs[:4]
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("size", [1, 7, 40])
@pytest.mark.parametrize("method", FOLDED)
def test_sequential_repair_of_identical_models_is_the_identity_at_any_batch_size(method, size):
    (a, _) = pair("vgg without norm")
    data = loader(40, size)
    same = fm.renormalize(
        fm.merge([a, copy.deepcopy(a)]), [a, a], data, fm.Renormalization(method, "sequential")
    )
    x = data.inputs[:4]
    torch.testing.assert_close(same(x), a(x), rtol=1e-9, atol=1e-12)


def test_sequential_reset_leaves_every_norm_at_what_reaches_it():
    merged = fm.merge(pair("resnet"))
    data = loader(40, 16)
    new = fm.renormalize(merged, None, data, fm.Renormalization("reset", "sequential"))
    assert data.reads == 1
    for name, norm in new.named_modules():
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        seen = []
        handle = norm.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0].clone()))
        with torch.no_grad():
            for x, _ in data:
                new(x)
        handle.remove()
        rows = torch.cat(seen).movedim(1, -1).flatten(0, -2)
        torch.testing.assert_close(norm.running_mean, rows.mean(0), rtol=1e-8, atol=1e-10, msg=name)
        torch.testing.assert_close(norm.running_var, rows.var(0), rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_a_module_called_twice_has_targets_for_each_call(mode):
    torch.manual_seed(fresh_seed())
    a = Twice().double()
    data = Batches(torch.randn(30, 6).double(), torch.zeros(30), 30 if mode == "joint" else 7)
    statistics = fm.endpoint_statistics([a], data)
    assert len(statistics.calls[0]["shared"]) == 2
    with torch.no_grad():
        first = F.linear(F.relu(a.first(data.inputs)), a.shared.weight, a.shared.bias)
        both = torch.cat([first, a.shared(F.relu(3 * first + 1))])
    torch.testing.assert_close(statistics.models[0]["shared"].mean, both.mean(0))
    torch.testing.assert_close(statistics.models[0]["shared"].variance, both.var(0, correction=0))
    same = fm.renormalize(a, statistics, data, fm.Renormalization("repair", mode))
    torch.testing.assert_close(same(data.inputs), a(data.inputs), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["joint", "sequential"])
@pytest.mark.parametrize("method", ["repair", "reset"])
def test_all_points_of_a_curve_are_calibrated_in_one_read(mode, method):
    ends = pair("vgg")
    data = loader(40, 16)
    weights = [[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]]
    merges = [fm.merge(ends, w) for w in weights]
    statistics = fm.endpoint_statistics(ends, data)
    data.reads = 0
    together = fm.renormalize_many(merges, statistics, data, fm.Renormalization(method, mode))
    assert data.reads == 1
    for new, merge in zip(together, merges, strict=True):
        alone = fm.renormalize(merge, statistics, data, fm.Renormalization(method, mode))
        for name, tensor in new.state_dict().items():
            torch.testing.assert_close(tensor, alone.state_dict()[name], msg=name)


def test_statistics_permuted_are_those_of_the_permuted_model_and_join():
    a, b = pair("resnet with layer norm")
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    spec = fm.PermutationSpec.trace(b, x)
    alignment = fm.Alignment(spec.random(), spec)
    data = loader()
    measured = fm.endpoint_statistics([a, alignment.apply(b)], data)
    data.reads = 0
    apart = fm.endpoint_statistics([a], data) + fm.endpoint_statistics([b], data)
    assert data.reads == 2
    moved = apart.permuted(None, alignment)
    assert data.reads == 2
    for theirs, ours in zip(measured.models, moved.models, strict=True):
        for name, moments in theirs.items():
            torch.testing.assert_close(ours[name].mean, moments.mean, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(ours[name].variance, moments.variance, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="alignments: expected 2"):
        apart.permuted(alignment)
    with pytest.raises(ValueError, match="the same layers"):
        apart + fm.endpoint_statistics(pair("vgg"), data)


def test_a_merge_remembers_its_weights_and_forgetting_is_an_error():
    ends = pair("vgg without norm")
    data = loader()
    merged = fm.merge(ends, [0.2, 0.8])
    told = fm.renormalize(merged, ends, data, "repair", weights=[0.2, 0.8])
    for remembering in (merged, copy.deepcopy(merged)):
        left_out = fm.renormalize(remembering, ends, data, "repair")
        x = data.inputs[:2]
        assert torch.equal(left_out(x), told(x))
    assert set(merged.state_dict()) == set(ends[0].state_dict())
    with pytest.raises(ValueError, match=r"merged of 2 with weights \[0.2, 0.8\], got 1"):
        fm.renormalize(merged, ends[:1], data, "repair")
    with pytest.raises(ValueError, match="weights: needed for 2 endpoints"):
        fm.renormalize(ends[0], ends, data, "repair")


@pytest.mark.parametrize("change", ["load_state_dict", "data", "in place", "prune", "assign"])
def test_remembered_weights_are_not_used_for_other_tensors(change):
    ends, data = pair("vgg without norm"), loader()
    merged = fm.merge(ends, [0.2, 0.8])
    other = fm.merge(ends, [0.7, 0.3])
    if change == "prune":
        prune.l1_unstructured(merged.features[0], "weight", 0.5)
    elif change == "load_state_dict":
        merged.load_state_dict(other.state_dict())
    elif change == "assign":
        merged.load_state_dict(other.state_dict(), assign=True)
    else:
        layer, theirs = merged.classifier[0], other.classifier[0]
        with torch.no_grad():
            if change == "data":
                layer.weight.data = theirs.weight.data
            else:
                layer.weight.copy_(theirs.weight)
    with pytest.raises(
        ValueError, match="weights: needed for 2 endpoints, because the model holds other tensors"
    ):
        fm.renormalize(merged, ends, data, "repair")
    fm.renormalize(merged, ends, data, "repair", weights=[0.7, 0.3])
    fm.renormalize(merged, [other], data, "repair")  # one endpoint needs no weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_remembered_weights_survive_what_keeps_the_merge(dtype):
    ends, data = pair("vgg without norm"), loader()
    merged = fm.merge(ends, [0.2, 0.8])
    same = [
        copy.deepcopy(merged).to(dtype),
        pickle.loads(pickle.dumps(merged)),
        fm.renormalize(merged, ends, data, "repair"),
        merged.train(),
    ]
    merged.load_state_dict(copy.deepcopy(merged.state_dict()))
    for model in same:
        assert remembered_weights(model) == (0.2, 0.8)


@pytest.mark.parametrize(("weights", "options", "expected"), [
    ([0.2, 0.3, 0.5], {}, [0.2, 0.3, 0.5]),
    ([0.2, 0.3, 0.5], {"target": "equal"}, [1 / 3] * 3),
    ([1.0, 1.0, -0.5], {}, [1.0, 1.0, -0.5]),
])  # fmt: skip
def test_targets_of_several_endpoints(weights, options, expected):
    seed = fresh_seed()
    ends = [build("mlp", seed + k)[0] for k in range(3)]
    statistics = fm.endpoint_statistics(ends, [torch.randn(50, 12)])
    plain = statistics.targets(weights, **options)
    wide = statistics.targets(weights, std_factor=2.0, **options)
    for name, (mean, std) in plain.items():
        moments = [m[name] for m in statistics.models]
        torch.testing.assert_close(mean, sum(w * m.mean for w, m in zip(expected, moments, strict=True)))
        spread = sum(w * (m.variance + EPS).sqrt() for w, m in zip(expected, moments, strict=True))
        torch.testing.assert_close(std, spread)
        torch.testing.assert_close(wide[name][0], mean)
        torch.testing.assert_close(wide[name][1], 2 * std)


def test_the_average_target_is_the_papers_mean_over_a_layer():
    ends = [build("mlp", fresh_seed())[0] for _ in range(2)]
    statistics = fm.endpoint_statistics(ends, [torch.randn(50, 12)])
    found = statistics.targets([0.3, 0.7], target="average", std_factor=2.0)
    for name, (mean, std) in statistics.targets([0.3, 0.7]).items():
        expected = mean.sign() * mean.abs().sum() / len(mean)
        torch.testing.assert_close(found[name].mean, expected)
        torch.testing.assert_close(found[name].std, torch.full_like(std, 2 * float(std.mean())))


@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_a_sample_budget_is_kept_to_the_sample(mode):
    ends = pair("vgg without norm")
    merged = fm.merge(ends)
    data = loader(60, 16)
    part = Batches(data.inputs[:41], data.targets[:41], 16)
    x = data.inputs[:2]
    cut = fm.renormalize(merged, ends, data, fm.Renormalization("repair", mode, 41))
    torch.testing.assert_close(
        cut(x), fm.renormalize(merged, ends, part, fm.Renormalization("repair", mode))(x)
    )
    assert fm.endpoint_statistics(ends, data, samples=41).models[0]["classifier.0"].count == 41
    for bad in (0, -3, True):
        with pytest.raises(ValueError, match="samples: expected a whole number of at least 1"):
            fm.Renormalization("repair", samples=bad)
        with pytest.raises(ValueError, match="samples: expected a"):
            fm.endpoint_statistics(ends, data, samples=bad)


def test_the_plan_lists_what_is_left_alone_and_renormalize_warns_of_it():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(12))
            self.first = nn.Linear(12, 12)
            self.up = nn.ConvTranspose1d(1, 1, 3)
            self.tied, self.again = nn.Linear(14, 14, bias=False), nn.Linear(14, 14, bias=False)
            self.again.weight = self.tied.weight
            self.norm = nn.LayerNorm(14)

        def forward(self, x):
            x = self.up(F.relu(self.first(x + self.token))[:, None])[:, 0]
            return self.again(F.relu(self.tied(self.norm(x))))

    model, data = Mixed(), [torch.randn(9, 12)]
    plan = fm.plan_renormalization(model)
    assert plan.method == "auto"
    assert plan.layers == ("first",)
    assert plan.left_alone == {
        "token": "is a parameter of Mixed, no linear or convolution layer",
        "up": "transposed convolutions are not renormalized",
        "tied": "shares its weight with again",
        "again": "shares its weight with tied",
    }
    assert "left alone: up: transposed convolutions" in str(plan)
    before = copy.deepcopy(model.state_dict())
    merged = fm.merge([model, Mixed()])
    with pytest.warns(UserWarning, match="leaves these alone: .*up: transposed convolutions"):
        new = fm.renormalize(merged, [model, model], data, "repair", weights=[0.5, 0.5])
    for name, tensor in new.state_dict().items():
        assert torch.equal(tensor, merged.state_dict()[name]) != name.startswith("first.")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with pytest.raises(ValueError, match="layers: 'up' is left alone: transposed convolutions are not"):
        fm.plan_renormalization(model, fm.Renormalization(layers=["up"]))
    with pytest.raises(ValueError, match="no linear or convolution layer to renormalize; 0: transposed conv"):
        fm.plan_renormalization(nn.Sequential(nn.ConvTranspose2d(3, 3, 2), nn.ReLU()))
    with pytest.raises(ValueError, match="'tied' shares its weight with again"):
        fm.plan_renormalization(model, fm.Renormalization(layers=["tied"]))


def reparametrized(*, bias: bool = True, normed: bool = True) -> nn.Sequential:
    """A network whose layers are all under weight norm, or the same without it."""
    width = 6
    net = nn.Sequential(
        nn.Conv1d(2, width, 3, bias=bias), nn.ReLU(), nn.Flatten(), nn.Linear(4 * width, width, bias=bias), nn.ReLU(),
        nn.Linear(width, 3, bias=bias),
    ).double()  # fmt: skip
    for layer in (net[0], net[3], net[5]) if normed else ():
        weight_norm(layer)
    return net


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", ["joint", "sequential"])
@pytest.mark.parametrize("method", ["repair", "rescale", "auto"])
def test_layers_under_weight_norm_are_renormalized_as_if_it_were_removed(method, mode, bias):
    torch.manual_seed(fresh_seed())
    ends, merged = [reparametrized(bias=bias) for _ in range(2)], reparametrized(bias=bias)
    data = [torch.randn(80, 2, 6).double() for _ in range(2)]
    plain = reparametrized(bias=bias, normed=False)
    with torch.no_grad():
        for mine, other in zip(plain, merged, strict=True):
            if isinstance(mine, (nn.Linear, nn.Conv1d)):
                mine.weight.copy_(other.weight)
                if bias:
                    mine.bias.copy_(other.bias)
    statistics = fm.endpoint_statistics(ends, data)
    options = fm.Renormalization(method, mode)
    new, expected = (
        fm.renormalize(model, statistics, data, options, weights=[0.3, 0.7]) for model in (merged, plain)
    )
    torch.testing.assert_close(new(data[0]), expected(data[0]), rtol=1e-8, atol=1e-8)
    for name in ("0", "3", "5"):
        kept = f"{name}.parametrizations.weight.original1"
        assert torch.equal(new.get_parameter(kept), merged.get_parameter(kept))


@pytest.mark.parametrize("seed", [209, 261, None])
def test_other_parametrizations_are_left_alone_and_the_message_says_how_to_remove_them(seed):
    """At the first seeds the spectral norm changes by less than 1% if rows are scaled by factors around 1."""
    torch.manual_seed(fresh_seed() if seed is None else seed)
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), spectral_norm(nn.Linear(6, 6)))
    left = fm.plan_renormalization(net).left_alone
    assert list(left) == ["2"]
    assert "does not scale with its rows; torch.nn.utils.parametrize.remove_parametrizations" in left["2"]
    with pytest.raises(ValueError, match=r"to renormalize; 0: its parametrized weight does not scale"):
        fm.plan_renormalization(nn.Sequential(net[2]))
    weight_norm(net[0], dim=1)  # norms of the columns
    assert list(survey(nn.Sequential(*net, nn.Linear(6, 6)))[1]) == ["0", "2"]
    hooked = nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(6, 6)), nn.Linear(6, 6))
    assert "computed by a hook; use torch.nn.utils.parametrizations" in survey(hooked)[1]["0"]
    ends, data = [reparametrized() for _ in range(2)], [torch.randn(40, 2, 6).double()]
    with pytest.raises(ValueError, match="layers: the weight of '0' is computed from another tensor"):
        fm.renormalize(ends[0], ends, data, "least-squares", weights=[0.5, 0.5])


@pytest.mark.parametrize("kind", ["plain", "weight norm", "mask"])
@pytest.mark.parametrize("bias", [True, False])
def test_statistics_are_permuted_whatever_the_weight_is_computed_from(kind, bias):
    torch.manual_seed(fresh_seed())
    models = []
    for _ in range(2):
        net = nn.Sequential(nn.Linear(5, 9, bias=bias), nn.ReLU(), nn.Linear(9, 3, bias=bias))
        if kind == "weight norm":
            weight_norm(net[0])
        elif kind == "mask":
            prune.l1_unstructured(net[0], "weight", amount=0.3)
        models.append(net)
    data = [torch.randn(50, 5)]
    alignment = fm.align(*models, data[0][:2])
    moved = fm.endpoint_statistics(models, data).permuted(None, alignment).targets([0.0, 1.0])
    expected = fm.endpoint_statistics([alignment.apply(models[1])], data).targets([1.0])
    for name, (mean, std) in expected.items():
        torch.testing.assert_close(moved[name].mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moved[name].std, std, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("method", ["repair", "reshift", "rescale", "least-squares"])
def test_layers_that_share_a_bias_are_left_alone(method, pruned):
    torch.manual_seed(fresh_seed())
    ends = [nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(6, 6), nn.ReLU()))) for _ in range(2)]
    for end in ends:
        end[2].bias = end[0].bias
    merged, data = fm.merge(ends), [torch.randn(64, 6)]
    merged[2].bias = merged[0].bias
    if pruned:
        for layer in (merged[0], merged[2]):
            prune.l1_unstructured(layer, "bias", amount=0.5)
        merged[2].register_parameter("bias_orig", merged[0].bias_orig)
    before = copy.deepcopy(merged.state_dict())
    with pytest.warns(UserWarning, match="0: shares its bias with 2; 2: shares its bias with 0"):
        new = fm.renormalize(merged, ends, data, fm.Renormalization(method, "sequential"), weights=[0.5, 0.5])
    for name, tensor in new.state_dict().items():
        if not name.startswith("4."):
            assert torch.equal(tensor, before[name])
    if method in ("repair", "reshift"):
        reached = fm.endpoint_statistics([new], data, layers=["4"]).models[0]["4"].mean
        target = fm.endpoint_statistics(ends, data, layers=["4"]).targets([0.5, 0.5])["4"].mean
        torch.testing.assert_close(reached, target, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["joint", "sequential"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_frozen_and_dead_channels_and_modes(mode, dtype):
    ends = [m.to(dtype).requires_grad_(False) for m in pair("vgg without norm")]
    for model in ends:
        model.features[0].weight[2], model.features[0].bias[2] = 0, 0
    merged = fm.merge(ends)
    merged.train()
    merged.features.eval()
    data = [x.to(dtype) for x, _ in loader()]
    training = [m.training for m in merged.modules()]
    new = fm.renormalize(merged, ends, data, fm.Renormalization("repair", mode))
    assert [m.training for m in merged.modules()] == [m.training for m in new.modules()] == training
    assert all(p.dtype == dtype and not p.requires_grad and p.isfinite().all() for p in new.parameters())
    exact = [copy.deepcopy(m).double() for m in ends]
    plain = fm.renormalize(
        copy.deepcopy(merged).double(), exact, [x.double() for x in data], fm.Renormalization("repair", mode)
    )
    want = plain.eval()(data[0].double())
    assert (new.eval()(data[0]).double() - want).abs().max() < 0.1 * want.abs().max()


def test_lockstep_runs_every_pass_and_reports_errors_and_detours():
    lockstep = Lockstep(lambda key, values: [sum(values)] * len(values))
    results: list[int] = []
    before = threading.active_count()

    def run(value: int) -> None:
        results.append(lockstep.meet("b", lockstep.meet("a", value) + value))

    keys = list(lockstep.run([lambda v=v: run(v) for v in range(9)], torch.device("cpu")))
    assert keys == ["a", "b"]
    assert results == [9 * 36 + 36] * 9

    def broken(value: int) -> None:
        lockstep.meet("a", value)
        if value == 3:
            raise KeyError("three")
        lockstep.meet("b", value)

    with pytest.raises(KeyError, match="three"):
        list(lockstep.run([lambda v=v: broken(v) for v in range(9)], torch.device("cpu")))
    with pytest.raises(ValueError, match=r"different paths .* at a, b"):
        list(lockstep.run([lambda v=v: lockstep.meet("ab"[v], v) for v in range(2)], torch.device("cpu")))
    assert threading.active_count() == before


def test_autocast_reaches_the_passes_of_sequential_mode():
    seen = []
    ends = [m.float() for m in pair("mlp")]

    def forward(model, batch):
        seen.append(model(batch).dtype)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        fm.renormalize(
            fm.merge(ends),
            ends,
            [torch.randn(8, 12)] * 2,
            fm.Renormalization("repair", "sequential"),
            forward=forward,
        )
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize(("options", "message"), [
    ({"method": "fix"}, "method: expected one of 'auto', 'repair'.*; got 'fix'"),
    ({"mode": "both"}, "mode: expected one of 'joint', 'sequential'; got 'both'"),
    ({"target": "mean"}, "target: expected one of 'weighted', 'equal', 'average'; got 'mean'"),
    ({"std_factor": 0.0}, "std_factor: expected a finite number above 0; got 0.0"),
    ({"std_factor": float("inf")}, "std_factor: expected a finite number"),
    ({"samples": 0}, "samples: expected a whole number of at least 1; got 0"),
    ({"samples": 2.5}, "samples: expected a whole number"),
    ({"samples": True}, "samples: expected a whole number of at least 1; got True"),
    ({"layers": 3}, "layers: expected a sequence of layer names, or None; got 3"),
    ({"layers": "0"}, "layers: expected a sequence of layer names, or None; got '0'"),
    ({"layers": []}, "layers: expected a sequence of layer names"),
    ({"layers": "stem"}, "layers: expected a sequence of layer names, or None; got 'stem'"),
    ({"layers": [3]}, "layers: expected a sequence of layer names"),
    ({"method": "reset", "layers": ["features.0"]}, 'layers: method "reset" measures every batch norm'),
    ({"method": "reset", "target": "average"}, 'target: method "reset" has no target'),
    ({"method": "reset", "std_factor": 2.0}, 'std_factor: method "reset" has no target standard deviation'),
    ({"method": "reshift", "std_factor": 2.0}, 'std_factor: method "reshift" has no target standard deviation'),
])  # fmt: skip
def test_options_that_make_no_sense_cannot_be_written(options, message):
    with pytest.raises(ValueError, match=message):
        fm.Renormalization(**options)


def test_options_are_frozen_and_comparable():
    options = fm.Renormalization("repair", layers=["stem", "head"])
    assert options == fm.Renormalization("repair", layers=("stem", "head"))
    assert options.layers == ("stem", "head")
    with pytest.raises(AttributeError):
        options.mode = "sequential"


def test_reset_is_no_candidate_with_an_option_that_it_does_not_use():
    model, data = build("vgg", 0)[0].double(), loader()
    assert "reset" in fm.plan_renormalization(model).why
    for options in ({"layers": ["features.0"]}, {"target": "average"}, {"std_factor": 1.5}):
        assert "reset" not in fm.plan_renormalization(model, fm.Renormalization(**options)).why
        with pytest.raises(ValueError, match=f'{next(iter(options))}: method "reset"'):
            fm.renormalize(model, None, data, fm.Renormalization(**options))
    assert data.reads == 0


@pytest.mark.parametrize("mode", ["joint", "sequential"])
@pytest.mark.parametrize("options", [{"target": "equal"}, {"target": "average"}, {"std_factor": 1.5}])
def test_every_option_changes_the_result(mode, options):
    ends = pair("vgg without norm")
    merged, data = fm.merge(ends, [0.2, 0.8]), loader()
    plain = fm.renormalize(merged, ends, data, fm.Renormalization("repair", mode))
    changed = fm.renormalize(merged, ends, data, fm.Renormalization("repair", mode, **options))
    x = data.inputs[:2]
    assert not torch.allclose(plain(x), changed(x))


def test_bad_input():
    ends = pair("vgg without norm")
    merged, data = fm.merge(ends), loader()
    for change, message in (
        ({"mode": "both"}, "mode: expected one of"),
        ({"target": "mean"}, "target: expected one of"),
        ({"std_factor": 0.0}, "std_factor: expected a finite number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            fm.renormalize_many([merged], ends, data, fm.Renormalization("repair", **change))
    statistics = fm.endpoint_statistics(ends, data)
    for change, message in (
        ({"target": "mean"}, "target: expected one of"),
        ({"std_factor": 0.0}, "std_factor: expected a finite number above 0"),
        ({"weights": [1.0]}, "weights: expected 2"),
    ):
        with pytest.raises(ValueError, match=message):
            statistics.targets(**{"weights": [0.5, 0.5], **change})
    with pytest.raises(ValueError, match="weights: expected 1 rows"):
        fm.renormalize_many([merged], ends, data, "repair", weights=[[0.5, 0.5]] * 2)
    with pytest.raises(ValueError, match="models: expected at least one"):
        fm.renormalize_many([], ends, data)
    with pytest.raises(ValueError, match="models: expected at least one"):
        fm.endpoint_statistics([], data)
    with pytest.raises(ValueError, match="endpoints: expected at least one model"):
        fm.renormalize(merged, [], data, "repair")
    with pytest.raises(TypeError, match="method: expected a word or a Renormalization; got int"):
        fm.renormalize(merged, ends, data, 3)
    with pytest.raises(ValueError, match="takes no layers"):
        fm.plan_renormalization(build("vgg", 0)[0], fm.Renormalization("reset", layers=["features.0"]))
    with pytest.raises(ValueError, match="without tensors"):
        fm.renormalize(merged, ends, [("a", None)], fm.Renormalization("repair", samples=3))


def test_weights_of_reset_are_checked_though_it_does_not_use_them():
    merged, data = fm.merge(pair("vgg")), loader()
    with pytest.raises(ValueError, match='weights: method "reset" without endpoints'):
        fm.renormalize(merged, None, data, "reset", weights=[0.5, 0.5])
    with pytest.raises(ValueError, match="weights: expected 1"):
        fm.renormalize(merged, [merged], data, "reset", weights=[0.5, 0.5])
    assert data.reads == 0


def test_stem_shortcut_and_classifier_are_renormalized_and_selectable():
    ends = pair("resnet with layer norm")
    merged, data = fm.merge(ends), loader()
    plan = fm.plan_renormalization(merged, "repair")
    assert {"stem", "stage2.0.shortcut.0", "head"} <= set(plan.layers)
    options = fm.Renormalization("repair", layers=["stem", "stage2.0.shortcut.0"])
    new = fm.renormalize(merged, ends, data, options).state_dict()
    for name, tensor in merged.state_dict().items():
        touched = name in ("stem.weight", "stage2.0.shortcut.0.weight")
        assert torch.equal(new[name], tensor) != touched, name
    assert {n for n in new if n not in merged.state_dict()} == {"stem.bias", "stage2.0.shortcut.0.bias"}


@pytest.mark.parametrize("mode", ["joint", "sequential"])
@pytest.mark.parametrize("method", ["repair", "rescale", "least-squares"])
def test_the_plan_names_the_biases_that_layers_have_got(method, mode):
    ends = pair("resnet with layer norm")
    merged = fm.merge(ends)
    assert fm.plan_renormalization(merged, method).added == ()  # not known before the data
    new = fm.renormalize(merged, ends, loader(), fm.Renormalization(method, mode))
    plan = fm.applied_plan(new)
    assert list(plan.added) == [n for n in new.state_dict() if n not in merged.state_dict()]
    assert ("stem.bias" in plan.added) == (method != "rescale")
    assert ("new: stem.bias, " in str(plan)) == (method != "rescale")


def test_renormalizations_side_by_side_leave_torchs_number_of_threads():
    before = torch.get_num_threads()
    lockstep = Lockstep(lambda key, values: values)
    entered, first_left = threading.Barrier(2, timeout=60), threading.Event()
    left: dict[str, int] = {}

    def renormalize(name: str) -> None:
        meetings = lockstep.run([lambda: lockstep.meet("a", 0)], torch.device("cpu"))
        next(meetings)
        entered.wait()
        if name == "second":
            first_left.wait(60)
        list(meetings)
        left[name] = torch.get_num_threads()
        first_left.set()

    torch.set_num_threads(3)
    try:
        callers = [threading.Thread(target=renormalize, args=(name,)) for name in ("first", "second")]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(120)
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join(60)
        assert left == {"first": 3, "second": 3}
        assert later == [3]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "expected"), [
    ("vgg", ["features.0", "features.4"]),
    ("resnet", [f"stage{s}.{b}.conv{c}" for s in (1, 2) for b in (0, 1) for c in (1, 2)]),
])  # fmt: skip
def test_the_published_layers_are_convolutions_without_stem_shortcuts_and_classifier(name, expected):
    model = build(name, 0)[0]
    options = fm.Renormalization("repair", layers="published")
    assert sorted(fm.plan_renormalization(model, options).layers) == sorted(expected)
    ends = pair(name)
    merged, data = fm.merge(ends), loader()
    new = fm.renormalize(merged, ends, data, options).state_dict()
    changed = {n.rpartition(".")[0] for n, t in merged.state_dict().items() if not torch.equal(new[n], t)}
    assert changed == set(expected)
    named = fm.renormalize(merged, ends, data, fm.Renormalization("repair", layers=expected))
    assert all(torch.equal(t, new[n]) for n, t in named.state_dict().items())


def test_published_layers_that_cannot_be_told_are_refused():
    with pytest.raises(ValueError, match='layers: "published" means convolutions, and the model has none'):
        fm.plan_renormalization(build("mlp", 0)[0], fm.Renormalization(layers="published"))

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    with pytest.raises(
        ValueError, match=r'layers: "published" needs a forward pass that torch\.fx can follow'
    ):
        fm.plan_renormalization(Branching(), fm.Renormalization(layers="published"))


def _slips(a, b, c):
    """Endpoints that are not those of ``merge([a, b], [0.1, 0.9])``, and what they are."""
    return {"another model": [a, c], "another order": [b, a]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["repair", "least-squares", "auto"])
@pytest.mark.parametrize("slip", ["another model", "another order"])
def test_endpoints_that_were_not_merged_are_refused(slip, method, dtype):
    seed = fresh_seed()
    (a, x), (b, _), (c, _) = (build("mlp", seed + k) for k in range(3))
    a, b, c = (model.to(dtype) for model in (a, b, c))
    data = [(x.repeat(4, 1).to(dtype), torch.zeros(4 * len(x), dtype=torch.long))]
    merged = fm.merge([a, b], [0.1, 0.9], biases="normalize")
    with pytest.raises(
        ValueError,
        match=r"endpoints: expected the models that were merged, in their order; the merge's '.*' is not 0\.1",
    ):
        fm.renormalize(merged, _slips(a, b, c)[slip], data, method)
    first = fm.renormalize(merged, [a, b], data, "repair")
    assert fm.renormalize(first, [a, b], data, "repair") is not first, (
        "what is renormalized is no average any more"
    )
    assert fm.renormalize(merged, [a, c], data, "repair", weights=[0.1, 0.9]) is not merged, (
        "weights= says that it is meant"
    )
