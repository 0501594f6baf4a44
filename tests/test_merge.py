"""Weighted averages of models and state dicts."""

from __future__ import annotations

import pytest
import torch
from networks import build, fresh_seed
from torch import nn

import fastmatch as fm


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


def test_bad_input():
    model, _ = build("mlp", 0)
    with pytest.raises(ValueError, match="models: expected at least one"):
        fm.merge([])
    with pytest.raises(ValueError, match="weights: expected 2, one a model, got 1"):
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
