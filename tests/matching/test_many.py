"""Several models: planted orders recovered, cycles closed, objectives that never fall."""

from __future__ import annotations

import itertools

import pytest
import torch

import fastmatch as fm
from fastmatch.matching.align import MANY
from fastmatch.matching.many import match_mean, match_universe, pair_objective
from fastmatch.studies.digits import Batches
from helpers.networks import build, fresh_seed
from helpers.trained import trained


def planted_copies(count: int, seed: int):
    model, x = trained("mlp", seed)
    spec = fm.PermutationSpec.trace(model, x)
    generator = torch.Generator().manual_seed(seed)
    planted = [fm.Alignment(spec.random(generator), spec) for _ in range(count - 1)]
    return model, x, spec, planted


@pytest.mark.parametrize("how", MANY)
def test_planted_orders_are_recovered_and_merge_to_the_model(how):
    model, x, spec, planted = planted_copies(3, fresh_seed())
    models = [model, *(p.apply(model) for p in planted)]
    found = fm.align_many(models, x, how=how, spec=spec)
    for alignment, plant in zip(found[1:], planted, strict=True):
        for group, perm in alignment.permutations.items():
            assert torch.equal(perm, plant.invert().permutations[group]), group
    merged = fm.merge([f.apply(m) for f, m in zip(found, models, strict=True)])
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name])


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet"])
@pytest.mark.parametrize("how", MANY)
def test_every_cycle_is_the_identity_and_the_reference_stays(name, how):
    seed = fresh_seed()
    pairs = [build(name, seed + k) for k in range(3)]
    models, x = [m for m, _ in pairs], pairs[0][1]
    found = fm.align_many(models, x, how=how, reference=1)
    identity = found[0].spec.identity()
    assert all(torch.equal(p, identity[g]) for g, p in found[1].permutations.items())
    between = {(p, q): found[p].compose(found[q].invert()) for p, q in itertools.permutations(range(3), 2)}
    for p, q, r in itertools.permutations(range(3)):
        cycle = between[p, q].compose(between[q, r]).compose(between[r, p])
        assert all(torch.equal(perm, identity[g]) for g, perm in cycle.permutations.items())
    x = x.double()
    for alignment, model in zip(found, models, strict=True):
        double = model.double().eval()
        torch.testing.assert_close(alignment.apply(double)(x), double(x))


@pytest.mark.parametrize("match", [match_mean, match_universe])
@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet"])
def test_the_objective_never_falls_and_is_the_sum_over_pairs(match, name):
    seed = fresh_seed()
    pairs = [build(name, seed + k) for k in range(4)]
    states = [m.state_dict() for m, _ in pairs]
    spec = fm.PermutationSpec.trace(*pairs[0])
    found, matching = match(states, spec, seed=seed)
    assert all(
        later >= earlier - 1e-9 * abs(earlier) for earlier, later in itertools.pairwise(matching.objective)
    )
    assert matching.converged
    moved = [fm.Alignment(p, spec).apply(s) for p, s in zip(found, states, strict=True)]
    names = {axis.parameter for g in spec.groups.values() for axis in g.axes}
    slow = sum(
        float((one[n].double() * two[n].double()).sum())
        for one, two in itertools.combinations(moved, 2)
        for n in names
        if "running" not in n
    )
    assert matching.objective[-1] == pytest.approx(slow, rel=1e-9, abs=1e-9)
    assert matching.objective[-1] == pytest.approx(pair_objective(states, spec, found, "affine"), rel=1e-9)


def test_the_cap_on_rounds_is_said():
    pairs = [build("mlp", k) for k in range(3)]
    states = [m.state_dict() for m, _ in pairs]
    spec = fm.PermutationSpec.trace(*pairs[0])
    _, matching = match_mean(states, spec, max_rounds=1)
    assert (matching.sweeps, matching.converged) == (1, False)


@pytest.mark.parametrize("how", ["reference", "chain"])
def test_data_is_read_once_for_every_model_but_one(how):
    pairs = [build("mlp", k) for k in range(3)]
    data = Batches(torch.randn(40, 12), torch.zeros(40), 16)
    fm.align_many([m for m, _ in pairs], pairs[0][1], how=how, data=data)
    assert data.reads == 2


def test_bad_input():
    (a, x), (b, _) = build("mlp", 0), build("mlp", 1)
    for bad, message in [
        ({"how": "star"}, "how: expected one of"),
        ({"reference": 2}, "reference: expected an index below 2"),
        ({"how": "mean", "data": [x]}, "data: how='mean' matches weights"),
        ({"how": "mean", "max_rounds": 0}, "max_rounds: expected at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            fm.align_many([a, b], x, **bad)
    with pytest.raises(ValueError, match="models: expected at least two, got 1"):
        fm.align_many([a], x)
    with pytest.raises(ValueError, match="spec: needed unless"):
        fm.align_many([a, b])
    with pytest.raises(ValueError, match="max_steps: expected at least 1"):
        match_universe([a.state_dict(), b.state_dict()], fm.PermutationSpec.trace(a, x), max_steps=0)
