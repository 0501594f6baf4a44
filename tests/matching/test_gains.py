"""Gains that follow their neighbours are the gains built anew, in every architecture and for every kind of move."""

from __future__ import annotations

import pytest
import torch

import fastmatch as fm
from fastmatch.assignment import bounded_gain
from fastmatch.assignment.bounded_gain import BoundedGain
from fastmatch.matching import gains as gains_module
from fastmatch.matching.ascent import Hooks
from fastmatch.matching.gains import Gains, unit_rows
from fastmatch.matching.weights import WeightMatching, match_weights
from fastmatch.permutations.apply import apply_permutations, permute_tensor
from helpers.networks import NETWORKS, build, fresh_seed


def direct(a, b, spec, group, axes, perms):
    """The definition, in float64."""
    total = torch.zeros(group.size, group.size, dtype=torch.float64)
    for axis in axes:
        moved = permute_tensor(b[axis.parameter], axis.parameter, spec, perms, skip=axis)
        rows = (unit_rows(x, axis, group.size, torch.float64) for x in (a[axis.parameter], moved))
        total += next(rows) @ next(rows).T
    return total


def few_moves(perms, generator):
    """The permutations after a cycle of three units in one group."""
    names = list(perms)
    name = names[int(torch.randint(len(names), (1,), generator=generator))]
    picked = torch.randperm(len(perms[name]), generator=generator)[:3]
    perms[name] = perms[name].clone()
    perms[name][picked] = perms[name][picked.roll(1)]
    return perms


def two_states(name):
    """The spec of a network, two states of it, and a generator, from a seed that is printed."""
    seed = fresh_seed()
    (one, x), (two, _) = build(name, seed), build(name, seed + 1)
    spec = fm.PermutationSpec.trace(one, x)
    return spec, one.state_dict(), two.state_dict(), torch.Generator().manual_seed(seed)


def check_gains(gains, perms, turn):
    """Compare the gain of every group with the definition."""
    a, b, spec = gains.a, gains.b, gains.spec
    for group in spec.groups.values():
        axes = [x for x in group.axes if a[x.parameter].is_floating_point()]
        got = gains.of(group, axes, perms)
        want = direct(a, b, spec, group, axes, perms)
        scale = 1e-5 * float(want.abs().max() + 1)
        assert float((got.double() - want).abs().max()) <= scale, (group.name, turn)


@pytest.mark.parametrize("name", NETWORKS)
def test_followed_gains_are_the_gains(name, monkeypatch):
    monkeypatch.setattr(gains_module, "REBUILD_FRACTION", 2.0)  # update wherever an update is possible
    spec, a, b, generator = two_states(name)
    perms = spec.random(generator)
    gains = Gains(a, b, spec, budget=2**30)
    for turn in range(12):
        check_gains(gains, perms, turn)
        perms = spec.random(generator) if turn == 6 else few_moves(perms, generator)


@pytest.mark.parametrize("name", NETWORKS)
def test_gains_follow_another_a_whose_units_have_moved(name, monkeypatch):
    monkeypatch.setattr(gains_module, "REBUILD_FRACTION", 2.0)
    spec, first, b, generator = two_states(name)
    perms, order = spec.random(generator), spec.identity()
    gains = Gains(first, b, spec, budget=2**30)
    followed = 0
    for turn in range(12):
        check_gains(gains, perms, turn)
        if turn % 2:  # the next gains are updated on both sides
            perms = few_moves(perms, generator)
        now = spec.random(generator) if turn == 6 else few_moves(dict(order), generator)
        moved = {g: (now[g] != order[g]).nonzero().flatten() for g in now}
        gains.follow(apply_permutations(first, spec, now), moved)
        order = now
        followed += len(gains.kept)
    assert followed > 0 or all(
        any(spec.has_slices(x.parameter) for x in g.axes) for g in spec.groups.values()
    )


def test_gains_of_an_a_that_moved_a_lot_are_built_again():
    (one, x), (two, _) = build("mlp", 1), build("mlp", 2)
    spec = fm.PermutationSpec.trace(one, x)
    a, b = one.state_dict(), two.state_dict()
    gains = Gains(a, b, spec, budget=2**30)
    budget = gains.budget
    for group in spec.groups.values():
        gains.of(group, group.axes, spec.identity())
    gains.follow(a, {})
    assert gains.kept.keys() == spec.groups.keys()
    now = spec.random(torch.Generator().manual_seed(0))
    gains.follow(apply_permutations(a, spec, now), {g: torch.arange(len(p)) for g, p in now.items()})
    assert gains.kept == {}
    assert gains.budget == budget


