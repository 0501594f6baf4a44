"""Alignments shared by several ranks: the same bits as of one. `make test` has two of them, `make nightly` three and four as well."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fastmatch as fm
from fastmatch._internal.ranks import ALONE, RanksError, current, deal
from fastmatch.matching.levels import levels_of
from fastmatch.matching.similarity import Similarity
from helpers.networks import VGG, ResNet, mlp
from helpers.ranked import on_ranks

SIZES = [pytest.param((1, 2), id="2"), pytest.param((1, 3, 4), id="3-4", marks=pytest.mark.slow)]


def pair(build, seed):
    torch.manual_seed(seed)
    first, second = build(), build()
    second.load_state_dict(
        {
            k: v if v.is_floating_point() is False else v + torch.rand_like(v)
            for k, v in second.state_dict().items()
        }
    )
    return first.eval(), second.eval()


def cases():
    """Name -> the two models, an example, and data of 30 samples."""
    found = {}
    for name, build, shape in (("mlp", mlp, (12,)), ("vgg", VGG, (3, 28, 28)), ("resnet", ResNet, (3, 8, 8))):
        models = pair(build, 3)
        data = torch.randn(30, *shape, generator=torch.Generator().manual_seed(1))
        found[name] = (*models, data[:2], data)
    return found


def match_many():
    """What MergeMany finds for four models whose weights are on a grid, so that rounding of gains would break ties otherwise."""
    torch.manual_seed(11)
    models = [mlp(40).eval() for _ in range(4)]
    with torch.no_grad():
        for parameter in (p for m in models for p in m.parameters()):
            parameter.copy_((parameter * 12).round() / 12)
    alignments = fm.align_many(models, torch.randn(2, 12), fm.MergeMany(), verify=False)
    orders = {f"{k} {g}": p for k, found in enumerate(alignments) for g, p in found.permutations.items()}
    return {**orders, "objective": alignments[0].matching.objective}


def align_all():
    """Everything that the ranks align, as tensors and numbers."""
    found = {("grid", "many"): match_many()}
    for name, (a, b, x, data) in cases().items():
        matched = fm.align(a, b, x, fm.WeightMatching(seed=2), verify=False)
        found[name, "weights"] = described(matched)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        torch.manual_seed(rank)  # the loaders of the ranks shuffle differently, as they would in a script
        dataset = TensorDataset(data)
        shuffled = DataLoader(
            dataset, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(rank)
        )
        choices: tuple[tuple[str, Similarity, Any], ...] = (
            ("list", "correlation", list(data.split(4))),
            ("shuffled", "batch-correlation", shuffled),
            ("cca", "cca", list(data.split(4))),
        )
        for kind, similarity, loader in choices:
            matcher = fm.ActivationMatching(loader, similarity=similarity)
            matched = fm.align(a, b, x, matcher, verify=False)
            found[name, kind] = described(matched)
        if torch.distributed.is_initialized():
            sampler = DistributedSampler(dataset, seed=5)
            sampler.set_epoch(2)
            matcher = fm.ActivationMatching(DataLoader(dataset, batch_size=4, sampler=sampler))
            matched = fm.align(a, b, x, matcher, verify=False)
            found[name, "sampler"] = described(matched)
        merged = fm.merge([a, matched.apply(b)])
        found[name, "merged"] = {k: v.clone() for k, v in merged.state_dict().items()}
    return found


def described(alignment):
    matching = alignment.matching
    assert all(p.dtype == torch.int64 for p in matching.permutations.values())
    return {
        **matching.permutations,
        "objective": matching.objective,
        "order": matching.order,
        "counts": (matching.sweeps, matching.solves, matching.skipped, matching.converged),
    }


def same(one, two):
    assert one.keys() == two.keys()
    for key, value in one.items():
        equal = torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key]
        assert equal, f"{key}: {value} and {two[key]}"


def repaired(loader):
    """What renormalization and a curve give on a loader, and how many samples this process ran."""
    a, b, _, _ = cases()["vgg"]
    found, ran = {}, [0]

    def forward(model, batch):
        ran[0] += len(batch[0])
        return model(batch[0])

    for method in ("rescale", "reset", "auto"):
        merged = fm.renormalize(fm.merge([a, b]), [a, b], loader, method, forward=forward)
        found |= {f"{method} {name}": tensor for name, tensor in merged.state_dict().items()}
        plan = fm.applied_plan(merged)
        assert plan is not None
        found[f"{method} plan"] = (plan.method, plan.scores)
    curve = fm.interpolate(a, b, loader, points=3, forward=forward)
    return {**found, "curve": torch.tensor([*curve.loss, *curve.accuracy])}, ran[0]


def scored():
    """The scores of a model on 100 batches, and how many of them this process ran."""
    model = cases()["mlp"][0]
    ran = []

    def forward(net, batch):
        ran.append(batch)
        return net(batch[0])

    generator = torch.Generator().manual_seed(6)
    sizes = [1 + k % 4 for k in range(100)]
    data = [
        (torch.randn(n, 12, generator=generator), torch.randint(3, (n,), generator=generator)) for n in sizes
    ]
    found = fm.score(model, data, metric=lambda out, _: out.square().mean(), forward=forward)
    return found, len(ran)


def unequal(rank):
    """Name -> a call of which one argument is another one on another rank."""
    a, b, x, _ = cases()["mlp"]
    spec = fm.PermutationSpec.trace(a, x)
    other = copy.deepcopy(b)
    with torch.no_grad():
        other[-1].bias[0] += float(rank)
    data = [(torch.ones(4, 12), torch.tensor([0, 1, 2, 0])), (torch.zeros(4, 12), torch.tensor([2, 1, 0, 0]))]
    merged = fm.merge([a, b])
    points, method = (3, "rescale") if rank == 0 else (4, "reshift")
    count = 1 + (rank == 0)
    loss = torch.nn.functional.cross_entropy if rank == 0 else torch.nn.functional.nll_loss
    return {
        "score, model": lambda: fm.score(other, data),
        "score, loss": lambda: fm.score(a, data, loss=loss),
        "score, data": lambda: fm.score(a, iter(data[:count])),
        "interpolate, model": lambda: fm.interpolate(a, other, data, 3),
        "interpolate, points": lambda: fm.interpolate(a, b, data, points),
        "statistics, models[1]": lambda: fm.endpoint_statistics([a, other], data),
        "statistics, samples": lambda: fm.endpoint_statistics([a, b], data, samples=4 + 4 * count),
        "renormalize, models[0]": lambda: fm.renormalize(other, [a], data, "rescale"),
        "renormalize, endpoints[1]": lambda: fm.renormalize(merged, [a, other], data, "rescale"),
        "renormalize, method": lambda: fm.renormalize(merged, [a, b], data, method),
        "renormalize, weights": lambda: fm.renormalize(merged, [a, b], data, "rescale", weights=[count, 1]),
        "match by weights, model_b": lambda: fm.WeightMatching().match(a, other, spec),
        "match by activations, model_b": lambda: fm.ActivationMatching(data).match(a, other, spec),
        "align, spec": lambda: fm.align(a, b, spec=spec.select([*spec.groups][:count])),
        "align_many, models[1]": lambda: fm.align_many([a, other], spec=spec),
        "align_many, strategy": lambda: fm.align_many([a, b], strategy=fm.MergeMany(max_rounds=count), spec=spec),
    }  # fmt: skip


def refusal(call):
    """The message of the ValueError of a call."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def work():
    """All that these tests look at, in one start of the processes."""
    ranks = current()
    found = {"aligned": align_all(), "errors": []}

    def fails(call):
        try:
            with ranks.together():
                call()
        except (RanksError, ValueError, OSError, TypeError) as error:
            found["errors"].append(f"{type(error).__name__}: {error}")
        else:
            found["errors"].append("none")

    def full_disk():
        if ranks.rank == ranks.size - 1:
            raise OSError("no space left")
        ranks.exchange(None, "here")

    a, b, x, data = cases()["mlp"]
    dataset = TensorDataset(cases()["vgg"][3], torch.arange(30) % 5)
    sampler = DistributedSampler(dataset, shuffle=False)
    found["scores"] = scored()
    fails(lambda: fm.score(a, [(data[ranks.rank :], torch.zeros(len(data) - ranks.rank).long())]))
    found["after data"] = repaired(DataLoader(dataset, batch_size=4, sampler=sampler))
    fails(full_disk)
    fails(lambda: ranks.exchange(None, "here" if ranks.rank == 0 else "there"))
    fails(lambda: fm.align(a, b, x, fm.WeightMatching(seed=ranks.rank), verify=False))
    batches = [data[ranks.rank :]]
    fails(lambda: fm.align(a, b, x, fm.ActivationMatching(batches), verify=False))
    fails(lambda: fm.align(a, b, x, fm.ActivationMatching(iter(batches)), verify=False))
    other = copy.deepcopy(b)
    with torch.no_grad():
        next(other.parameters())[0] += ranks.rank
    fails(lambda: fm.align(a, other, x, verify=False))
    found["unequal"] = [refusal(call) for call in unequal(ranks.rank).values()] if ranks.size > 1 else []
    with fm.alone():
        assert current() is ALONE
        found["alone"] = described(fm.align(a, b, x, fm.WeightMatching(seed=2), verify=False))
    found["after"] = ranks.exchange(ranks.rank, "after errors")
    return found


