"""Applying, inverting and composing permutations."""

from __future__ import annotations

import sys

import pytest
import torch

import fastmatch as fm
from fastmatch.merging.average import merge_states
from fastmatch.permutations.apply import apply_permutations, compose, invert
from helpers.networks import NETWORKS, build, fresh_seed


def test_the_convention_is_new_i_is_old_perm_i():
    model, x = build("mlp", 0)
    spec = fm.PermutationSpec.trace(model, x)
    perm = torch.randperm(24)
    state = model.state_dict()
    new = apply_permutations(state, spec, {"0": perm})
    for i in range(24):
        assert torch.equal(new["0.weight"][i], state["0.weight"][perm[i]])
        assert torch.equal(new["2.weight"][:, i], state["2.weight"][:, perm[i]])
    assert torch.equal(new["5.weight"], state["5.weight"])
    assert all(new[k].data_ptr() != v.data_ptr() for k, v in state.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_inverse_and_composition(name):
    seed = fresh_seed()
    model, x = build(name, seed)
    spec = fm.PermutationSpec.trace(model, x)
    generator = torch.Generator().manual_seed(seed)
    p, q = spec.random(generator), spec.random(generator)
    state = model.state_dict()
    there = apply_permutations(state, spec, p)
    back = apply_permutations(there, spec, invert(p, spec))
    assert all(torch.equal(back[k], v) for k, v in state.items())
    both = apply_permutations(there, spec, q)
    at_once = apply_permutations(state, spec, compose(p, q, spec))
    assert all(torch.equal(both[k], at_once[k]) for k in state)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_kernel_of_large_tensors_moves_what_torch_does(name, monkeypatch):
    seed = fresh_seed()
    model, x = build(name, seed)
    spec = fm.PermutationSpec.trace(model, x)
    perms = spec.random(torch.Generator().manual_seed(seed))
    for dtype in (torch.float32, torch.bfloat16):
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
        plain = apply_permutations(state, spec, perms)
        merged = merge_states([plain, state], [0.25, 0.75])
        with monkeypatch.context() as patch:
            patch.setattr("fastmatch.permutations.apply.LARGE", 1)
            patch.setattr(sys.modules["fastmatch.merging.average"], "LARGE", 1)  # fm.merge is the function
            moved = apply_permutations(state, spec, perms)
            by_kernel = merge_states([plain, state], [0.25, 0.75])
        for key, tensor in plain.items():
            assert torch.equal(moved[key], tensor), key
            torch.testing.assert_close(by_kernel[key], merged[key])


def test_ties_stay_ties():
    model, x = build("tied", 0)
    spec = fm.PermutationSpec.trace(model, x)
    moved = fm.Alignment(spec.random(), spec).apply(model)
    assert moved.down.weight is moved.again.weight
    assert model.down.weight is not moved.down.weight


def test_bad_permutations():
    model, x = build("mlp", 0)
    spec = fm.PermutationSpec.trace(model, x)
    state = model.state_dict()
    for bad, message in [
        ({"nobody": torch.arange(24)}, "unknown group 'nobody'"),
        ({"0": torch.arange(23)}, "expected 24 integers"),
        ({"0": torch.rand(24)}, "expected 24 integers"),
        ({"0": torch.zeros(24, dtype=torch.long)}, "not a permutation"),
    ]:
        with pytest.raises(ValueError, match=message):
            apply_permutations(state, spec, bad)
    with pytest.raises(ValueError, match=r"no tensor '0\.weight'"):
        apply_permutations({k: v for k, v in state.items() if k != "0.weight"}, spec, {})
    with pytest.raises(ValueError, match=r"'0\.bias' has shape \(3,\)"):
        apply_permutations({**state, "0.bias": torch.zeros(3)}, spec, {})
    with pytest.raises(ValueError, match="expected the groups"):
        compose({"0": torch.arange(24)}, {})