def test_updates_are_taken_counted_and_end(monkeypatch):
    (one, x), (two, _) = build("mlp", 1), build("mlp", 2)
    spec = fm.PermutationSpec.trace(one, x)
    gains = Gains(one.state_dict(), two.state_dict(), spec, budget=2**30)
    built = []
    build_gain = gains._build
    monkeypatch.setattr(gains, "_build", lambda *args: built.append(1) or build_gain(*args))
    group = next(iter(spec.groups.values()))
    other = list(spec.groups)[1]
    perms = spec.identity()
    for _ in range(gains_module.MAX_UPDATES + 2):
        gains.of(group, group.axes, perms)
        perms = dict(perms)
        perms[other] = perms[other].clone()
        perms[other][:2] = perms[other][:2].flip(0)
    assert len(built) == 2  # the first, and one after so many updates


def test_what_does_not_fit_the_budget_is_built_each_time_and_gives_the_same_matching(monkeypatch):
    seed = fresh_seed()
    (one, x), (two, _) = build("resnet", seed), build("resnet", seed + 1)
    spec = fm.PermutationSpec.trace(one, x)
    a, b = one.state_dict(), two.state_dict()
    kept = match_weights(a, b, spec, WeightMatching(seed=seed))
    monkeypatch.setattr("fastmatch.matching.ascent.KEPT", 0)
    fresh = match_weights(a, b, spec, WeightMatching(seed=seed))
    assert kept.objective[-1] == pytest.approx(fresh.objective[-1], rel=1e-6)
    gains = Gains(a, b, spec, budget=0)
    group = next(iter(spec.groups.values()))
    gains.of(group, group.axes[:1], spec.identity())
    assert gains.kept == {}


def test_the_order_of_groups_can_be_given():
    (one, x), (two, _) = build("mlp", 1), build("mlp", 2)
    spec = fm.PermutationSpec.trace(one, x)
    a, b = one.state_dict(), two.state_dict()
    forward = match_weights(a, b, spec, hooks=Hooks(orders=iter([[0, 1]] * 100)))
    backward = match_weights(a, b, spec, hooks=Hooks(orders=iter([[1, 0]] * 100)))
    assert forward.converged
    assert backward.converged
    assert forward.objective[1] != backward.objective[1]
    ended = match_weights(a, b, spec, hooks=Hooks(orders=iter([[0, 1]])))
    assert ended.objective == forward.objective[:2]
    assert not ended.converged


def near_copy(state, cosine, generator):
    """The state, with noise of the same size added to every tensor."""
    noise = {
        n: torch.randn(t.shape, generator=generator) * t.std() for n, t in state.items() if t.numel() > 1
    }
    return {n: cosine * t + (1 - cosine**2) ** 0.5 * noise[n] if n in noise else t for n, t in state.items()}


@pytest.fixture
def bounds(monkeypatch):
    """Bounds for every group, however small; the list of gains that had them."""
    monkeypatch.setattr(gains_module, "BOUNDED_UNITS", 2)
    monkeypatch.setattr(gains_module, "BOUNDED_PRODUCTS", 0)
    monkeypatch.setattr(gains_module, "PAYING_SHARE", 0.6)
    monkeypatch.setattr(bounded_gain, "JUDGED", 8)
    used: list[BoundedGain] = []
    init = BoundedGain.__init__
    monkeypatch.setattr(BoundedGain, "__init__", lambda self, *args: init(self, *args) or used.append(self))
    return used


@pytest.mark.grid
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("cosine", [1.0, 0.99, 0.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_gains_with_bounds_give_the_matching_of_whole_gains(name, cosine, on_disk, bounds, monkeypatch):
    seed = fresh_seed()
    model, x = build(name, seed)
    spec = fm.PermutationSpec.trace(model, x)
    generator = torch.Generator().manual_seed(seed)
    a = {n: t.detach() for n, t in model.state_dict().items()}
    b = apply_permutations(near_copy(a, cosine, generator), spec, spec.random(generator))
    hooks = Hooks(out_of_core=on_disk, in_blocks=on_disk)
    found = match_weights(a, b, spec, WeightMatching(seed=seed), hooks)
    assert bounds or cosine < 0.9
    monkeypatch.setattr(gains_module, "BOUNDED_UNITS", 1 << 40)
    whole = match_weights(a, b, spec, WeightMatching(seed=seed), hooks)
    assert all(torch.equal(p, whole.permutations[n]) for n, p in found.permutations.items())
    assert found.objective == pytest.approx(whole.objective, rel=1e-9)


def test_a_group_whose_bounds_have_cost_a_whole_gain_is_built_and_kept(bounds):
    model, x = build("mlp", 1)
    spec, state = fm.PermutationSpec.trace(model, x), model.state_dict()
    gains = Gains(state, state, spec, budget=2**30)
    group = list(spec.groups.values())[1]
    for share in (0.5, 0.5):
        assert isinstance(gains.cost_of(group, group.axes, spec.identity()), BoundedGain)
        gains.spend(group.name, share)
    assert isinstance(gains.cost_of(group, group.axes, spec.identity()), torch.Tensor)
    assert group.name in gains.kept
