"""Several models: planted orders recovered, cycles closed, objectives that never fall."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import fastmatch as fm
from fastmatch.matching import pair_products
from fastmatch.matching.frank_wolfe import _gradient, _Relaxation, _relaxed, match_frank_wolfe
from fastmatch.matching.gains import Gains
from fastmatch.matching.merge_many import Totals, match_mean
from fastmatch.matching.pair_objective import moving
from fastmatch.matching.weights import match_weights
from fastmatch.permutations.apply import apply_permutations
from fastmatch.studies.digits import Batches
from helpers.networks import NETWORKS, build, fresh_seed
from helpers.trained import trained

STRATEGIES = {
    "to reference": fm.ToReference(),
    "chain": fm.Chain(),
    "merge many": fm.MergeMany(),
    "frank-wolfe": fm.FrankWolfe(),
}
IDENTITY = fm.WeightMatching(init="identity")


def planted_copies(count: int, seed: int):
    model, x = trained("mlp", seed)
    spec = fm.PermutationSpec.trace(model, x)
    generator = torch.Generator().manual_seed(seed)
    planted = [fm.Alignment(spec.random(generator), spec) for _ in range(count - 1)]
    return model, x, spec, planted


@pytest.mark.parametrize("how", STRATEGIES)
def test_planted_orders_are_recovered_and_merge_to_the_model(how):
    model, x, spec, planted = planted_copies(3, fresh_seed())
    models = [model, *(p.apply(model) for p in planted)]
    found = fm.align_many(models, x, STRATEGIES[how], spec=spec)
    for alignment, plant in zip(found[1:], planted, strict=True):
        for group, perm in alignment.permutations.items():
            assert torch.equal(perm, plant.invert().permutations[group]), group
    merged = fm.merge([f.apply(m) for f, m in zip(found, models, strict=True)])
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name])


def layers(*widths: int) -> nn.Sequential:
    linear = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*[part for layer in linear for part in (layer, nn.ReLU())][:-1])


@pytest.mark.parametrize("widths", [(2, 8, 200, 3), (8, 64, 128, 4), (1, 2, 50, 2)])
@pytest.mark.parametrize("strategy", [fm.MergeMany(), fm.FrankWolfe()], ids=lambda s: type(s).__name__)
def test_copies_are_found_where_a_narrow_layer_comes_before_a_wide_one(widths, strategy):
    """The mean of copies in other orders looks like none of them: rounds from there ended at two thirds of the objective."""
    seed = fresh_seed()
    torch.manual_seed(seed)
    model, x = layers(*widths), torch.randn(2, widths[0])
    spec = fm.PermutationSpec.trace(model, x)
    orders = [spec.random(torch.Generator().manual_seed(seed + k)) for k in range(2)]
    models = [model, *(fm.Alignment(p, spec).apply(model) for p in orders)]
    found = fm.align_many(models, x, strategy)
    for alignment, given in zip(found, models, strict=True):
        for name, tensor in alignment.apply(given).state_dict().items():
            torch.testing.assert_close(tensor, model.state_dict()[name])


def test_more_work_never_ends_lower():
    """Matched to the first model; rounds from there; and Frank-Wolfe, which knows what these found."""
    torch.manual_seed(fresh_seed())
    models, x = [layers(8, 32, 64, 4) for _ in range(3)], torch.randn(2, 8)
    spec = fm.PermutationSpec.trace(models[0], x)
    names = moving(models[0].state_dict(), spec, "affine")
    totals = []
    for strategy in (fm.ToReference(), fm.MergeMany(), fm.FrankWolfe()):
        orders = [a.permutations for a in fm.align_many(models, x, strategy)]
        totals.append(Totals([m.state_dict() for m in models], spec, orders, names).objective())
    assert totals[0] < totals[1] <= totals[2] * (1 + 1e-9)


@pytest.mark.grid
@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet"])
@pytest.mark.parametrize("how", STRATEGIES)
def test_every_cycle_is_the_identity_and_the_reference_stays(name, how):
    seed = fresh_seed()
    pairs = [build(name, seed + k) for k in range(3)]
    models, x = [m for m, _ in pairs], pairs[0][1]
    found = fm.align_many(models, x, STRATEGIES[how], reference=1)
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


@pytest.mark.grid
@pytest.mark.parametrize(
    ("match", "strategy"), [(match_mean, fm.MergeMany), (match_frank_wolfe, fm.FrankWolfe)]
)
@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet"])
def test_the_objective_never_falls_and_is_the_sum_over_pairs(match, strategy, name):
    seed = fresh_seed()
    pairs = [build(name, seed + k) for k in range(4)]
    states = [m.state_dict() for m, _ in pairs]
    spec = fm.PermutationSpec.trace(*pairs[0])
    found, matching = match(states, spec, strategy(replace(IDENTITY, seed=seed)))
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
    placed = [apply_permutations(s, spec, p) for s, p in zip(states, found, strict=True)]
    pairs = itertools.combinations(placed, 2)
    names = moving(states[0], spec, "affine")
    value = sum(float((one[n].double() * two[n].double()).sum()) for one, two in pairs for n in names)
    assert matching.objective[-1] == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("pairs_pay", [True, False], ids=["pairs", "mixtures"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", NETWORKS)
def test_steps_of_mixtures_are_the_relaxed_objective(name, dtype, error, pairs_pay, monkeypatch):
    """Value on the way, and gradient after it, against mixtures formed by products of matrices."""
    monkeypatch.setattr(pair_products, "FEATURES_A_PAIR", 0 if pairs_pay else math.inf)
    monkeypatch.setattr(pair_products, "SPACE", math.inf)
    seed = fresh_seed()
    pairs = [build(name, seed + k) for k in range(3)]
    spec = fm.PermutationSpec.trace(*pairs[0]).flat()
    states = [{n: t.to(dtype) for n, t in m.state_dict().items() if t.is_floating_point()} for m, _ in pairs]
    names = moving(states[0], spec, "affine")
    direct = [{n: s[n].double() for n in names} for s in states]
    relaxation = _Relaxation(states, spec, "affine")
    kept = [part for part in relaxation.parts if isinstance(part, pair_products.PairProducts)]
    assert bool(kept) == (pairs_pay and name != "grouped"), "its tensors have units in each group of channels"
    generator = torch.Generator().manual_seed(seed)
    for t in (0.25, 1.0, 0.5, 0.125):
        goals = [list(spec.random(generator).values()) for _ in states]
        ahead = relaxation.look(goals, [0.0, 0.3, 1.0])
        for point, value in zip((0.0, 0.3, 1.0), ahead, strict=True):
            maps = relaxation._at(goals, point)
            assert value == pytest.approx(float(_relaxed(direct, spec, maps)), rel=error, abs=error)
        relaxation.go(goals, t)
        for found, expected in zip(
            relaxation.gradients(), _gradient(direct, spec, relaxation.maps), strict=True
        ):
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x.double(), y, rtol=100 * error, atol=100 * error)


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet"])
def test_models_are_matched_again_only_where_others_moved_and_nothing_is_missed(name, monkeypatch):
    seed = fresh_seed()
    pairs = [build(name, seed + k) for k in range(4)]
    states = [m.state_dict() for m, _ in pairs]
    spec = fm.PermutationSpec.trace(*pairs[0])
    asked = []

    def match(a, b, spec, matcher, hooks=None, **options):
        if hooks is not None:  # and not one of the first matches
            asked.append(set(hooks.stale))
        return match_weights(a, b, spec, matcher, hooks, **options)

    monkeypatch.setattr("fastmatch.matching.merge_many.match_weights", match)
    found, matching = match_mean(states, spec, fm.MergeMany())
    assert matching.converged
    assert all(asked)
    assert sum(map(len, asked)) < matching.sweeps * len(states) * len(spec.top_level())
    again, repeated = match_mean(states, spec, fm.MergeMany(replace(IDENTITY, seed=seed)), start=found)
    assert repeated.sweeps == 1
    assert all(torch.equal(p[g], q[g]) for p, q in zip(found, again, strict=True) for g in spec.groups)


def test_the_cap_on_rounds_is_said():
    pairs = [build("mlp", k) for k in range(3)]
    states = [m.state_dict() for m, _ in pairs]
    spec = fm.PermutationSpec.trace(*pairs[0])
    _, matching = match_mean(states, spec, fm.MergeMany(max_rounds=1))
    assert (matching.sweeps, matching.converged) == (1, False)


@pytest.mark.parametrize("strategy", [fm.ToReference, fm.Chain])
def test_data_is_read_once_for_every_model_but_one(strategy):
    pairs = [build("mlp", k) for k in range(3)]
    data = Batches(torch.randn(40, 12), torch.zeros(40), 16)
    fm.align_many([m for m, _ in pairs], pairs[0][1], strategy(fm.ActivationMatching(data)))
    assert data.reads == 2


def test_bad_input():
    (a, x), (b, _) = build("mlp", 0), build("mlp", 1)
    for reference in (-1, True, 1.0):
        with pytest.raises(ValueError, match="reference: expected a whole number of at least 0"):
            fm.align_many([a, b], x, reference=reference)
    with pytest.raises(ValueError, match="reference: expected an index below 2"):
        fm.align_many([a, b], x, reference=2)
    assert fm.align_many([a, b], x, reference=np.int64(1))[1].moved == 0
    with pytest.raises(ValueError, match="models: expected at least two, got 1"):
        fm.align_many([a], x)
    with pytest.raises(
        ValueError, match=r"example_inputs: needed to trace the structure of models\[0\], unless spec"
    ):
        fm.align_many([a, b])
    with pytest.raises(ValueError, match=r"spec: models\[0\] is a state dict"):
        fm.align_many([a.state_dict(), b.state_dict()], x)
    for strategy, message in [
        ("star", "strategy: expected a strategy such as .* got 'star'"),
        (fm.Chain, "strategy: expected a strategy such as .* got the class Chain"),
        (
            fm.WeightMatching(),
            r"strategy: WeightMatching matches two models; write fm.ToReference\(matcher\)",
        ),
    ]:
        with pytest.raises(TypeError, match=message):
            fm.align_many([a, b], x, strategy)


def test_strategies_check_their_options():
    with pytest.raises(
        TypeError, match=r"matcher: expected fm.WeightMatching\(...\), got ActivationMatching"
    ):
        fm.FrankWolfe(fm.ActivationMatching([torch.zeros(2, 12)]))  # type: ignore[arg-type]
    for strategy in (fm.MergeMany, fm.FrankWolfe):
        with pytest.raises(ValueError, match="max_rounds: expected a whole number of at least 1; got 0"):
            strategy(max_rounds=0)
        with pytest.raises(ValueError, match=r"matcher: .* got init='greedy'"):
            strategy(fm.WeightMatching())
        with pytest.raises(ValueError, match=r"matcher: .* got init=permutations"):
            strategy(fm.WeightMatching(init={"0": torch.arange(3)}))
    with pytest.raises(ValueError, match="max_steps: expected a whole number of at least 1; got 0"):
        fm.FrankWolfe(max_steps=0)
    for strategy in (fm.ToReference, fm.Chain):
        with pytest.raises(TypeError, match=r"matcher: expected a matcher .* got 'weights'"):
            strategy("weights")
        with pytest.raises(TypeError, match="matcher: its data is read again for each pair"):
            strategy(fm.ActivationMatching(iter([torch.zeros(2, 12)])))
        with pytest.raises(TypeError, match="matcher: its data is read again for each pair"):
            strategy(fm.Mixture(fm.WeightMatching(), fm.ActivationMatching(iter([torch.zeros(2, 12)]))))


@pytest.mark.parametrize("how", STRATEGIES)
def test_every_model_that_moves_is_verified(how, monkeypatch):
    models, x = [build("mlp", k)[0] for k in range(3)], build("mlp", 0)[1]
    verified = []
    monkeypatch.setattr("fastmatch.matching.align_many.verify_spec", lambda model, *_: verified.append(model))
    fm.align_many(models, x, STRATEGIES[how], reference=1)
    assert verified == [models[0], models[2]]
    fm.align_many(models, x, STRATEGIES[how], verify=False)
    assert len(verified) == 2


def _orders_by_activations(models, x, matcher, **options):
    found = fm.align_many(models, x, fm.MergeMany(matcher, **options))
    return [a.permutations for a in found], found[0].matching


@pytest.mark.parametrize("name", ["mlp", "resnet", "encoder", "grouped"])
def test_gains_that_are_kept_between_rounds_change_no_result(name, monkeypatch):
    seed = fresh_seed()
    networks = [build(name, seed + k) for k in range(4)]
    spec = fm.PermutationSpec.trace(*networks[0])
    states = [model.state_dict() for model, _ in networks]
    followed = []
    follow = Gains.follow
    monkeypatch.setattr(Gains, "follow", lambda self, *args: followed.append(follow(self, *args)))
    kept, matching = match_mean(states, spec, fm.MergeMany())
    assert followed
    monkeypatch.setattr(Gains, "follow", lambda self, a, moved: self.__init__(a, self.b, self.spec, 2**30))
    fresh, other = match_mean(states, spec, fm.MergeMany())
    for one, two in zip(kept, fresh, strict=True):
        assert all(torch.equal(one[group], two[group]) for group in two)
    assert matching.objective == pytest.approx(other.objective, rel=1e-12)


def test_activations_of_all_pairs_find_the_best_order_of_three_small_networks():
    # Every order of the three units of two networks is tried.
    torch.manual_seed(fresh_seed())
    models = [
        torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)) for _ in range(3)
    ]
    x = torch.randn(40, 5)
    matcher = fm.ActivationMatching([x])
    permutations, matching = _orders_by_activations(models, x, matcher)
    spec = fm.PermutationSpec.trace(models[0], x)
    (group,) = spec.groups
    pairs = {
        (p, q): matcher.similarities(models[p], models[q], spec)[group]
        for p, q in itertools.combinations(range(3), 2)
    }

    def value(orders):
        return sum(float(s[orders[p], orders[q]].sum()) for (p, q), s in pairs.items())

    every = [torch.tensor(p) for p in itertools.permutations(range(3))]
    values = [value([every[0], one, two]) for one in every for two in every]
    found = value([p[group] for p in permutations])
    assert matching is not None
    assert matching.objective[-1] == pytest.approx(found)
    # No single model can be moved to a better place; such a place is among the best few of the 36.
    assert found >= max(value([permutations[0][group], one, permutations[2][group]]) for one in every) - 1e-9
    assert sorted(values, reverse=True).index(pytest.approx(found)) < 12
    assert torch.equal(permutations[0][group], torch.arange(3))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_the_similarity_of_all_pairs_never_falls_and_is_at_least_that_of_the_matches_to_the_reference(name):
    seed = fresh_seed()
    built = [build(name, seed + k) for k in range(4)]
    models, x = [m for m, _ in built], built[0][1]
    data = [torch.randn(24, *x.shape[1:]) for _ in range(2)]
    _permutations, matching = _orders_by_activations(models, x, fm.ActivationMatching(data))
    assert matching is not None
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(matching.objective[1:]))
    assert matching.converged
    # The order of the models' units to begin with changes nothing but the orders.
    spec = fm.PermutationSpec.trace(models[0], x)
    moved = fm.Alignment(spec.random(torch.Generator().manual_seed(seed)), spec)
    _again, other = _orders_by_activations(
        [models[0], moved.apply(models[1]), *models[2:]], x, fm.ActivationMatching(data)
    )
    assert other is not None
    assert other.objective[-1] == pytest.approx(matching.objective[-1], rel=1e-4)


def test_activations_for_many_are_refused_where_they_cannot_be_compared():
    model, x = build("mlp", 0)
    with pytest.raises(TypeError, match=r"matcher: its data is read again"):
        fm.MergeMany(fm.ActivationMatching(iter([x])))
    with pytest.raises(TypeError, match=r"matcher: expected fm.WeightMatching"):
        fm.MergeMany(fm.FisherMatching([(x, torch.zeros(len(x)))]))  # type: ignore[arg-type]
    states, spec = [model.state_dict(), model.state_dict()], fm.PermutationSpec.trace(model, x)
    strategy = fm.MergeMany(fm.ActivationMatching([x]))
    with pytest.raises(TypeError, match="model_a"):
        fm.align_many(states, spec=spec, strategy=strategy)


def test_products_of_pairs_are_kept_where_they_are_fast_and_take_little_memory():
    assert pair_products.pairs_pay(600, 784, 5), "the first layer of an MLP for digits"
    assert not pair_products.pairs_pay(600, 10, 5), "its last layer: a product is as fast"
    assert not pair_products.pairs_pay(4096, 270, 10), "3 GB for 44 MB of weights"
