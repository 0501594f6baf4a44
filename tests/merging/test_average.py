"""Weighted averages of models and state dicts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastmatch as fm
from fastmatch._internal.coefficients import remembered_weights
from fastmatch._internal.modules import with_state
from fastmatch.merging.average import merge_states
from helpers.networks import build, fresh_seed


def test_weights_dtypes_and_counters():
    seed = fresh_seed()
    models = [build("vgg", seed + k)[0] for k in range(3)]
    for model, steps in zip(models, (5, 7, 9), strict=True):
        model.features[1].num_batches_tracked.fill_(steps)
    merged = fm.merge(models, weights=[0.5, 0.2, 0.3])
    states = [m.state_dict() for m in models]
    for name, tensor in merged.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert tensor.dtype == torch.long
            assert int(tensor) == int(states[0][name])
            continue
        expected = sum(w * s[name].double() for w, s in zip((0.5, 0.2, 0.3), states, strict=True))
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-6)
    half = fm.merge([m.half() for m in models])
    assert all(v.dtype == torch.float16 for k, v in half.state_dict().items() if "num_batches" not in k)


def test_state_dicts_and_one_model():
    model, _ = build("mlp", 0)
    state = model.state_dict()
    merged = fm.merge([state, state], weights=[0.25, 0.75])
    assert isinstance(merged, dict)
    assert all(torch.allclose(v, state[k]) and v is not state[k] for k, v in merged.items())
    alone = fm.merge([model])
    assert isinstance(alone, nn.Module)
    assert alone is not model


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_equal_tensors_stay_as_they_are(dtype):
    """Indices that are stored as floating point numbers, and are truncated to integers when the model runs."""
    state = {"position_ids": torch.arange(77, dtype=dtype), "weight": torch.zeros(3)}
    others = [{**state, "weight": torch.ones(3)}, {**state, "weight": torch.full((3,), 2.0)}]
    found = merge_states([state, *others], [0.7, 0.2, 0.1])
    assert torch.equal(found["position_ids"], state["position_ids"])
    assert found["position_ids"] is not state["position_ids"]
    assert torch.allclose(found["weight"], torch.full((3,), 0.4))
    with pytest.warns(UserWarning, match="weights sum to 2"):
        assert torch.equal(fm.merge([state, state], [1.0, 1.0])["position_ids"], 2 * state["position_ids"])


def test_a_merged_module_takes_the_merged_tensors_over_and_keeps_what_its_parameters_were():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
            self.second.weight = self.first.weight
            self.first.bias.requires_grad_(False)
            self.conv = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
            self.register_buffer("steps", torch.zeros(3))

    one, two = Tied(), Tied()
    before = {k: v.clone() for k, v in one.state_dict().items()}
    state = merge_states([one.state_dict(), two.state_dict()])
    new = with_state(one, state)
    assert new.second.weight is new.first.weight
    assert isinstance(new.first.weight, nn.Parameter)
    assert new.first.weight.requires_grad
    assert not new.first.bias.requires_grad
    assert new.first.bias.data_ptr() == state["first.bias"].data_ptr()
    assert new.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert len(list(new.parameters())) == len(list(one.parameters()))
    for name, tensor in new.state_dict().items():
        torch.testing.assert_close(tensor, state[name])
        assert torch.equal(one.state_dict()[name], before[name])
        assert tensor.data_ptr() != one.state_dict()[name].data_ptr()


def test_bad_input():
    model, _ = build("mlp", 0)
    with pytest.raises(ValueError, match="models: expected at least one"):
        fm.merge([])
    with pytest.raises(ValueError, match="weights: expected 2, one per model, got 1"):
        fm.merge([model, model], weights=[1.0])
    with pytest.raises(ValueError, match="finite"):
        fm.merge([model, model], weights=[1.0, float("nan")])
    with pytest.raises(ValueError, match=r"models\[1\]: tensor '0.weight' has shape \(30, 12\)"):
        fm.merge([model, nn.Sequential(nn.Linear(12, 30), *list(model)[1:])])
    with pytest.raises(TypeError, match=r"models\[1\]: expected a torch module or a state dict, got str"):
        fm.merge([model, "b"])  # type: ignore[list-item]


def test_weights_that_do_not_sum_to_one_are_warned_of_and_nan_is_named():
    model, _ = build("mlp", 0)
    with pytest.warns(UserWarning, match="weights sum to 1.5, not one"):
        fm.merge([model, model], weights=[0.5, 1.0])
    broken, _ = build("mlp", 0)
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"models\[1\]: tensor '0.weight' holds 1 NaN"):
        fm.merge([model, broken])


def test_a_model_in_place_of_a_list_is_named():
    a, _ = build("mlp", 0)
    assert isinstance(fm.merge(nn.ModuleList([a, a])), type(a))
    with pytest.raises(TypeError, match="models: expected a list of models"):
        fm.merge(a, a)
    with pytest.raises(TypeError, match="models: expected a list of models"):
        fm.align_many(a.state_dict())
    for weights in (0.5, "ab", ["a", "b"]):
        with pytest.raises(TypeError, match="weights: expected 2 numbers"):
            fm.merge([a, a], weights)
    with pytest.raises(TypeError, match="names: expected a list of groups' names"):
        fm.PermutationSpec({}, {}).select("0")


def masked(seed: int, smallest: bool) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    if smallest:
        prune.l1_unstructured(model[0], "weight", 0.5)
    else:
        prune.custom_from_mask(model[0], "weight", torch.eye(5, 4))
    prune.custom_from_mask(model[2], "bias", torch.tensor([1.0, 0.0, 1.0]))
    return model


def test_equal_masks_are_kept_and_the_merge_is_that_of_the_weights():
    ends = [masked(seed, smallest=False) for seed in (1, 2)]
    plain = [{n: getattr(m, n) for n in ("weight", "bias")} for end in ends for m in (end[0], end[2])]
    with pytest.warns(UserWarning, match="weights sum to 1.5"):
        merged = fm.merge(ends, [0.75, 0.75])
    merged(torch.randn(2, 4))  # computes the weights
    for place, k in ((0, 0), (2, 1)):
        for name in ("weight", "bias"):
            expected = 0.75 * (plain[k][name] + plain[k + 2][name])
            torch.testing.assert_close(getattr(merged[place], name), expected)
    assert set(merged.state_dict()["0.weight_mask"].unique().tolist()) == {0.0, 1.0}


COMPUTED = {
    "mask": (lambda m: prune.l1_unstructured(m, "weight", 0.5), r"prune.remove\(module, 'weight'\)"),
    "weight_norm": (nn.utils.weight_norm, r"remove_weight_norm\(module, 'weight'\)"),
    "spectral_norm": (nn.utils.spectral_norm, r"remove_spectral_norm\(module, 'weight'\)"),
    "parametrized": (parametrizations.weight_norm, r"remove_parametrizations\(module, 'weight'\)"),
    "orthogonal": (parametrizations.orthogonal, r"remove_parametrizations\(module, 'weight'\)"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("kind", COMPUTED)
def test_parts_of_computed_weights_that_differ_are_not_averaged(kind):
    wrap, advice = COMPUTED[kind]
    torch.manual_seed(fresh_seed())
    ends = [nn.Sequential(nn.Linear(4, 5)) for _ in range(2)]
    for end in ends:
        wrap(end[0])
    for given in (ends, [end.state_dict() for end in ends]):
        with pytest.raises(ValueError, match=rf"models\[1\]: tensor '0\..*{advice}"):
            fm.merge(given)
    fm.merge([ends[0], ends[0]])
    own = {"x_g": torch.ones(3), "x_v": torch.ones(3), "in_mask": torch.ones(3)}  # names of other things
    assert fm.merge([own, {k: 3 * t for k, t in own.items()}])["x_v"].tolist() == [2.0] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("change", ["every entry", "one entry", "two entries swapped"])
def test_a_note_of_weights_holds_for_no_other_tensors_of_the_same_type(dtype, change):
    ends = [nn.Linear(64, 33).to(dtype) for _ in range(2)]
    merged = fm.merge(ends, [0.2, 0.8])
    with torch.no_grad():
        flat = merged.weight.view(-1)
        if change == "every entry":
            flat.mul_(1.008)
        elif change == "one entry":
            flat[1].mul_(1.5)
        else:
            flat[[1, 2]] = flat[[2, 1]]
    assert remembered_weights(merged) is None
    kept = fm.merge(ends, [0.2, 0.8])
    assert remembered_weights(kept) == (0.2, 0.8)
    assert remembered_weights(kept.to(torch.float32)) == (0.2, 0.8)
