"""Heads with their channels, experts with their hidden units: found by weights and by activations, and optimal."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from fastmatch._internal.modules import with_state
from fastmatch._internal.states import state_of
from fastmatch.assignment import bounded_gain
from fastmatch.matching import gains, nested
from fastmatch.matching.activations import ActivationMatching
from fastmatch.matching.nested import UnmovedGains, best_orders, match_nested
from fastmatch.matching.objective import objective
from fastmatch.matching.weights import WeightMatching
from fastmatch.permutations.apply import apply_permutations, compose, invert
from fastmatch.spec import Axis, Group, PermutationSpec
from helpers.networks import fresh_seed

HEADS, CHANNELS = 3, 3


def heads_of(shared: bool) -> PermutationSpec:
    """Values and outputs of attention; ``shared`` adds query heads inside each group of heads."""
    inside = 2 if shared else 1
    block = inside * CHANNELS
    axes = (Axis("value", 0, inner=CHANNELS), Axis("out", 1, inner=block))
    groups = {"heads": Group("heads", HEADS, axes)}
    for i in range(HEADS if shared else 0):
        places = (
            Axis("query", 0, start=i * inside * 4, inner=4),
            Axis("out", 1, start=i * block, inner=CHANNELS),
        )
        groups[f"query[{i}]"] = Group(f"query[{i}]", inside, places, "heads", i)
    if shared:
        groups["heads"] = Group("heads", HEADS, (*axes, Axis("query", 0, inner=inside * 4)))
    for i in range(HEADS):
        out = Axis("out", 1, i * block, inside, CHANNELS if shared else 0, 1)
        groups[f"value[{i}]"] = Group(
            f"value[{i}]", CHANNELS, (Axis("value", 0, start=i * CHANNELS), out), "heads", i
        )
    shapes = {"value": (HEADS * CHANNELS, 7), "out": (5, HEADS * block)}
    return PermutationSpec(groups, shapes | ({"query": (HEADS * inside * 4, 7)} if shared else {}))


def random_state(spec: PermutationSpec, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in spec.shapes.items()}


def every_permutation(spec: PermutationSpec):
    orders = [[torch.tensor(p) for p in itertools.permutations(range(g.size))] for g in spec.groups.values()]
    for chosen in itertools.product(*orders):
        yield dict(zip(spec.groups, chosen, strict=True))


@pytest.mark.parametrize("moved", [False, True])
def test_heads_are_solved_again_only_if_the_stream_that_was_placed_after_them_has_moved(moved):
    """Heads take all of their axes at once, when the stream is not placed yet."""
    spec, generator = heads_of(shared=False), torch.Generator().manual_seed(fresh_seed())
    stream = Group("stream", 7, (Axis("value", 1),))
    spec = PermutationSpec({**spec.groups, "stream": stream}, spec.shapes)
    a, planted = random_state(spec, generator), spec.identity()
    planted["stream"] = planted["stream"].roll(1) if moved else planted["stream"]
    found = WeightMatching().match(a, apply_permutations(a, spec, planted), spec)
    assert found.converged
    assert found.order[:2] == ("heads", "stream")
    stays = torch.equal(found.permutations["stream"], torch.arange(7))  # from wrong heads, it may
    assert (found.order.count("heads") > 1) == (moved and not stays)


@pytest.mark.slow
def test_one_family_is_matched_optimally():
    """All 6^4 arrangements of three heads with three channels each."""
    spec, generator = heads_of(shared=False), torch.Generator().manual_seed(fresh_seed())
    a, b = random_state(spec, generator), random_state(spec, generator)
    found = match_nested(a, b, spec, "heads", spec.groups["heads"].axes, spec.identity())
    best = max(objective(a, b, spec, p, "affine") for p in every_permutation(spec))
    assert objective(a, b, spec, found, "affine") == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("shared", [False, True])
def test_what_was_planted_is_found(shared):
    spec, generator = heads_of(shared), torch.Generator().manual_seed(fresh_seed())
    a, planted = random_state(spec, generator), spec.random(generator)
    b = apply_permutations(a, spec, planted)
    found = WeightMatching().match(a, b, spec)
    back = apply_permutations(b, spec, found.permutations)
    assert all(torch.equal(back[name], a[name]) for name in a)
    assert all(torch.equal(p, invert(planted, spec)[name]) for name, p in found.permutations.items())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("entries", [1, 30, 100])
def test_little_memory_gives_the_same(shared, entries, monkeypatch):
    spec, generator = heads_of(shared), torch.Generator().manual_seed(fresh_seed())
    a, b = random_state(spec, generator), random_state(spec, generator)
    args = a, b, spec, "heads", spec.groups["heads"].axes, spec.identity()
    found = match_nested(*args)
    monkeypatch.setattr(nested, "MAX_ENTRIES", entries)
    assert all(torch.equal(p, found[name]) for name, p in match_nested(*args).items())


@pytest.mark.parametrize("cosine", [1.0, 0.9, 0.0])
def test_pairs_that_the_bounds_leave_out_would_not_have_been_taken(cosine, monkeypatch):
    spec, generator = heads_of(shared=True), torch.Generator().manual_seed(fresh_seed())
    a, noise = random_state(spec, generator), random_state(spec, generator)
    b = {n: cosine * t + (1 - cosine**2) ** 0.5 * noise[n] for n, t in a.items()}
    b = apply_permutations(b, spec, spec.random(generator))
    solved = []
    inner = nested._solve_inner
    monkeypatch.setattr(
        nested,
        "_solve_inner",
        lambda *args: solved.append(args[4].stop - args[4].start) or inner(*args),
    )
    args = a, b, spec, "heads", spec.groups["heads"].axes, spec.identity()
    found, few = match_nested(*args), sum(solved)
    solved.clear()
    monkeypatch.setattr(nested, "TURNS", 0)
    every = match_nested(*args)
    assert all(torch.equal(p, found[name]) for name, p in every.items())
    assert sum(solved) == HEADS**2
    if cosine == 1.0:
        assert few == HEADS


def test_inverse_and_composition_of_what_lies_within():
    spec, generator = heads_of(shared=True), torch.Generator().manual_seed(fresh_seed())
    state, p, q = random_state(spec, generator), spec.random(generator), spec.random(generator)
    there = apply_permutations(state, spec, p)
    at_once = apply_permutations(state, spec, compose(p, q, spec))
    both = apply_permutations(there, spec, q)
    assert all(torch.equal(both[name], at_once[name]) for name in state)
    assert all(torch.equal(compose(p, invert(p, spec), spec)[n], i) for n, i in spec.identity().items())


def test_the_best_orders_of_every_pair_are_optimal():
    generator = torch.Generator().manual_seed(fresh_seed())
    gain = torch.randn(HEADS * 4, HEADS * 4, generator=generator, dtype=torch.float64)
    orders, optima = best_orders(gain, HEADS)
    for i, j in itertools.product(range(HEADS), repeat=2):
        block = gain[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
        values = [sum(block[k, p[k]] for k in range(4)) for p in itertools.permutations(range(4))]
        assert float(optima[i, j]) == pytest.approx(float(max(values)), rel=1e-12)
        assert float(block.gather(1, orders[i, j][:, None]).sum()) == pytest.approx(
            float(max(values)), rel=1e-12
        )


def test_selecting_without_the_outer_group_leaves_plain_ones():
    spec = heads_of(shared=True)
    assert all(not group.within for group in spec.flat().groups.values())
    some = spec.select(["heads", "value[0]", "value[1]", "value[2]", "query[0]"])
    assert some.groups["value[1]"].within == "heads"
    assert some.groups["query[0]"].within == ""
    assert PermutationSpec.from_json(spec.to_json()) == spec


transformers = pytest.importorskip("transformers")
from helpers.families import FAMILIES  # noqa: E402

BY_NAME = {family.name: family for family in FAMILIES}
PLANTED = ["BERT", "GPT-2", "GPT-NeoX", "Llama", "Phi-3", "Qwen-MoE", "DeepSeek-V2", "Swin", "T5", "Mamba"]


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_permutation_of_everything_is_found_by_weights(name):
    """Heads, head channels, KV groups, experts, hidden units and the residual stream at once, under some noise.

    Coordinate ascent may end elsewhere from one order of the groups; from one of five it does not.
    """
    seed = fresh_seed()
    family, generator = BY_NAME[name], torch.Generator().manual_seed(seed)
    model = family.build(seed)
    spec = PermutationSpec.trace(model, (), kwargs=family.inputs(generator))
    state = {k: v.detach() for k, v in state_of(model, "model").items()}
    planted = apply_permutations(state, spec, spec.random(generator))
    noisy = {
        k: v + 0.03 * v.std() * torch.randn(v.shape, generator=generator, dtype=v.dtype)
        if v.is_floating_point() and v.numel() > 1 else v
        for k, v in planted.items()
    }  # fmt: skip
    for order in range(5):
        found = WeightMatching(seed=order).match(state, noisy, spec, progress=False)
        assert list(found.objective) == sorted(found.objective)
        back = apply_permutations(planted, spec, found.permutations)
        if all(torch.equal(back[k], state[k]) for k in state):
            return
    pytest.fail(f"{[k for k in state if not torch.equal(back[k], state[k])]}")


@pytest.mark.parametrize("name", ["BERT", "GPT-NeoX", "Llama"])
def test_a_planted_permutation_of_everything_is_found_by_activations(name):
    seed = fresh_seed()
    family, generator = BY_NAME[name], torch.Generator().manual_seed(seed)
    model = family.build(seed)
    spec = PermutationSpec.trace(model, (), kwargs=family.inputs(generator))
    state = state_of(model, "model")
    moved = with_state(model, apply_permutations(state, spec, spec.random(generator)))
    data = [family.inputs(generator) for _ in range(12)]
    matcher = ActivationMatching(data, forward=lambda m, x: m(**x))
    found = matcher.match(model, moved, spec, progress=False)
    back = apply_permutations(state_of(moved, "moved"), spec, found.permutations)
    assert all(torch.equal(back[k], state[k]) for k in state)
    assert found.objective[1] > found.objective[0]


@pytest.mark.parametrize("cosine", [0.999, 0.9, 0.7, 0.0])
@pytest.mark.parametrize(("shared", "flat"), [(False, False), (False, True), (True, False)])
def test_bounds_spare_near_copies_most_products_and_give_the_same(shared, flat, cosine, monkeypatch):
    spec, generator = heads_of(shared), torch.Generator().manual_seed(fresh_seed())
    spec = replace(
        spec, shapes={n: tuple(500 if d in (5, 7) else d for d in s) for n, s in spec.shapes.items()}
    )
    a, noise = ({n: t.float() for n, t in random_state(spec, generator).items()} for _ in range(2))
    b = {n: cosine * t + (1 - cosine**2) ** 0.5 * noise[n] for n, t in a.items()}
    b = apply_permutations(b, spec, spec.random(generator))
    args = a, b, spec, "heads", spec.groups["heads"].axes, spec.identity()
    whole = match_nested(*args)
    monkeypatch.setattr(gains, "BOUNDED_UNITS", 2)
    monkeypatch.setattr(gains, "BOUNDED_PRODUCTS", 0)
    shares, solved, flat_shares = [], [], []
    match_flat = nested._OwnGains.match_flat

    def matched_flat(own):
        found, share = match_flat(own) if flat else None, own.bounds.share if own.bounds else 1.0
        flat_shares.extend([share] if found else [])
        return found

    monkeypatch.setattr(nested._OwnGains, "match_flat", matched_flat)
    largest, inner = nested._OwnGains.largest, nested._solve_inner
    monkeypatch.setattr(
        nested._OwnGains, "largest", lambda own: shares.append(own.bounds.share) or largest(own)
    )
    monkeypatch.setattr(
        nested, "_solve_inner", lambda *args: solved.append(args[4].stop - args[4].start) or inner(*args)
    )
    found = match_nested(*args)
    assert all(torch.equal(p, found[name]) for name, p in whole.items())
    if cosine > 0.99 and flat:  # all at once, and no pair of heads by itself
        assert max(flat_shares) < 0.3
        assert not shares
        assert not solved
    elif cosine > 0.99:
        assert shares
        assert max(shares) < 0.3
        assert sum(solved) == HEADS  # no pair but the planted ones
    if cosine == 0.0:
        assert not shares


@pytest.mark.parametrize("large", [False, True])
def test_what_no_other_group_moves_is_read_and_multiplied_once_and_changes_no_bit(large, monkeypatch):
    spec, generator = heads_of(shared=False), torch.Generator().manual_seed(fresh_seed())
    stream = Group("stream", 300, (Axis("value", 1),))
    shapes = {n: tuple(300 if d in (5, 7) else d for d in s) for n, s in spec.shapes.items()}
    spec = PermutationSpec({**spec.groups, "stream": stream}, shapes)
    a, b = ({n: t.float() for n, t in random_state(spec, generator).items()} for _ in range(2))
    if large:  # bounds are tried
        monkeypatch.setattr(gains, "BOUNDED_UNITS", 2)
        monkeypatch.setattr(gains, "BOUNDED_PRODUCTS", 0)
    read, solved, kept = [], [], UnmovedGains()
    cut, solve_all = nested._cut, nested._solve_all
    monkeypatch.setattr(nested, "_cut", lambda *args: read.append(args[4].parameter) or cut(*args))
    monkeypatch.setattr(
        nested, "_solve_all", lambda own, orders: solved.append(own._whole.clone()) or solve_all(own, orders)
    )
    for turn in range(3):
        others = {**spec.identity(), "stream": torch.randperm(300, generator=generator)}
        args = a, b, spec, "heads", spec.groups["heads"].axes, others
        read.clear()
        found = match_nested(*args, kept)
        assert sorted(read) == (["value"] if turn else ["out", "value"])
        whole = match_nested(*args)
        assert all(torch.equal(p, whole[name]) for name, p in found.items())
        assert torch.equal(solved[-1], solved[-2])
        heads = {**others, **spec.identity(), "stream": others["stream"]}
        moved = apply_permutations(b, spec, heads)
        exact = sum(
            x.double() @ y.double().T for x, y in ((a["value"], moved["value"]), (a["out"].T, moved["out"].T))
        )
        torch.testing.assert_close(
            solved[-1].transpose(1, 2).reshape(exact.shape).double(), exact, rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize("unmoved", [40, 500])
def test_nothing_is_kept_if_bounds_may_pay_in_a_later_solve(unmoved, monkeypatch):
    """The first 128 features tell whether bounds pay. Here they are those of A for one order of the stream."""
    spec, generator = heads_of(shared=False), torch.Generator().manual_seed(fresh_seed())
    stream = Group("stream", 500, (Axis("value", 1),))
    size = HEADS * CHANNELS
    shapes = {"value": (size, 500), "out": (unmoved, size)}
    spec = PermutationSpec({**spec.groups, "stream": stream}, shapes)
    a = {n: t.float() for n, t in random_state(spec, generator).items()}
    planted = torch.randperm(500, generator=generator)
    b = {"value": a["value"][:, planted.argsort()], "out": torch.randn(a["out"].shape, generator=generator)}
    monkeypatch.setattr(gains, "BOUNDED_UNITS", 2)
    monkeypatch.setattr(gains, "BOUNDED_PRODUCTS", 0)
    kept, axes = UnmovedGains(), spec.groups["heads"].axes
    for order in (torch.randperm(500, generator=generator), planted):
        others = {**spec.identity(), "stream": order}
        found = match_nested(a, b, spec, "heads", axes, others, kept)
        assert (kept.of("heads", axes) is None) == (unmoved < bounded_gain.JUDGED)
        whole = match_nested(a, b, spec, "heads", axes, others)
        assert all(torch.equal(p, whole[name]) for name, p in found.items())


def test_sums_that_find_no_room_are_not_kept(monkeypatch):
    monkeypatch.setattr(nested, "KEPT_BYTES", 100)
    kept, axes = UnmovedGains(), (Axis("out", 1),)
    kept.keep("large", axes, [torch.zeros(26)])
    kept.keep("small", axes, [torch.zeros(25)])
    kept.keep("small", axes, [torch.ones(25)])
    kept.keep("more", axes, [torch.zeros(1)])
    assert kept.of("large", axes) is kept.of("more", axes) is kept.of("small", ()) is None
    (found,) = kept.of("small", axes)
    assert not found.any()


def test_units_that_fit_best_in_other_heads_stay_in_theirs(monkeypatch):
    """Matched at once, units would go to two heads: so heads are matched with their units."""
    spec, generator = heads_of(False), torch.Generator().manual_seed(fresh_seed())
    spec = replace(spec, shapes={"value": (HEADS * CHANNELS, 400), "out": (400, HEADS * CHANNELS)})
    a = {n: t.float() for n, t in random_state(spec, generator).items()}
    moved = torch.arange(HEADS * CHANNELS)
    moved[[0, CHANNELS]] = moved[[CHANNELS, 0]]  # a unit of the first head and one of the second
    b = {"value": a["value"][moved], "out": a["out"][:, moved]}
    args = a, b, spec, "heads", spec.groups["heads"].axes, spec.identity()
    whole = match_nested(*args)
    monkeypatch.setattr(gains, "BOUNDED_UNITS", 2)
    monkeypatch.setattr(gains, "BOUNDED_PRODUCTS", 0)
    found, flat = [], nested._match_flat
    monkeypatch.setattr(nested, "_match_flat", lambda *args: found.append(flat(*args)))
    assert all(torch.equal(p, whole[name]) for name, p in match_nested(*args).items())
    assert found == [None]


def test_bounds_that_tell_too_little_are_finished(monkeypatch):
    """Copies in the features that predict what bounds cost, and nothing in common in the others."""
    spec, generator = heads_of(False), torch.Generator().manual_seed(fresh_seed())
    spec = replace(spec, shapes={"value": (HEADS * CHANNELS, 400), "out": (400, HEADS * CHANNELS)})
    a, b = ({n: t.float() for n, t in random_state(spec, generator).items()} for _ in range(2))
    b["value"][:, : bounded_gain.JUDGED] = a["value"][:, : bounded_gain.JUDGED]
    args = a, apply_permutations(b, spec, spec.random(generator)), spec, "heads"
    args = *args, spec.groups["heads"].axes, spec.identity()
    whole = match_nested(*args)
    monkeypatch.setattr(gains, "BOUNDED_UNITS", 2)
    monkeypatch.setattr(gains, "BOUNDED_PRODUCTS", 0)
    monkeypatch.setattr(nested._OwnGains, "match_flat", lambda own: None)
    finished = []
    finish = nested._OwnGains.finish
    monkeypatch.setattr(nested._OwnGains, "finish", lambda own: finished.append(own) or finish(own))
    found = match_nested(*args)
    assert finished
    assert all(torch.equal(p, whole[name]) for name, p in found.items())
