"""Activation matching: planted permutations, one read of the data, every kind of similarity and reading."""

from __future__ import annotations

import threading
from typing import get_args

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

import fastmatch as fm
from fastmatch.matching.activations import best_permutation
from fastmatch.matching.batch_pearson import BatchPearson
from fastmatch.matching.similarity import Similarity
from fastmatch.matching.sites import Reduce, choose_sites, unit_columns
from fastmatch.spec import Axis
from fastmatch.spec.activation_sites import Site, SiteReader
from fastmatch.studies.digits import Batches, digits
from helpers.networks import NETWORKS, build, fresh_seed
from helpers.trained import TRAINED, planted, trained


@pytest.mark.parametrize("name", TRAINED)
def test_a_planted_permutation_of_a_trained_network_is_recovered(name):
    seed = fresh_seed()
    model, x, data, spec, hidden = planted(name, seed)
    permuted = hidden.apply(model)
    found = fm.align(model, permuted, x, fm.ActivationMatching(data))
    assert data.reads == 1
    # Units that never fire are all alike to the data: any order of them is a right answer.
    aligned = found.apply(permuted)
    dead = dead_units(model, spec, data)
    for group, perm in found.permutations.items():
        wrong = perm != hidden.invert().permutations[group]
        assert not bool((wrong & ~dead[group]).any()), group
    with torch.no_grad():
        torch.testing.assert_close(aligned(data.inputs), model(data.inputs), rtol=1e-4, atol=1e-4)


def dead_units(model, spec, data, place="post", reduce="last"):
    dead: dict[str, torch.Tensor] = {}

    def look(site, tensor):
        rows = unit_columns(tensor, site.axis, spec.groups[site.group].size)
        silent = rows.std(dim=0) == 0
        dead[site.group] = silent & dead.get(site.group, silent)

    sites = [t for g in spec.groups for t in choose_sites(spec, g, place, reduce)]
    with torch.no_grad(), SiteReader(sites, look, model, site=place):
        model(data.inputs)
    return dead


