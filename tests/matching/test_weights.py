"""Weight matching: planted permutations, the published algorithm, the objective's trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fastmatch as fm
from bench.lib.published import objective as published_objective
from bench.lib.published import weight_matching as published_matching
from fastmatch._internal.ranks import ALONE, Ranks
from fastmatch.matching.ascent import Hooks
from fastmatch.matching.greedy import greedy_order
from fastmatch.matching.objective import WeightObjective, objective
from fastmatch.matching.weights import WeightMatching, match_weights
from helpers.networks import NETWORKS, build, fresh_seed
from helpers.trained import TRAINED, trained


@pytest.mark.parametrize("name", TRAINED)
def test_a_planted_permutation_of_a_trained_network_is_recovered(name):
    seed = fresh_seed()
    model, x = trained(name, seed)
    spec = fm.PermutationSpec.trace(model, x)
    planted = fm.Alignment(spec.random(torch.Generator().manual_seed(seed)), spec)
    found = fm.align(model, planted.apply(model), x, fm.WeightMatching(seed=seed))
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
    ours = WeightMatching("identity", seed=seed).match(state_a, state_b, spec)  # begins where it does
    double = [{k: v.double().numpy() for k, v in s.items()} for s in (state_a, state_b)]
    reached = published_objective(*double, spec, {k: v.numpy() for k, v in ours.permutations.items()})
    assert reached >= value - 1e-9 * abs(value)
    assert np.isclose(ours.objective[-1], reached, rtol=1e-9)
    assert sum(len(p) for p in reference.values()) == sum(len(p) for p in ours.permutations.values())


def test_greedy_initialization_takes_the_groups_with_most_known_weights_first():
    model, x = build("mlp", 0)
    spec = fm.PermutationSpec.trace(model, x)
    first, second = spec.groups
    problem = WeightObjective(*[model.state_dict()] * 2, spec, "affine")
    steps = greedy_order(problem, list(spec.groups))
    assert [(step.group.name, step.is_complete) for step in steps] == [(first, False), (second, True)]
    shared = {x.parameter for x in spec.groups[first].axes} & {x.parameter for x in spec.groups[second].axes}
    assert len(shared) == 1
    assert {x.parameter for x in spec.groups[first].axes} - shared == {x.parameter for x in steps[0].axes}
    assert tuple(steps[1].axes) == spec.groups[second].axes


def test_greedy_initialization_ends_higher_than_the_identity_after_fewer_solves():
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
        greedy, plain = (WeightMatching(init).match(*states, spec) for init in ("greedy", "identity"))
        ratios.append(greedy.objective[-1] / plain.objective[-1])
        solves.append(greedy.solves / plain.solves)
    assert np.mean(ratios) > 1.0, ratios
    assert np.mean(solves) < 1.0, solves


def test_a_greedy_initialization_that_ends_lower_than_it_began_is_undone(monkeypatch):
    (one, x), (two, _) = build("mlp", 1), build("mlp", 2)
    spec = fm.PermutationSpec.trace(one, x)
    placed = []
    values = iter([2.0, 1.0])
    monkeypatch.setattr(WeightObjective, "value", lambda self, permutations: next(values))

    def remembered(name, compute):
        step = compute()
        placed.append(step.permutations.get(name, spec.identity().get(name)))
        return step

    hooks = Hooks(remembered=remembered)
    found = match_weights(one.state_dict(), two.state_dict(), spec, WeightMatching(max_sweeps=1), hooks)
    assert found.objective == (2.0, 2.0)
    assert not found.converged
    assert all(torch.equal(p, spec.identity()[name]) for name, p in found.permutations.items())
    moved = [p for p in placed if p is not None]
    assert any(not torch.equal(p, torch.arange(len(p))) for p in moved)


@pytest.mark.parametrize("name", NETWORKS)
def test_steps_that_are_remembered_lead_to_the_same_permutations(name):
    """Whatever the number of steps that an interrupted run had made."""
    seed = fresh_seed()
    (a, x), (b, _) = build(name, seed), build(name, seed + 1)
    spec = fm.PermutationSpec.trace(a, x)
    states = a.state_dict(), b.state_dict()
    steps = []

    def noted(name, compute):
        steps.append((name, compute()))
        return steps[-1][1]

    whole = match_weights(*states, spec, hooks=Hooks(out_of_core=True, remembered=noted))
    for count in (0, 1, len(steps) // 2, len(steps)):
        given = iter(steps[:count])

        def remembered(name, compute, given=given):
            known, step = next(given, (name, None))
            assert known == name
            return compute() if step is None else step

        again = match_weights(*states, spec, hooks=Hooks(out_of_core=True, remembered=remembered))
        assert again.objective == whole.objective
        assert all(torch.equal(again.permutations[k], p) for k, p in whole.permutations.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_objective_never_falls_and_is_what_it_says(name):
    seed = fresh_seed()
    (a, x), (b, _) = build(name, seed), build(name, seed + 1)
    spec = fm.PermutationSpec.trace(a, x)
    states = a.state_dict(), b.state_dict()
    for include in ("weights", "affine", "statistics"):
        found = WeightMatching(include=include, seed=seed).match(*states, spec)
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
    found = WeightMatching("identity").match(state, state, spec)
    assert (found.solves, found.sweeps) == (len(spec.groups), 1)  # nothing moves: each solved once
    greedy = WeightMatching().match(state, state, spec)  # only the last group had all of its weights known
    assert (greedy.solves, greedy.sweeps) == (2 * len(spec.groups) - 1, 2)
    again = WeightMatching(found.permutations, seed=1).match(state, state, spec)
    assert again.objective[0] == again.objective[-1]


class OneOfAGroup(Ranks):
    """A process group of one process."""

    is_group = True


@pytest.mark.parametrize("ranks", [ALONE, OneOfAGroup()])
def test_sums_of_a_survey_are_used_and_their_tensors_not_read(ranks):
    model, x = build("mlp", 1)
    spec, state = fm.PermutationSpec.trace(model, x), model.state_dict()
    read = []

    class Lazy(dict):
        headers = state

        def __getitem__(self, name):
            read.append(name)
            return state[name]

    survey = {name: (1.0, 4.0, 0.1 * k) for k, name in enumerate(state)}
    problem = WeightObjective(Lazy(state), Lazy(state), spec, "affine", ranks=ranks, survey=survey)
    expected = 0.0
    for name in problem.names():
        expected += survey[name][2]
    assert problem.value(spec.identity()) == expected
    assert problem.scale() == pytest.approx(2.0 * len(problem.names()), rel=1e-15)
    assert read == []
    group = next(iter(spec.groups))
    moved = {**spec.identity(), group: spec.identity()[group].flip(0)}
    problem.value(moved)
    assert set(read) == {axis.parameter for axis in problem.axes(spec.groups[group])}


def test_the_same_seed_gives_the_same_result_and_a_start_is_kept():
    (a, x), (b, _) = build("resnet", 1), build("resnet", 2)
    spec = fm.PermutationSpec.trace(a, x)
    states = a.state_dict(), b.state_dict()
    one, two = (WeightMatching(seed=7).match(*states, spec) for _ in range(2))
    assert one.objective == two.objective
    assert all(torch.equal(one.permutations[k], two.permutations[k]) for k in spec.groups)
    resumed = WeightMatching(one.permutations, seed=8).match(*states, spec)
    assert resumed.objective[0] == pytest.approx(one.objective[-1], rel=1e-9)
    first = WeightMatching(seed=7, max_sweeps=1).match(*states, spec)
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


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("include", "all", "include: expected one of 'weights', 'affine', 'statistics'; got 'all'"),
        ("max_sweeps", 0, "max_sweeps: expected a whole number of at least 1; got 0"),
        ("max_sweeps", -5, "max_sweeps: expected a whole number of at least 1; got -5"),
        ("max_sweeps", 2.5, "max_sweeps: expected a whole number of at least 1; got 2.5"),
        ("tolerance", float("nan"), "tolerance: expected a finite number of at least 0; got nan"),
        ("tolerance", -1e-9, "tolerance: expected a finite number of at least 0"),
        ("seed", -1, "seed: expected a whole number of at least 0; got -1"),
        ("seed", None, "seed: expected a whole number of at least 0; got None"),
        (
            "init",
            "placed",
            "init: expected one of 'greedy', 'identity', or permutations by names of groups; got 'placed'",
        ),
        (
            "init",
            None,
            "init: expected one of 'greedy', 'identity', or permutations by names of groups; got None",
        ),
        ("init", {"0": torch.zeros(24, dtype=torch.long)}, r"init\['0'\]: not a permutation"),
        ("init", {"0": torch.rand(24)}, r"init\['0'\]: expected integers of shape"),
        ("init", {"0": torch.zeros(2, 2, dtype=torch.long)}, r"init\['0'\]: expected integers of shape"),
    ],
)
def test_bad_options_are_named_by_the_constructor(option, value, message):
    with pytest.raises(ValueError, match=message):
        WeightMatching(**{option: value})


def test_an_init_that_does_not_fit_the_spec_is_refused():
    model, x = build("mlp", 0)
    spec = fm.PermutationSpec.trace(model, x)
    for init, message in [
        ({"0": torch.arange(3)}, r"init\['0'\]: expected 24 integers"),
        ({"9": torch.arange(24)}, "init: unknown group '9'"),
    ]:
        with pytest.raises(ValueError, match=message):
            WeightMatching(init).match(model, model, spec)


def test_an_init_is_copied_and_lists_are_taken():
    order = list(range(24))[::-1]
    given = {"0": order}
    matcher = WeightMatching(given)
    given.clear()
    assert isinstance(matcher.init, dict)
    assert torch.equal(matcher.init["0"], torch.tensor(order))
    start = torch.arange(24)
    matcher = WeightMatching({"0": start})
    start[:2] = torch.tensor([1, 0])
    assert isinstance(matcher.init, dict)
    assert torch.equal(matcher.init["0"], torch.arange(24))


@pytest.mark.parametrize("init", [{"g": "text"}, {"g": None}, {"g": ["a"]}, {3: torch.arange(4)}, 3])
def test_an_init_that_is_no_permutation_is_named(init):
    with pytest.raises(ValueError, match=r"^init(\['g'\])?: expected"):
        WeightMatching(init)


def test_weights_whose_squares_overflow_are_refused_by_name_and_just_smaller_ones_are_matched():
    torch.manual_seed(fresh_seed())
    a, b = (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double()
        for _ in "ab"
    )
    spec = fm.PermutationSpec.trace(a, torch.zeros(2, 4).double())
    expected = match_weights(a.state_dict(), b.state_dict(), spec).permutations
    with torch.no_grad():
        for model in (a, b):
            for p in model.parameters():
                p.mul_(1e140)
    found = match_weights(a.state_dict(), b.state_dict(), spec).permutations
    assert all(torch.equal(found[name], expected[name]) for name in spec.groups)
    with torch.no_grad():
        b[2].weight.mul_(1e20)
    with pytest.raises(ValueError, match=r"model_b: the squares of '2\.weight' add up to inf"):
        match_weights(a.state_dict(), b.state_dict(), spec)
