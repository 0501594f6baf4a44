"""Weight matching: planted permutations, the published algorithm, the objective's trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fastmatch as fm
from bench.lib.published import objective as published_objective
from bench.lib.published import weight_matching as published_matching
from fastmatch.matching.weights import _Problem, match_weights, objective
from helpers.networks import NETWORKS, build, fresh_seed
from helpers.trained import TRAINED, trained


@pytest.mark.parametrize("name", TRAINED)
def test_a_planted_permutation_of_a_trained_network_is_recovered(name):
    seed = fresh_seed()
    model, x = trained(name, seed)
    spec = fm.PermutationSpec.trace(model, x)
    planted = fm.Alignment(spec.random(torch.Generator().manual_seed(seed)), spec)
    found = fm.align(model, planted.apply(model), x, seed=seed)
    for group, perm in found.permutations.items():
        assert torch.equal(perm, planted.invert().permutations[group]), group
    assert found.matching is not None
    assert found.matching.converged


@pytest.mark.parametrize("name", ["mlp", "vgg without norm", "resnet"])
def test_the_objective_is_no_lower_than_the_published_algorithms(name):
    seed = fresh_seed()
    (a, x), (b, _) = build(name, seed), build(name, seed + 1)
    if name == "vgg without norm":  # the plain form knows no blocks
        spec = fm.PermutationSpec.trace(a, x).select(["features.0", "classifier.0"])
    else:
        spec = fm.PermutationSpec.trace(a, x)
    state_a = {k: v for k, v in a.state_dict().items() if "running" not in k and v.ndim}
    state_b = {k: v for k, v in b.state_dict().items() if "running" not in k and v.ndim}
    shapes = {k: tuple(v.shape) for k, v in state_a.items()}
    groups = {
        n: fm.Group(n, g.size, tuple(x for x in g.axes if x.parameter in shapes))
        for n, g in spec.groups.items()
    }
    spec = fm.PermutationSpec(groups, shapes)
    reference, value = published_matching(state_a, state_b, spec, seed)
    ours = match_weights(state_a, state_b, spec, start=spec.identity(), seed=seed)  # begins where it does
    double = [{k: v.double().numpy() for k, v in s.items()} for s in (state_a, state_b)]
    reached = published_objective(*double, spec, {k: v.numpy() for k, v in ours.permutations.items()})
    assert reached >= value - 1e-9 * abs(value)
    assert np.isclose(ours.objective[-1], reached, rtol=1e-9)
    assert sum(len(p) for p in reference.values()) == sum(len(p) for p in ours.permutations.values())


def test_groups_are_placed_in_order_by_what_is_known():
    model, x = build("mlp", 0)
    spec = fm.PermutationSpec.trace(model, x)
    first, second = spec.groups
    steps = _Problem(*[model.state_dict()] * 2, spec, "affine", spec.identity()).placement(list(spec.groups))
    assert [(group.name, is_whole) for group, _, is_whole in steps] == [(first, False), (second, True)]
    shared = {x.parameter for x in spec.groups[first].axes} & {x.parameter for x in spec.groups[second].axes}
    assert len(shared) == 1
    assert {x.parameter for x in spec.groups[first].axes} - shared == {x.parameter for x in steps[0][1]}
    assert tuple(steps[1][1]) == spec.groups[second].axes


def test_placing_ends_higher_than_the_identity_after_fewer_solves():
    """On the mean of several pairs: either way ends in a local optimum, and any one pair may be lucky."""
    seed, ratios, solves = fresh_seed(), [], []
    for pair in range(6):
        torch.manual_seed(seed + pair)
        one, two = (
            nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
            for _ in range(2)
        )
        spec = fm.PermutationSpec.trace(one, torch.randn(2, 48))
        states = one.state_dict(), two.state_dict()
        placed, plain = (match_weights(*states, spec, start=start) for start in (None, spec.identity()))
        ratios.append(placed.objective[-1] / plain.objective[-1])
        solves.append(placed.solves / plain.solves)
    assert np.mean(ratios) > 1.0, ratios
    assert np.mean(solves) < 1.0, solves


def test_a_placement_that_ends_lower_than_it_began_is_undone(monkeypatch):
    (one, x), (two, _) = build("mlp", 1), build("mlp", 2)
    spec = fm.PermutationSpec.trace(one, x)
    noted = []
    values = iter([2.0, 1.0])
    monkeypatch.setattr(_Problem, "value", lambda self: next(values))
    found = match_weights(
        one.state_dict(), two.state_dict(), spec, max_sweeps=1, on_solve=lambda *args: noted.append(args)
    )
    assert found.objective == (2.0, 2.0)
    assert not found.converged
    assert all(torch.equal(p, spec.identity()[name]) for name, p in found.permutations.items())
    placed, undone = noted[: len(spec.groups)], noted[len(spec.groups) :]
    assert any(not torch.equal(p[name], spec.identity()[name]) for name, p, _ in placed)
    assert [name for name, _, _ in undone] == list(spec.groups)
    assert undone[-1][2] == set(spec.groups)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_objective_never_falls_and_is_what_it_says(name):
    seed = fresh_seed()
    (a, x), (b, _) = build(name, seed), build(name, seed + 1)
    spec = fm.PermutationSpec.trace(a, x)
    states = a.state_dict(), b.state_dict()
    for include in ("weights", "affine", "statistics"):
        found = match_weights(*states, spec, seed=seed, include=include)
        assert all(
            later >= earlier for earlier, later in zip(found.objective, found.objective[1:], strict=False)
        )
        assert found.converged
        direct = objective(*states, spec, found.permutations, include)
        assert found.objective[-1] == pytest.approx(direct, rel=1e-9, abs=1e-9)
        assert found.solves + found.skipped == found.sweeps * len(spec.top_level())


def test_a_group_is_solved_again_only_if_a_neighbour_moved():
    model, x = trained("mlp", 0)
    spec = fm.PermutationSpec.trace(model, x)
    state = model.state_dict()
    found = match_weights(state, state, spec, start=spec.identity())
    assert (found.solves, found.sweeps) == (len(spec.groups), 1)  # nothing moves: each solved once
    placed = match_weights(state, state, spec)  # only the last one was placed by all it has
    assert (placed.solves, placed.sweeps) == (2 * len(spec.groups) - 1, 2)
    again = match_weights(state, state, spec, start=found.permutations, seed=1)
    assert again.objective[0] == again.objective[-1]


def test_the_same_seed_gives_the_same_result_and_a_start_is_kept():
    (a, x), (b, _) = build("resnet", 1), build("resnet", 2)
    spec = fm.PermutationSpec.trace(a, x)
    states = a.state_dict(), b.state_dict()
    one, two = (match_weights(*states, spec, seed=7) for _ in range(2))
    assert one.objective == two.objective
    assert all(torch.equal(one.permutations[k], two.permutations[k]) for k in spec.groups)
    resumed = match_weights(*states, spec, start=one.permutations, seed=8)
    assert resumed.objective[0] == pytest.approx(one.objective[-1], rel=1e-9)
    first = match_weights(*states, spec, seed=7, max_sweeps=1)
    assert first.objective[-1] == one.objective[1]
    assert first.sweeps == 1
    assert not first.converged


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_matched_and_returned_as_they_came(dtype):
    model, x = trained("mlp", 3)
    spec = fm.PermutationSpec.trace(model, x)
    planted = fm.Alignment(spec.random(torch.Generator().manual_seed(0)), spec)
    model = model.to(dtype)
    found = fm.align(model, planted.apply(model), x, spec=spec)
    aligned = found.apply(planted.apply(model))
    for name, tensor in aligned.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, model.state_dict()[name])


def test_bad_arguments():
    model, x = build("mlp", 0)
    spec = fm.PermutationSpec.trace(model, x)
    state = model.state_dict()
    for bad, message in [
        ({"include": "all"}, "include: expected one of"),
        ({"max_sweeps": 0}, "max_sweeps: expected at least 1"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"start": {"0": torch.zeros(24, dtype=torch.long)}}, r"start\['0'\]: not a permutation"),
    ]:
        with pytest.raises(ValueError, match=message):
            match_weights(state, state, spec, **bad)
