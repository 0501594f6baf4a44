"""align(): what it refuses, what it leaves alone, what comes out."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from torch import nn

import fastmatch as fm
from fastmatch._internal.states import check_same_architecture
from fastmatch.matching.matcher import Matcher
from helpers.networks import build, fresh_seed


def test_modules_and_state_dicts_give_the_same():
    seed = fresh_seed()
    (a, x), (b, _) = build("vgg", seed), build("vgg", seed + 1)
    before = {k: v.clone() for k, v in b.state_dict().items()}
    matcher = fm.WeightMatching(seed=3)
    by_module = fm.align(a, b, x, matcher)
    by_state = fm.align(a.state_dict(), b.state_dict(), None, matcher, spec=by_module.spec)
    assert all(torch.equal(p, by_state.permutations[k]) for k, p in by_module.permutations.items())
    aligned = by_module.apply(b)
    states = by_module.apply(b.state_dict())
    assert all(torch.equal(v, states[k]) for k, v in aligned.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in b.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(aligned(x), b(x), rtol=1e-4, atol=1e-5)


def test_groups_narrow_the_work():
    (a, x), (b, _) = build("vgg", 0), build("vgg", 1)
    spec = fm.PermutationSpec.trace(a, x)
    found = fm.align(a, b, x, spec=spec.select(["classifier.0"]))
    assert list(found.permutations) == ["classifier.0"]
    with pytest.raises(ValueError, match="not in the spec"):
        spec.select(["classifier.9"])


def test_residual_streams_can_be_held():
    (a, x), (b, _) = build("resnet", 0), build("resnet", 1)
    spec = fm.PermutationSpec.trace(a, x)
    assert spec.residual()
    held = spec.without_residual()
    assert list(held.groups) == [name for name in spec.groups if name not in spec.residual()]
    assert list(fm.align(a, b, x, spec=held).permutations) == list(held.groups)


def test_architectures_that_differ():
    a, x = build("mlp", 0)
    wider = nn.Sequential(nn.Linear(12, 30), *list(a)[1:])
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(30, 12\), model_a has \(24, 12\)"):
        fm.align(a, wider, x)
    with pytest.raises(ValueError, match=r"model_b: has no tensor '5.weight'"):
        fm.align(a, a[:5], x)
    with pytest.raises(ValueError, match=r"model_b: has tensor '6.weight', which model_a has not"):
        fm.align(a, nn.Sequential(*a, nn.Linear(5, 5)), x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    a, x = build("mlp", 0)
    b, _ = build("mlp", 1)
    with torch.no_grad():
        b[2].weight[3, 4] = value
    with pytest.raises(ValueError, match=r"model_b: tensor '2.weight' holds 1 NaN or infinite"):
        fm.align(a, b, x)
    with pytest.raises(ValueError, match=r"model_a: tensor '2.weight'"):
        fm.align(b, a, x)


def test_large_finite_weights_are_fine():
    a, _ = build("mlp", 0)
    with torch.no_grad():
        a[2].weight.fill_(3e38)  # the sum overflows float32, the weights do not
    from fastmatch._internal.states import check_finite

    check_finite(a.state_dict(), "model_a")


def test_missing_pieces():
    a, x = build("mlp", 0)
    spec = fm.PermutationSpec.trace(a, x)
    state = a.state_dict()
    with pytest.raises(ValueError, match="spec: model_a is a state dict, and state dicts cannot be traced"):
        fm.align(state, state, x)
    with pytest.raises(ValueError, match="example_inputs: needed"):
        fm.align(a, a)
    with pytest.raises(TypeError, match="model_a: expected a torch module or a state dict, got int"):
        fm.align(3, a, x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="entry 'k' is str"):
        fm.align({"k": "v"}, state, spec=spec)  # type: ignore[dict-item]
    other = {k: tuple(v.shape) for k, v in build("vgg", 0)[0].state_dict().items()}
    foreign = fm.PermutationSpec(fm.PermutationSpec.trace(*build("vgg", 0)).groups, other)
    with pytest.raises(ValueError, match=r"has no tensor 'features.0.weight', which the spec's group"):
        fm.align(state, state, spec=foreign)


def test_align_has_few_parameters():
    parameters = inspect.signature(fm.align).parameters
    assert list(parameters)[:4] == ["model_a", "model_b", "example_inputs", "matcher"]
    assert len(parameters) <= 7
    assert len(inspect.signature(fm.align_many).parameters) <= 7


@pytest.mark.parametrize(
    ("matcher", "message"),
    [
        ("weights", r"matcher: expected a matcher such as fm.WeightMatching\(\) .* got 'weights'"),
        (fm.WeightMatching, r"matcher: .* got the class WeightMatching; write WeightMatching\(...\)"),
        (fm.ActivationMatching, "matcher: .* got the class ActivationMatching"),
        (fm.Chain(), "matcher: Chain is a strategy for many models; give it to fm.align_many"),
        ([torch.zeros(2, 12)], "matcher: expected a matcher such as .* got list"),
    ],
)
def test_what_is_not_a_matcher_is_refused(matcher, message):
    a, x = build("mlp", 0)
    with pytest.raises(TypeError, match=message):
        fm.align(a, a, x, matcher)


def test_matchers_are_frozen_and_keep_their_data_out_of_the_repr():
    matcher = fm.ActivationMatching([torch.zeros(2, 12)])
    with pytest.raises(FrozenInstanceError):
        matcher.site = "pre"  # type: ignore[misc]
    assert repr(matcher) == "ActivationMatching(similarity='correlation', site='post', reduce='last')"


def test_a_matcher_of_ones_own_can_be_given():
    @dataclass(frozen=True)
    class Reversed(Matcher):
        def match(self, model_a, model_b, spec, *, progress=None):
            permutations = {name: torch.arange(g.size).flip(0) for name, g in spec.groups.items()}
            return fm.Matching(permutations, "Reversed", (0.0,))

    (a, x), (b, _) = build("mlp", 0), build("mlp", 1)
    found = fm.align(a, b, x, Reversed())
    assert found.moved == 48
    assert fm.align_many([a, b], x, fm.ToReference(Reversed()))[1].moved == 48


def test_specs_that_do_not_hold_together():
    group = fm.Group("h", 4, (fm.Axis("w", 0),))
    with pytest.raises(ValueError, match="names parameter 'w'"):
        fm.PermutationSpec({"h": group}, {})
    with pytest.raises(ValueError, match="does not fit w:0"):
        fm.PermutationSpec({"h": group}, {"w": (3,)})
    with pytest.raises(ValueError, match="does not match the group's own name"):
        fm.PermutationSpec({"g": group}, {"w": (4,)})


def test_the_repr_is_one_short_line():
    (a, x), (b, _) = build("mlp", 0), build("mlp", 1)
    found = fm.align(a, b, x)
    assert len(repr(found)) < 120
    assert repr(found).startswith("Alignment(2 groups, ")
    assert "of 48 units moved, WeightMatching objective" in repr(found)
    assert repr(found.compose(found.invert())) == "Alignment(2 groups, 0 of 48 units moved)"


def test_a_spec_in_which_nothing_can_move_is_warned_of():
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.warns(UserWarning, match="^align: no group of units is free to move") as warned:
        fm.align(model, model, torch.randn(2, 4))
    assert warned[0].filename == __file__
    with pytest.warns(UserWarning, match="^align_many: no group of units is free to move") as warned:
        fm.align_many([model] * 3, torch.randn(2, 4))
    assert [w.filename for w in warned] == [__file__]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "net.", "model.net."])
def test_names_that_a_wrapper_prefixed_are_told_with_what_takes_the_prefix_off(prefix):
    a, x = build("mlp", 0)
    spec = fm.PermutationSpec.trace(a, x)
    state = {**{f"{prefix}{k}": v for k, v in a.state_dict().items()}, "criterion.weight": torch.ones(5)}
    with pytest.raises(
        ValueError, match=rf"^model_b: has the names of the other with the prefix '{prefix}'"
    ) as error:
        fm.align(a.state_dict(), state, spec=spec)
    assert "(besides 'criterion.weight')" in str(error.value)
    with pytest.raises(ValueError, match=r"^model_a: has the names of the other with the prefix"):
        fm.align(state, state, spec=spec)
    expression = str(error.value).partition("take it off: ")[2]
    taken = eval(expression, {"state": state})
    assert fm.align(a.state_dict(), taken, spec=spec).moved == 0


def with_head(model, classes):
    return nn.Sequential(*list(model)[:-1], nn.Linear(model[-1].in_features, classes))


@pytest.fixture
def heads():
    """(a, x, b, planted): b is a with its units moved and a head for other classes."""
    a, x = build("mlp", fresh_seed())
    spec = fm.PermutationSpec.trace(a, x)
    planted = fm.Alignment(spec.random(), spec)
    b = planted.apply(a)
    return a, x, with_head(b, 7), planted


@pytest.mark.parametrize("matcher", ["weights", "activations", "mixture", "fisher"])
def test_heads_for_other_classes_are_left_out_and_named(heads, matcher):
    a, x, b, planted = heads
    data = [(torch.randn(64, *x.shape[1:]), torch.randint(0, 5, (64,))) for _ in range(3)]
    activations = fm.ActivationMatching(data)
    matchers = {
        "weights": fm.WeightMatching(), "activations": activations,
        "mixture": fm.Mixture(fm.WeightMatching(), activations), "fisher": fm.FisherMatching(data),
    }  # fmt: skip
    with pytest.warns(UserWarning, match=r"not matched: 5\.weight \(7, 24\), not \(5, 24\)") as warned:
        found = fm.align(a, b, x, matchers[matcher])
    assert warned[0].filename == __file__
    aligned = found.apply(b)
    torch.testing.assert_close(aligned(x), b(x), rtol=1e-4, atol=1e-5)
    assert found.proof is not None
    if matcher != "fisher":  # whose weights depend on the heads
        assert all(torch.equal(p, planted.invert().permutations[g]) for g, p in found.permutations.items())
        assert torch.equal(aligned[0].weight, a[0].weight)


def test_state_dicts_with_heads_for_other_classes(heads):
    a, x, b, _ = heads
    for traced in (a, b):  # the spec may have the sizes of either
        spec = fm.PermutationSpec.trace(traced, x)
        with pytest.warns(UserWarning, match=r"5\.bias"):
            found = fm.align(a.state_dict(), b.state_dict(), spec=spec)
        assert torch.equal(found.apply(b.state_dict())["0.weight"], a[0].weight)


def test_what_needs_equal_heads_says_so(heads):
    a, x, b, _ = heads
    data = [(torch.randn(8, *x.shape[1:]), torch.randint(0, 5, (8,)))]
    with (
        pytest.warns(UserWarning, match="not matched"),
        pytest.raises(ValueError, match=r"tensor '5.weight' has shape \(7, 24\)"),
    ):
        fm.align(a, b, x, fm.StraightThrough(data))
    with pytest.warns(UserWarning, match="not matched"):
        found = fm.align(a, b, x)
    said = " ".join(found.report(a, b, data).sentences)
    assert "no line between the networks: 5.weight, 5.bias" in said
    with pytest.raises(ValueError, match=r"'5\.weight'"):
        fm.merge([a, found.apply(b)])


def test_a_part_named_like_a_wrapper_is_none():
    """Base models of transformers name all of their tensors "model.", and those with a head most of them."""
    states = [{f"model.{k}": v for k, v in build("mlp", 0)[0].state_dict().items()} for _ in range(2)]
    states[1]["head.weight"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"B: has tensor 'head.weight', which A has not; architectures"):
        check_same_architecture(*states, "A", "B")
