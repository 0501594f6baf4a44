"""What a proof must catch, and what it must not take for an error."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastmatch as fm
from fastmatch.spec import Axis, Group
from helpers.networks import fresh_seed


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


class Uses(nn.Module):
    """Two layers, used as a function says."""

    def __init__(self, body) -> None:
        super().__init__()
        self.first, self.second, self.body = nn.Linear(6, 8), nn.Linear(8, 3), body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("fresh", ["bias", "scale"])
def test_an_axis_whose_entries_are_all_alike_is_not_overlooked(fresh):
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.zeros_(model[0].bias)
    forgotten = "0.bias" if fresh == "bias" else "1.weight"
    x = torch.randn(4, 6)
    right = fm.PermutationSpec.trace(model, x)
    assert fm.verify(model, right, x).error < 1e-12
    (group,) = right.groups.values()
    axes = tuple(axis for axis in group.axes if axis.parameter != forgotten)
    wrong = fm.PermutationSpec({group.name: Group(group.name, 8, axes)}, right.shapes)
    with pytest.raises(ValueError, match=f"group '{group.name}'"):
        fm.verify(model, wrong, x)


def test_a_branch_of_other_inputs_is_proved_with_several_examples():
    class Branches(Uses):
        def forward(self, x: torch.Tensor, reverse: bool = False) -> torch.Tensor:  # type: ignore[override]
            h = self.first(x)
            return self.second(h.flip(1) if reverse else h)

    model, x = Branches(None), torch.randn(3, 6)
    spec = fm.PermutationSpec.trace(model, x)
    assert fm.verify(model, spec, x).error < 1e-12
    with pytest.raises(ValueError, match="group 'first'"):
        fm.verify(model, spec, fm.Examples(x, (x, True)))


@pytest.mark.parametrize(
    "turns",
    [
        lambda n: n > 4,
        lambda n: n == 1,
        lambda n: n % 2 == 1,
        lambda n: n % 3 == 0,
        lambda n: n != 2,
    ],
    ids=["many", "one", "odd", "threes", "any other"],
)
def test_a_path_that_a_batch_of_another_size_takes_is_refused(turns):
    model = Uses(lambda s, x: s.second(s.first(x).flip(1) if turns(len(x)) else s.first(x)))
    x = torch.randn(2, 6)
    spec = fm.PermutationSpec.trace(model, x)
    with pytest.raises(ValueError, match=r"function on a batch of \d .*fm\.Examples.* group 'first'"):
        fm.verify(model, spec, x)
    other = torch.randn(next(n for n in (1, 6) if turns(n)), 6)
    assert not fm.PermutationSpec.trace(model, fm.Examples(x, other)).groups


def test_what_differs_on_a_batch_of_any_size_is_told_without_the_size():
    model = mlp()
    nn.init.zeros_(model[0].bias)
    x = torch.randn(2, 6)
    (group,) = fm.PermutationSpec.trace(model, x).groups.values()
    axes = tuple(axis for axis in group.axes if axis.parameter != "0.bias")
    spec = fm.PermutationSpec({group.name: Group(group.name, 8, axes)}, shapes(model))
    with pytest.raises(ValueError, match="changes the network's function; group '0'"):
        fm.verify(model, spec, x)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_model_that_takes_batches_of_one_size_only_is_proved_on_these(size):
    sizes = []

    def body(s: Uses, x: torch.Tensor) -> torch.Tensor:
        assert len(x) == size
        sizes.append(len(x))
        return s.second(s.first(x).relu())

    model, x = Uses(body), torch.randn(size, 6)
    spec = fm.PermutationSpec.trace(model, x)
    sizes.clear()
    assert fm.verify(model, spec, x).compared == 3
    assert len(sizes) == 6


@pytest.mark.parametrize(
    "body",
    [
        lambda s, x: s.second(s.first(x)).softmax(1).sum(1, keepdim=True) - 1,
        lambda s, x: s.second(s.first(x)) - s.second(s.first(x).flip(1).flip(1)),
        lambda s, x: s.second(F.normalize(s.first(x), dim=1) * 1e6).sum() - s.second(F.normalize(s.first(x), dim=1) * 1e6).sum(),
        lambda s, x: (s.second(s.first(x)) * 1e4).sin(),
    ],
    ids=["one minus one", "twice the same", "large terms that cancel", "ill conditioned"],
)  # fmt: skip
def test_rounding_is_no_error(body):
    model = Uses(body)
    torch.manual_seed(fresh_seed())
    x = torch.randn(4, 6)
    spec = fm.PermutationSpec({"first": Group("first", 8, (
        Axis("first.weight", 0), Axis("first.bias", 0), Axis("second.weight", 1)))}, shapes(model))  # fmt: skip
    assert fm.verify(model, spec, x).groups == ("first",)
    wrong = fm.PermutationSpec({"first": Group("first", 8, (Axis("first.weight", 0),))}, spec.shapes)
    model.body = lambda s, x: (s.second(s.first(x)) * 1e4).sin()
    with pytest.raises(ValueError, match="group 'first'"):
        fm.verify(model, wrong, x)


def test_complex_weights_are_compared_in_double_precision():
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(8, 6, dtype=torch.complex64))
            self.second = nn.Parameter(torch.randn(3, 8, dtype=torch.complex64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(F.linear(torch.complex(x, x), self.first).tanh(), self.second)

    model, x = Waves(), torch.randn(4, 6)
    spec = fm.PermutationSpec.trace(model, x)
    assert fm.verify(model, spec, x).error < 1e-13
    assert fm.align(model, Waves(), x).spec == spec


def test_a_model_that_runs_in_single_precision_only_is_proved_in_it():
    def body(s, x):
        return s.second(
            torch.frombuffer(bytearray(4 * len(x) * 8), dtype=torch.float32).view(-1, 8) + s.first(x)
        )

    class Strict(Uses):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.dtype == torch.float32, "made for float32"
            return self.body(self, x)

    model, x = Strict(body), torch.randn(4, 6)
    spec = fm.PermutationSpec({"first": Group("first", 8, (
        Axis("first.weight", 0), Axis("first.bias", 0), Axis("second.weight", 1)))}, shapes(model))  # fmt: skip
    found = fm.verify(model, spec, x)
    assert (found.dtype, found.error < 1e-4) == (torch.float32, True)
    wrong = fm.PermutationSpec({"first": Group("first", 8, (Axis("first.weight", 0),))}, spec.shapes)
    with pytest.raises(ValueError, match="group 'first'"):
        fm.verify(model, wrong, x)

    class Refuses(Uses):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("not today")

    with pytest.raises(ValueError, match=r"neither float64 nor float32 .*not today"):
        fm.verify(Refuses(None), spec, x)


def test_random_numbers_are_the_same_in_every_pass_and_the_callers_are_kept():
    def noisy(s, x):
        return s.second(s.first(x * (torch.rand_like(x) < 0.5) * np.random.rand() * random.random()))  # noqa: NPY002

    model = Uses(noisy)
    x = torch.randn(4, 6)

    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002

    before = states()
    spec = fm.PermutationSpec.trace(model, x)
    assert fm.verify(model, spec, x).error < 1e-12
    assert states() == before


def test_every_guilty_group_of_many_is_named():
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(9)])
    groups = {}
    for k in range(8):
        axes = [Axis(f"{k}.weight", 0), Axis(f"{k}.bias", 0), Axis(f"{k + 1}.weight", 1)]
        groups[f"g{k}"] = Group(f"g{k}", 6, tuple(axes[:2] if k in (2, 5) else axes))
    with pytest.raises(ValueError, match=r"group 'g2' .*'g5' ") as error:
        fm.verify(model, fm.PermutationSpec(groups, shapes(model)), torch.randn(4, 6))
    assert not any(f"'g{k}'" in str(error.value) for k in (0, 1, 3, 4, 6, 7))


def pruned(module: nn.Module) -> nn.Module:
    prune.l1_unstructured(module, "weight", 0.5)
    return module


def cached(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda m, args, output: setattr(m, "seen", [{"last": output}]))
    return module


WRAPS = {
    "weight_norm": nn.utils.weight_norm,
    "weight_norm of a parametrization": parametrizations.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "spectral_norm of a parametrization": parametrizations.spectral_norm,
    "pruned": pruned,
    "outputs kept in a list": cached,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("wrap", WRAPS)
def test_computed_weights_are_copied_by_state_and_their_units_move(wrap):
    torch.manual_seed(fresh_seed())
    x = torch.randn(4, 6)

    def build() -> nn.Sequential:
        model = nn.Sequential(WRAPS[wrap](nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
        model(x).sum().backward()  # a step of training leaves computed weights in a graph
        return model.eval()

    a, b = build(), build()
    alignment = fm.align(a, b, x)
    assert alignment.spec.groups
    assert torch.allclose(alignment.apply(b)(x), b(x), atol=1e-6)
    assert torch.allclose(fm.merge([a, a])(x), a(x), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning")
def test_torchscript_is_refused():
    script, model, x = torch.jit.script(mlp()), mlp(), torch.randn(2, 6)
    alignment = fm.align(model, mlp(), x)
    for call in (
        lambda: fm.PermutationSpec.trace(script, x),
        lambda: fm.align(model, script, x),
        lambda: alignment.apply(script),
        lambda: fm.merge([script, script]),
        lambda: fm.merge([model, nn.Sequential(script)]),
        lambda: fm.verify(script, alignment.spec, x),
    ):
        with pytest.raises(TypeError, match=r"TorchScript"):
            call()


def test_inference_mode_leaves_models_that_can_be_trained():
    x = torch.randn(4, 6)
    with torch.inference_mode():
        a, b = mlp(), mlp()
        alignment = fm.align(a, b, x, fm.ActivationMatching([torch.randn(9, 6)]))
        merged = fm.merge([a, alignment.apply(b)])
    merged(x.clone()).sum().backward()
    outside = fm.align(a, b, x.clone(), fm.ActivationMatching([torch.randn(9, 6)]))
    assert outside.spec.sites == alignment.spec.sites


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_of_the_caller_does_not_matter(device):
    a, b, x = mlp(), mlp(), torch.randn(4, 6)
    data = [(torch.randn(16, 6), torch.randint(0, 3, (16,))) for _ in range(2)]
    for matcher in (
        None,
        fm.ActivationMatching(data),
        fm.FisherMatching(data),
        fm.Mixture(fm.WeightMatching(), fm.ActivationMatching(data)),
    ):
        expected = fm.align(a, b, x, matcher).permutations["0"]
        with torch.device(device):
            alignment = fm.align(a, b, x, matcher)
            moved = alignment.apply(b)
        assert torch.equal(alignment.permutations["0"], expected), matcher
    assert moved[0].weight.device.type == "cpu"


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_exported_programs_are_aligned():
    x = torch.randn(4, 6)
    a, b = (torch.export.export(mlp().eval(), (x,)).module() for _ in range(2))
    alignment = fm.align(a, b, x)
    assert list(alignment.permutations) == ["0"]
    assert torch.allclose(alignment.apply(b)(x), b(x), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning")
@pytest.mark.parametrize("transform", ["vmap", "grad", "jacrev", "jacfwd", "jvp"])
def test_function_transforms_inside_a_model(transform):
    def body(s, x):
        def f(v):
            return s.second(s.first(v).tanh())

        if transform == "vmap":
            return torch.vmap(f)(x)
        if transform == "grad":
            return torch.func.grad(lambda v: f(v).sum())(x)
        if transform == "jvp":
            return torch.func.jvp(f, (x,), (x,))[1]
        return getattr(torch.func, transform)(f)(x[0])

    model, x = Uses(body).eval(), torch.randn(4, 6)
    assert fm.verify(model, fm.PermutationSpec.trace(model, x), x).error < 1e-12