@pytest.mark.grid
@pytest.mark.parametrize("similarity", get_args(Similarity))
@pytest.mark.parametrize("site", get_args(Site))
@pytest.mark.parametrize("reduce", get_args(Reduce))
def test_every_variant_recovers_a_random_resnet(similarity, site, reduce):
    seed = fresh_seed()
    model, _ = build("resnet", seed)
    data = Batches(torch.randn(24, 3, 16, 16), torch.zeros(24), 10)  # the last batch is short
    spec = fm.PermutationSpec.trace(model, data.inputs[:2])
    planted = fm.Alignment(spec.random(), spec)
    matcher = fm.ActivationMatching(data, similarity, site, reduce)
    found = matcher.match(model, planted.apply(model), spec)
    if similarity == "correlation":  # self-similarity is largest there; elsewhere a louder unit may win
        dead = dead_units(model, spec, data, site, reduce)
        for group, perm in found.permutations.items():
            wrong = perm != planted.invert().permutations[group]
            assert not bool((wrong & ~dead[group]).any()), group
    assert found.objective[1] >= found.objective[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_can_be_matched_by_activations(name):
    model, x = build(name, fresh_seed())
    data = [torch.randn(50, *x.shape[1:]) for _ in range(2)]
    found = fm.align(model, model, x, fm.ActivationMatching(data))
    assert found.matching is not None
    assert found.permutations.keys() == found.spec.groups.keys()
    assert found.matching.matcher == "ActivationMatching"


def test_rows_follow_the_axis():
    tensor = torch.arange(2 * 24 * 3).reshape(2, 24, 3).float()
    rows = unit_columns(tensor, Axis("", 1, inner=4), 6)
    assert rows.shape == (2 * 3 * 4, 6)
    assert set(rows[:, 5].tolist()) == set(tensor[:, 20:24].flatten().tolist())
    rows = unit_columns(tensor, Axis("", 1, outer=4, stride=6), 6)
    assert set(rows[:, 5].tolist()) == set(tensor[:, 5::6].flatten().tolist())
    plain = torch.zeros(3, 4)
    kept = unit_columns(plain, Axis("", 1), 4)
    plain.fill_(1)  # the network writes in place afterwards
    assert float(kept.sum()) == 0


def test_bad_input():
    model, x = build("mlp", 0)
    spec = fm.PermutationSpec.trace(model, x)
    with pytest.raises(ValueError, match="yielded no batch"):
        fm.align(model, model, x, fm.ActivationMatching([]))
    with pytest.raises(ValueError, match=r"similarity: expected one of .* got 'cosine'"):
        fm.ActivationMatching([x], similarity="cosine")
    with pytest.raises(ValueError, match=r"site: expected one of .* got 'inside'"):
        fm.ActivationMatching([x], site="inside")
    with pytest.raises(ValueError, match=r"reduce: expected one of .* got 'mean'"):
        fm.ActivationMatching([x], reduce="mean")
    with pytest.raises(TypeError, match="forward: expected a function"):
        fm.ActivationMatching([x], forward=3)
    matcher = fm.ActivationMatching([x])
    with pytest.raises(ValueError, match="no place to read"):
        fm.align(model, model, None, matcher, spec=fm.PermutationSpec(spec.groups, spec.shapes))
    with pytest.raises(TypeError, match="model_a: expected a torch module, since it is run on data; got"):
        fm.align(model.state_dict(), model.state_dict(), None, matcher, spec=spec)
    with pytest.raises(TypeError, match="model_b: expected a torch module, since it is run on data; got"):
        fm.align(model, model.state_dict(), None, matcher, spec=spec)
    for data in (3, "digits", {"x": x}):
        with pytest.raises(TypeError, match="data: expected a loader"):
            fm.ActivationMatching(data)


def test_a_generator_is_read_for_one_pair():
    model, x = build("mlp", 0)
    matcher = fm.ActivationMatching(iter([x]))
    fm.align(model, model, x, matcher)
    with pytest.raises(ValueError, match="yielded no batch"):
        fm.align(model, model, x, matcher)


def test_batch_correlation_is_the_published_formula():
    generator = np.random.default_rng(fresh_seed())
    batches = [(generator.normal(3, 1, (n, 5)), generator.normal(-1, 2, (n, 4))) for n in (9, 9, 3)]
    moments = BatchPearson()
    for a, b in batches:
        moments.update(torch.from_numpy(a), torch.from_numpy(b))
    expected = np.zeros((5, 4))
    for i in range(5):
        for j in range(4):
            mean_a, mean_b = (np.mean([p[k][:, c].mean() for p in batches]) for k, c in ((0, i), (1, j)))
            std_a, std_b = (np.mean([p[k][:, c].std(ddof=1) for p in batches]) for k, c in ((0, i), (1, j)))
            product = np.mean([(a[:, i] * b[:, j]).mean() for a, b in batches])
            expected[i, j] = (product - mean_a * mean_b) / (std_a * std_b + 1e-4)
    np.testing.assert_allclose(moments.similarity().numpy(), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="needs two samples; a batch gave 1"):
        moments.update(torch.zeros(1, 5), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="no sample was read"):
        BatchPearson().similarity()


def test_batch_correlation_recovers_a_planted_permutation_in_one_read():
    seed = fresh_seed()
    model, x = trained("mlp", seed)
    data, _ = digits()
    data.size = 337  # equal batches
    spec = fm.PermutationSpec.trace(model, x)
    planted = fm.Alignment(spec.random(torch.Generator().manual_seed(seed)), spec)
    permuted = planted.apply(model)
    data.reads = 0
    aligned = fm.align(model, permuted, x, fm.ActivationMatching(data, "batch-correlation")).apply(permuted)
    assert data.reads == 1
    with torch.no_grad():
        torch.testing.assert_close(aligned(data.inputs), model(data.inputs), rtol=1e-4, atol=1e-4)


def test_data_that_is_no_loader_or_holds_nan():
    model, x = build("mlp", 0)
    with pytest.raises(TypeError, match="got one tensor"):
        fm.ActivationMatching(x)
    with pytest.raises(TypeError, match="got one pair of tensors"):
        fm.ActivationMatching((x, torch.zeros(len(x))))
    with pytest.raises(ValueError, match="data: activations of group '0' hold NaN"):
        fm.align(model, model, x, fm.ActivationMatching([torch.full((4, 12), float("nan"))]))


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet"])
def test_sequential_matching_earns_what_one_read_earns(name):
    # Permuting earlier layers leaves the function alone, so what later layers measure does not depend on it.
    seed = fresh_seed()
    (a, x), (b, _) = build(name, seed), build(name, seed + 1)
    data = [torch.randn(32, *x.shape[1:], dtype=torch.float64)]
    a, b = a.double(), b.double()
    spec = fm.PermutationSpec.trace(a, x.double())
    matcher, earned = fm.ActivationMatching(data), 0.0
    moved = b
    for group in spec.groups:
        found = matcher.match(a, moved, spec.select([group]))
        moved = fm.Alignment(found.permutations, spec.select([group])).apply(moved)
        earned += found.objective[1]
    assert matcher.match(a, b, spec).objective[1] == pytest.approx(earned, rel=1e-9)


@pytest.mark.parametrize("samples", [1, 5])
def test_samples_that_do_not_differ_are_refused(samples):
    model, x = build("mlp", fresh_seed())
    other, _ = build("mlp", fresh_seed())
    data = [x[:1].expand(samples, -1)]
    with pytest.raises(
        ValueError, match=r"data: the activations of no unit vary over the samples.*give more"
    ):
        fm.align(model, other, x, fm.ActivationMatching(data))


def test_groups_of_which_no_unit_varies_are_told():
    model, x = build("mlp", fresh_seed())
    other, _ = build("mlp", fresh_seed())
    spec = fm.PermutationSpec.trace(model, x)
    dead = list(spec.groups.values())[-1]  # nothing behind it is constant too
    with torch.no_grad():
        for axis in dead.axes:
            if axis.dim == 0:
                model.get_parameter(axis.parameter).zero_()
    matcher = fm.ActivationMatching([x])
    with pytest.warns(UserWarning, match=f"no unit vary in 1 of {len(spec.groups)} groups, .*{dead.name}"):
        found = matcher.match(model, other, spec)
    assert torch.equal(found.permutations[dead.name], torch.arange(dead.size))


@pytest.mark.parametrize("size", [0, 1, 7, 60])
def test_of_equally_good_permutations_one_leaves_more_units_alone(size):
    generator = torch.Generator().manual_seed(fresh_seed())
    alive = torch.rand(size, generator=generator, dtype=torch.float64) > 0.4
    rows = torch.randn(200, size, generator=generator, dtype=torch.float64) * alive
    gain = rows.T @ rows  # dead units are alike to all, alive ones most like themselves
    assert torch.equal(best_permutation(gain), torch.arange(size))
    # Few values, many ties, no planted identity: still the optimum.
    gain = torch.randint(-2, 3, (size, size), generator=generator).double()
    perm = best_permutation(gain)
    best = gain.numpy()[linear_sum_assignment(gain.numpy(), maximize=True)].sum()
    assert torch.equal(perm.sort().values, torch.arange(size))
    assert float(gain[torch.arange(size), perm].sum()) == best


def test_dead_units_of_a_model_matched_with_itself_stay():
    seed = fresh_seed()
    model, x = build("mlp", seed)
    with torch.no_grad():
        model.get_parameter("0.bias")[::3] = -100.0  # under a ReLU: never fires
    found = fm.align(model, model, x, fm.ActivationMatching([torch.randn(64, 12)]))
    assert torch.equal(found.permutations["0"], torch.arange(24))


def test_matching_and_merging_run_side_by_side_and_leave_torchs_threads(monkeypatch):
    from fastmatch_kernels._numba import parallel

    monkeypatch.setattr(parallel, "threads", lambda: 2)
    pairs = []
    for k in range(3):
        model, x = build("resnet", k)
        spec = fm.PermutationSpec.trace(model, x)
        generator = torch.Generator().manual_seed(k)
        permuted = fm.Alignment(spec.random(generator), spec).apply(model)
        data = [torch.randn(40, *x.shape[1:], generator=generator) for _ in range(2)]
        pairs.append((model, permuted, x, data))

    def whole(model, permuted, x, data):
        aligned = fm.align(model, permuted, x, fm.ActivationMatching(data)).apply(permuted)
        merged = fm.merge([model, aligned])
        return fm.renormalize(merged, [model, aligned], data).state_dict()

    alone = [whole(*pair) for pair in pairs]
    before = torch.get_num_threads()
    together = {}
    threads = [
        threading.Thread(target=lambda k=k: together.update({k: whole(*pairs[k])})) for k in range(len(pairs))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert torch.get_num_threads() == before
    for k, wanted in enumerate(alone):
        for name, tensor in wanted.items():
            torch.testing.assert_close(together[k][name], tensor)
