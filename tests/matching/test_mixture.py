"""Activations and weights mixed: the objective as stated, its ends, planted permutations, one read."""

from __future__ import annotations

import itertools

import pytest
import torch

import fastmatch as fm
from fastmatch.studies.digits import Batches
from helpers.networks import build, fresh_seed
from helpers.trained import TRAINED, planted


@pytest.mark.parametrize("name", TRAINED)
def test_a_planted_permutation_is_recovered_in_one_read(name):
    seed = fresh_seed()
    model, x, data, _, hidden = planted(name, seed)
    matcher = fm.Mixture(fm.WeightMatching(seed=seed), fm.ActivationMatching(data), 0.5)
    found = fm.align(model, hidden.apply(model), x, matcher)
    assert data.reads == 1
    for group, perm in found.permutations.items():
        assert torch.equal(perm, hidden.invert().permutations[group]), group


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet"])
def test_the_objective_is_the_stated_mix_and_never_falls(name, share):
    seed = fresh_seed()
    (a, x), (b, _) = build(name, seed), build(name, seed + 1)
    data = Batches(torch.randn(24, *x.shape[1:]), torch.zeros(24), 10)
    spec = fm.PermutationSpec.trace(a, x)
    activations = fm.ActivationMatching(data)
    matcher = fm.Mixture(fm.WeightMatching(), activations, activation_weight=share)
    found = matcher.match(a, b, spec)
    assert found.matcher == "Mixture"
    assert found.converged
    assert all(later >= earlier for earlier, later in itertools.pairwise(found.objective))
    names = {axis.parameter for g in spec.groups.values() for axis in g.axes}
    names = [n for n in names if "running" not in n]
    one, two = a.state_dict(), fm.Alignment(found.permutations, spec).apply(b.state_dict())
    inner = sum(float((one[n].double() * two[n].double()).sum()) for n in names)
    norms = [sum(float(s[n].double().square().sum()) for n in names) ** 0.5 for s in (one, two)]
    gains = activations.similarities(a, b, spec)
    matched = sum(float(g[i, p]) for k, g in gains.items() for i, p in enumerate(found.permutations[k]))
    reach = sum(float(g.norm()) * len(g) ** 0.5 for g in gains.values())
    expected = share * matched / reach + (1 - share) * inner / (norms[0] * norms[1])
    assert found.objective[-1] == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert abs(expected) <= 1
    if share == 0:
        plain = fm.align(a, b, spec=spec)
        assert all(torch.equal(p, plain.permutations[g]) for g, p in found.permutations.items())


def test_bad_input():
    weights, activations = fm.WeightMatching(), fm.ActivationMatching([torch.zeros(2, 12)])
    for share in (1.0, 1.5, -0.1, float("nan"), "half"):
        with pytest.raises(ValueError, match="activation_weight: expected a"):
            fm.Mixture(weights, activations, share)
    with pytest.raises(
        TypeError, match=r"activation_matching: expected fm.ActivationMatching\(...\), got list"
    ):
        fm.Mixture(weights, [torch.zeros(2, 12)])
    with pytest.raises(
        TypeError, match=r"weight_matching: expected fm.WeightMatching\(...\), got ActivationMatching"
    ):
        fm.Mixture(activations, weights)
    with pytest.raises(
        TypeError, match=r"weight_matching: .* got the class WeightMatching; write WeightMatching\(...\)"
    ):
        fm.Mixture(fm.WeightMatching, activations)
    model, x = build("mlp", 0)
    spec, state = fm.PermutationSpec.trace(model, x), model.state_dict()
    with pytest.raises(TypeError, match="model_a: expected a torch module"):
        fm.Mixture(weights, activations).match(state, state, spec)