@pytest.fixture(scope="module", params=SIZES)
def results(request, tmp_path_factory):
    return on_ranks(tmp_path_factory.mktemp("ranks"), request.param, [work])[0]


def test_alignments_and_merges_have_the_same_bits_on_every_number_of_ranks(results):
    expected = results[1][0]["aligned"]
    for values in results.values():
        for value in values:
            assert value["aligned"].keys() == expected.keys()
            for key, one in expected.items():
                same(one, value["aligned"][key])


def test_ranks_find_by_weights_what_one_process_finds_without_a_process_group(results):
    expected = align_all()
    last = results[max(results)][-1]
    for key in (("mlp", "weights"), ("vgg", "weights"), ("resnet", "weights"), ("grid", "many")):
        same(expected[key], last["aligned"][key])
    same(expected["mlp", "weights"], last["alone"])


def test_ranks_share_the_data_of_a_renormalization_and_find_the_same_bits_on_every_number_of_ranks(results):
    dataset = TensorDataset(cases()["vgg"][3], torch.arange(30) % 5)
    expected, all_samples = repaired(DataLoader(dataset, batch_size=4))
    one, _ = results[1][0]["after data"]
    assert one.keys() == expected.keys()
    for name, value in expected.items():  # without a process group the batches are added one after the other
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(one[name], value, msg=name)
    for size, values in results.items():
        for value in values:
            same(one, value["after data"][0])
        # Outputs on the first samples are compared on every rank, for 3 methods and nothing.
        assert sum(value["after data"][1] for value in values) == all_samples + (size - 1) * 4 * 30


