"""Structure tracing: the groups expected, what is pinned and why, and the model left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastmatch as fm
from fastmatch.spec import Axis, SiteReader
from helpers.networks import NETWORKS, build, fresh_seed


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_found_and_function_preserved(name):
    model, x = build(name, fresh_seed())
    spec = fm.PermutationSpec.trace(model, x)
    assert {g.name: g.size for g in spec.groups.values()} == NETWORKS[name][2]
    found = fm.verify(model, spec, x, seed=fresh_seed(), tolerance=1e-10)
    assert found.error <= 1e-10
    assert found.groups == tuple(spec.groups)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_group_moves_something(name):
    """A permuted state dict differs, so that verification compares two different networks."""
    model, x = build(name, fresh_seed())
    spec = fm.PermutationSpec.trace(model, x)
    for group in spec.groups.values():
        turned = fm.Alignment({group.name: torch.arange(group.size).roll(1)}, spec).apply(model)
        assert any(
            not torch.equal(v, turned.state_dict()[k]) for k, v in model.state_dict().items() if v.ndim
        )


def test_axes_of_a_flatten_are_blocks():
    model, x = build("vgg", 0)
    spec = fm.PermutationSpec.trace(model, x)
    assert Axis("classifier.0.weight", 1, inner=49) in spec.groups["features.4"].axes
    assert Axis("features.5.running_var", 0) in spec.groups["features.4"].axes


def test_axes_of_a_concatenation_are_segments():
    model, x = build("dense", 0)
    spec = fm.PermutationSpec.trace(model, x)
    assert Axis("transition.weight", 1, start=10) in spec.groups["layers.1.2"].axes
    assert Axis("layers.2.0.running_mean", 0, start=6) in spec.groups["layers.0.2"].axes


def test_the_residual_stream_is_one_group():
    model, x = build("resnet", 0)
    spec = fm.PermutationSpec.trace(model, x)
    moved = {a.parameter for a in spec.groups["stage2.0.conv2"].axes}
    assert {"stage2.0.shortcut.0.weight", "stage2.1.conv2.weight", "head.weight"} <= moved


def test_an_operation_without_a_rule_pins_and_is_named():
    model, x = build("unruly", 0)
    spec = fm.PermutationSpec.trace(model, x)
    reasons = {(p.parameter, p.dim): p.reason for p in spec.pins}
    assert reasons["first.weight", 0] == "aten._fft_r2c"
    assert reasons["second.weight", 1] == "aten._fft_r2c"
    assert reasons["first.weight", 1] == "model input"
    assert reasons["third.weight", 0] == "model output"
    assert "aten._fft_r2c" in spec.table()


def test_unused_parameters_and_constants_stay():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.idle = nn.Linear(12, 8), nn.Linear(8, 3), nn.Linear(4, 4)
            self.table = torch.arange(8.0)

        def forward(self, x):
            return self.second(torch.relu(self.first(x) + self.table))

    spec = fm.PermutationSpec.trace(Net(), torch.randn(2, 12))
    assert not spec.groups
    reasons = {p.parameter: p.reason for p in spec.pins if p.dim == 0}
    assert reasons["first.weight"] == "constant"
    assert reasons["idle.weight"].startswith("not used")


def test_a_uniform_constant_does_not_pin():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 3)
            self.ones = torch.ones(8)

        def forward(self, x):
            out = x.new_zeros(len(x), 8)
            out[:, :] = self.first(x) + self.ones
            return self.second(torch.maximum(out, torch.zeros_like(out)))

    model, x = Net(), torch.randn(2, 12)
    spec = fm.PermutationSpec.trace(model, x)
    assert [g.size for g in spec.groups.values()] == [8]
    assert fm.verify(model, spec, x).error < 1e-12


def test_an_in_place_write_through_a_view_pins_what_it_breaks():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.first(x)
            x[:, 2].mul_(3.0)
            return self.second(x)

    model, x = Net(), torch.randn(2, 12)
    spec = fm.PermutationSpec.trace(model, x)
    assert not spec.groups
    assert fm.verify(model, spec, x).error == 0


def test_inputs_that_a_module_refuses_are_told_as_any_that_it_does_not_run_on():
    """Batch norm raises a ValueError of its own, which named no argument."""
    model = nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
    message = r"^example_inputs: the model does not run on them \(expected 2D or 3D input \(got 1D input\)\)"
    with pytest.raises(ValueError, match=message):
        fm.PermutationSpec.trace(model, torch.randn(20))
    with pytest.raises(ValueError, match=r"^example_inputs: expected what the model takes"):  # our own
        fm.PermutationSpec.trace(model, "text")


def test_the_model_is_left_as_it_was():
    model, x = build("vgg", 0)
    model.train()
    model.features[1].eval()
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fm.PermutationSpec.trace(model, x)
    with pytest.raises(ValueError, match="example_inputs: the model does not run on them"):
        fm.PermutationSpec.trace(model, torch.randn(2, 5))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Hungry(nn.Module):
    """A model that finds no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 56.00 GiB")