def test_ranks_share_an_evaluation_and_get_the_same_scores_on_every_number_of_ranks(results):
    alone, _ = scored()
    for size, values in results.items():
        assert {value["scores"][0] for value in values} == {results[1][0]["scores"][0]}
        ran = [value["scores"][1] for value in values]
        assert sum(ran) == 100
        assert max(ran) <= 100 // size + 2
    assert results[max(results)][0]["scores"][0] == pytest.approx(alone, rel=1e-12)


def test_an_error_on_one_rank_ends_the_others_with_rank_and_cause(results):
    for size in results.keys() - {1}:
        last = size - 1
        assert results[size][last]["errors"][1] == "OSError: no space left"
        for value in results[size][:last]:
            assert value["errors"][1] == f"RanksError: rank {last} failed: OSError: no space left"
        for value in results[size]:
            assert "all ranks must make the same calls" in value["errors"][2]
            assert value["after"] == list(range(size))  # the ranks are in step again


def test_ranks_that_are_given_different_things_are_told(results):
    for size in results.keys() - {1}:
        for value in results[size]:
            scores, _, _, seeds, batches, iterators, models = value["errors"]
            assert "do not read the same batches" in scores
            assert "matcher" in seeds
            assert "do not read the same batches" in batches
            assert "whose number is known" in iterators
            assert "model_b" in models
            assert "'0.weight'" in models


@pytest.mark.parametrize("name", list(unequal(0)))
def test_a_rank_that_is_given_another_model_or_option_is_named_by_all(results, name):
    number, argument = list(unequal(0)).index(name), name.rpartition(", ")[2]
    for size in results.keys() - {1}:
        (said,) = {value["unequal"][number] for value in results[size]}
        assert "ranks 0 and 1" in said
        assert argument in said
        if argument != "data":
            assert "fm.alone()" in said


def test_levels_keep_the_order_of_groups_that_share_a_tensor():
    edges = {"a": "bc", "b": "a", "c": "ad", "d": "c", "e": ""}
    levels = levels_of("badce", edges.__getitem__, {"a": 1, "b": 2, "c": 3, "d": 4, "e": 9}.__getitem__)
    assert levels == [["e", "d", "b"], ["a"], ["c"]]


def test_the_largest_tasks_are_dealt_first():
    assert deal([1.0, 5.0, 2.0, 2.0], 2) == [1, 0, 1, 1]
    assert deal([], 3) == []


def test_one_process_is_alone_and_calls_what_it_shares_itself():
    assert current() is ALONE
    assert ALONE.share([lambda: 1, lambda: 2], [0, 0], "") == [1, 2]