def test_a_lack_of_memory_is_not_blamed_on_the_inputs():
    with pytest.raises(torch.OutOfMemoryError, match=r"56\.00 GiB"):
        fm.PermutationSpec.trace(Hungry(), torch.randn(2, 4))


@pytest.mark.parametrize(("model", "example", "error"), [
    ("text", torch.zeros(1), "model: expected a torch module"),
    (nn.ReLU(), torch.zeros(1), "no parameters"),
    (nn.Linear(3, 4), None, "example_inputs"),
])  # fmt: skip
def test_bad_input(model, example, error):
    with pytest.raises((ValueError, TypeError), match=error):
        fm.PermutationSpec.trace(model, example)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (lambda s, h: torch.sparse.mm(s[2].weight.to_sparse(), h.t()).t(), "model: computes a sparse_coo tensor"),
        (lambda s, h: s[2](torch.nested.nested_tensor_from_jagged(h, torch.tensor([0, 2]))).values(), "model: computes a nested tensor"),
        (lambda s, h: torch.ops.higher_order.cond(h.sum() > 0, lambda u: s[2](u), lambda u: s[2](u.flip(1)), (h,)), "model: calls torch's 'cond'"),
    ],
    ids=["sparse", "nested", "cond"],
)  # fmt: skip
def test_what_a_trace_cannot_follow_is_refused_by_name(body, named):
    class Uses(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return body(self, self[0](x))

    model = Uses(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=named):
        fm.PermutationSpec.trace(model, torch.randn(2, 6))


def test_sparse_inputs_and_buffers_are_refused_by_name():
    model, x = nn.Sequential(nn.Linear(6, 8)), torch.eye(6).to_sparse()
    with pytest.raises(ValueError, match="example_inputs: have a sparse_coo tensor"):
        fm.PermutationSpec.trace(model, x)
    model.register_buffer("edges", torch.eye(6).to_sparse())
    with pytest.raises(ValueError, match="model: has a sparse_coo tensor"):
        fm.PermutationSpec.trace(model, torch.randn(2, 6))


def test_sites_read_what_the_layers_see_whatever_the_batch():
    model, _ = build("vgg", fresh_seed())
    spec = fm.PermutationSpec.trace(model, torch.randn(2, 3, 16, 16))
    seen = {}
    x = torch.randn(5, 3, 16, 16)
    sites = [t for t in spec.sites if t.group == "features.4"]
    assert {t.role for t in sites} == {"produced", "activation", "consumed"}
    with (
        torch.no_grad(),
        SiteReader(sites, lambda t, v: seen.setdefault(t.role, v.clone()), model, site="pre"),
    ):
        model(x)
    with torch.no_grad():
        conv = model.features[:5](x)
        torch.testing.assert_close(seen["produced"], conv, rtol=0, atol=0)
        torch.testing.assert_close(seen["activation"], model.features[5](conv), rtol=0, atol=0)
        torch.testing.assert_close(seen["consumed"], model.pool(model.features(x)).flatten(1), rtol=0, atol=0)


def test_a_spec_survives_its_text_form():
    model, x = build("grouped", 0)
    spec = fm.PermutationSpec.trace(model, x)
    assert fm.PermutationSpec.from_json(spec.to_json()) == spec
    for text in ("", "{}", '{"format": "other"}', "[1]"):
        with pytest.raises(ValueError, match=r"spec|format"):
            fm.PermutationSpec.from_json(text)


@pytest.mark.parametrize("wrong", [-1, True, 1.0, "0"])
def test_axes_and_groups_are_whole_numbers(wrong):
    with pytest.raises(ValueError, match="dim: expected a whole number of at least 0"):
        Axis("w", wrong)
    with pytest.raises(ValueError, match="inner: expected a whole number of at least 1"):
        Axis("w", 0, inner=0)
    for size in (0, wrong):
        with pytest.raises(ValueError, match="size: expected a whole number of at least 1"):
            fm.Group("h", size, (Axis("w", 0),))


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet"])
def test_a_model_on_the_meta_device_is_traced_without_weights(name):
    model, x = build(name, 0)
    hollow = copy.deepcopy(model).to("meta")
    before = dict(hollow.named_parameters())
    spec = fm.PermutationSpec.trace(hollow, x)
    assert spec.groups == fm.PermutationSpec.trace(model, x).groups
    assert all(parameter is before[k] for k, parameter in hollow.named_parameters())
    assert all(t.is_meta for t in hollow.state_dict().values())
    with pytest.raises(ValueError, match=r"model_a: tensor .* is on the meta device and has no values"):
        fm.align(hollow, hollow, x)
    fm.align(model, model, spec=spec)


def test_differences_along_a_long_axis_are_traced():
    class Differences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps, self.a, self.c = nn.Parameter(torch.randn(3000, 4)), nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.steps[: x.shape[1]]
            return self.c(self.a(x[:, 1:] - x[:, :-1]).relu().diff(dim=1).mean(1))

    model, x = Differences().double(), torch.randn(2, 2500, 4).double()
    spec = fm.PermutationSpec.trace(model, x)
    assert list(spec.groups) == ["a"]
    moved = fm.Alignment(spec.random(), spec).apply(model)
    assert torch.allclose(moved(x), model(x), rtol=0, atol=1e-10)


ENERGIES = [
    nn.Tanh(), nn.SiLU(), nn.GELU(), nn.ReLU(), nn.Softplus(), nn.ELU(), nn.CELU(), nn.SELU(), nn.LeakyReLU(), nn.Hardswish(),
    nn.Hardtanh(), nn.LogSigmoid(), nn.Mish(), nn.PReLU(8), nn.Softmax(1), nn.LogSoftmax(1),
]  # fmt: skip


@pytest.mark.parametrize("nonlinearity", ENERGIES, ids=str)
def test_units_of_a_network_that_returns_the_gradient_of_its_energy_move(nonlinearity):
    class Forces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = nn.Sequential(
                nn.Linear(4, 8), nonlinearity, nn.Linear(8, 8), nonlinearity, nn.Linear(8, 1)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                x = x.requires_grad_()
                return torch.autograd.grad(self.energy(x).sum(), x)[0]

    torch.manual_seed(fresh_seed())
    model, x = Forces().double(), torch.randn(5, 4).double()
    spec = fm.PermutationSpec.trace(model, x)
    assert sum(group.size for group in spec.groups.values()) >= 8
    assert spec.axes_of("energy.0.weight")
    moved = fm.Alignment(spec.random(), spec).apply(model)
    assert torch.allclose(moved(x), model(x), rtol=0, atol=1e-10)
