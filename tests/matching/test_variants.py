"""Fisher-weighted, straight-through and whitened matching: objectives as stated, planted permutations, reads, errors."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch

import fastmatch as fm
from fastmatch.matching.fisher import match_fisher
from fastmatch.permutations.alignment import Matching
from fastmatch.statistics.fisher import diagonal_fisher
from fastmatch.studies.digits import Batches, digits
from helpers.networks import build, fresh_seed
from helpers.trained import TRAINED, planted, trained


def random_fisher(state, generator):
    """Positive weights for every parameter, and none for buffers."""
    return {
        name: torch.rand(value.shape, generator=generator)
        for name, value in state.items()
        if value.is_floating_point() and "running" not in name
    }


def weighted_distance(a, b, f, g, spec):
    names = {axis.parameter for group in spec.groups.values() for axis in group.axes}
    return sum(
        float(((f[n].double() + g[n].double()) * (a[n].double() - b[n].double()).square()).sum())
        for n in names
        if n in f
    )


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet"])
def test_the_fisher_objective_is_the_negated_distance_and_never_falls(name):
    seed = fresh_seed()
    (one, x), (two, _) = build(name, seed), build(name, seed + 1)
    spec = fm.PermutationSpec.trace(one, x)
    a, b = one.state_dict(), two.state_dict()
    generator = torch.Generator().manual_seed(seed)
    f, g = random_fisher(a, generator), random_fisher(b, generator)
    found = match_fisher(a, b, spec, f, g, fm.WeightMatching(seed=seed))
    assert found.converged
    assert all(later >= earlier for earlier, later in itertools.pairwise(found.objective))
    moved = [fm.Alignment(found.permutations, spec).apply(dict(b)), *[dict(g)]]
    for group in spec.groups.values():  # the Fisher of B moves with its parameters
        assert len(found.permutations[group.name]) == group.size
    with_buffers = {**{n: torch.zeros(s) for n, s in spec.shapes.items()}, **g}
    moved[1] = fm.Alignment(found.permutations, spec).apply(with_buffers)
    scale = weighted_distance(a, b, f, g, spec)
    assert -found.objective[0] == pytest.approx(scale, rel=1e-6)
    assert -found.objective[-1] == pytest.approx(weighted_distance(a, moved[0], f, moved[1], spec), rel=1e-6)
    assert found.objective[-1] > found.objective[0]


@pytest.mark.parametrize("include", ["weights", "affine"])
def test_only_ratios_of_the_fisher_count(include):
    seed = fresh_seed()
    (one, x), (two, _) = build("vgg", seed), build("vgg", seed + 1)
    spec = fm.PermutationSpec.trace(one, x)
    a, b = one.state_dict(), two.state_dict()
    generator = torch.Generator().manual_seed(seed)
    f, g = random_fisher(a, generator), random_fisher(b, generator)
    found = match_fisher(a, b, spec, f, g, fm.WeightMatching(seed=seed, include=include))
    small = [{n: v * 2.0**-60 for n, v in x.items()} for x in (f, g)]
    again = match_fisher(a, b, spec, *small, fm.WeightMatching(seed=seed, include=include))
    assert all(torch.equal(again.permutations[k], p) for k, p in found.permutations.items())
    assert again.objective[-1] == pytest.approx(found.objective[-1] * 2.0**-60, rel=1e-6)
    if include == "weights":
        f, g = ({n: v for n, v in x.items() if v.ndim > 1} for x in (f, g))
    assert -found.objective[0] == pytest.approx(weighted_distance(a, b, f, g, spec), rel=1e-6)


class Tied(torch.nn.Module):
    """An embedding that is also the head."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(7, 12)
        self.hidden = torch.nn.Linear(12, 12)
        self.head = torch.nn.Linear(12, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(torch.relu(self.hidden(self.table(x))))


def test_tied_parameters_are_trained_as_one():
    torch.manual_seed(fresh_seed())
    one, two = Tied(), Tied()
    x, y = torch.randint(0, 7, (20,)), torch.randint(0, 7, (20,))
    found = fm.align(one, two, x, fm.StraightThrough(Batches(x, y, 10)))
    assert found.matching.objective[1] >= found.matching.objective[0]


@pytest.mark.parametrize("first", [-2.0, math.nan])
def test_the_outcome_of_training_says_whether_the_loss_fell(first):
    assert Matching({}, "StraightThrough", (first, -1.0)).outcome == "the loss fell"
    assert "weight matching's result is kept" in Matching({}, "StraightThrough", (first, first)).outcome


def test_an_equal_fisher_is_plain_weight_matching():
    seed = fresh_seed()
    (one, x), (two, _) = build("mlp", seed), build("mlp", seed + 1)
    spec = fm.PermutationSpec.trace(one, x)
    a, b = one.state_dict(), two.state_dict()
    ones = {n: torch.full_like(v, 0.5) for n, v in a.items()}
    plain = fm.align(one, two, None, fm.WeightMatching(seed=seed), spec=spec)
    found = match_fisher(a, b, spec, ones, ones, fm.WeightMatching(seed=seed))
    assert all(torch.equal(found.permutations[k], p) for k, p in plain.permutations.items())


@pytest.mark.grid
@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("matcher", [fm.FisherMatching, fm.StraightThrough])
def test_a_planted_permutation_is_recovered(name, matcher):
    seed = fresh_seed()
    model, x = trained(name, seed)
    train, _ = digits()
    data = Batches(*(part[:256] for part in next(iter_all(train))), 128)
    spec = fm.PermutationSpec.trace(model, x)
    planted = fm.Alignment(spec.random(torch.Generator().manual_seed(seed)), spec)
    ascent = fm.WeightMatching(seed=seed)
    if matcher is fm.FisherMatching:
        # Units on which the output does not hang weigh nothing: a floor keeps them apart.
        b = planted.apply(model).state_dict()
        f = {n: v + 1e-3 * v.mean() + 1e-9 for n, v in diagonal_fisher(model, data).items()}
        zeros = {n: torch.zeros(s) for n, s in spec.shapes.items()}
        g = {n: v for n, v in planted.apply({**zeros, **f}).items() if n in f}
        found = match_fisher(model.state_dict(), b, spec, f, g, ascent)
    else:
        found = fm.StraightThrough(data, epochs=1, projection=ascent).match(model, planted.apply(model), spec)
    for group, perm in found.permutations.items():
        assert torch.equal(perm, planted.invert().permutations[group]), group


def iter_all(batches):
    parts = list(batches)
    yield torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def test_straight_through_is_no_worse_than_weight_matching_and_reads_as_said():
    seed = fresh_seed()
    (one, x), (two, _) = trained("mlp", seed), trained("mlp", seed + 1)
    data, _ = digits()
    spec = fm.PermutationSpec.trace(one, x)
    for model in (one, two):
        model.zero_grad(set_to_none=True)  # what training left
    before = {n: v.clone() for model in (one, two) for n, v in model.state_dict().items()}
    data.reads = 0
    found = fm.StraightThrough(data, epochs=2, projection=fm.WeightMatching(seed=seed)).match(one, two, spec)
    assert data.reads == 5
    plain = fm.align(one, two, None, fm.WeightMatching(seed=seed), spec=spec)

    def midpoint_loss(permutations):
        aligned = fm.Alignment(permutations, spec).apply(two)
        return fm.evaluate(fm.merge([one, aligned]), data)[0]

    assert -found.objective[0] == pytest.approx(midpoint_loss(plain.permutations), rel=1e-5)
    assert -found.objective[1] == pytest.approx(midpoint_loss(found.permutations), rel=1e-5)
    assert found.objective[1] >= found.objective[0]
    after = {n: v for model in (one, two) for n, v in model.state_dict().items()}
    assert all(torch.equal(v, after[n]) for n, v in before.items())
    assert all(p.grad is None for model in (one, two) for p in model.parameters())


@pytest.mark.parametrize("name", ["mlp", "vgg"])
def test_whitened_similarity_is_its_formula(name):
    seed = fresh_seed()
    (one, x), (two, _) = build(name, seed), build(name, seed + 1)
    data = Batches(torch.randn(40, *x.shape[1:]), torch.zeros(40), 16)
    spec = fm.PermutationSpec.trace(one, x)
    rows: dict[str, list[torch.Tensor]] = {}

    class Kept:
        """Keeps the rows that the similarity is given."""

        def __init__(self):
            self.a, self.b = [], []
            rows[str(len(rows))] = [self]

        def update(self, a, b):
            self.a.append(a.double())
            self.b.append(b.double())

        def similarity(self):
            a, b = torch.cat(self.a), torch.cat(self.b)
            a, b = a - a.mean(0), b - b.mean(0)

            def whitener(x):
                cov = x.T @ x / len(x)
                cov = cov + 0.1 * cov.diagonal().mean() * torch.eye(len(cov), dtype=cov.dtype)
                values, vectors = torch.linalg.eigh(cov)
                return vectors @ torch.diag(values.rsqrt()) @ vectors.T

            return whitener(a) @ (a.T @ b / len(a)) @ whitener(b)

    from fastmatch.matching.similarity import ACCUMULATORS

    whitened = fm.ActivationMatching(data, similarity="cca")
    found = whitened.similarities(one, two, spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ACCUMULATORS, "cca", Kept)
        expected = whitened.similarities(one, two, spec)
    for group, gain in found.items():
        assert torch.allclose(gain, expected[group], atol=1e-5), group
        assert float(torch.linalg.matrix_norm(gain, 2)) <= 1 + 1e-6  # canonical correlations


@pytest.mark.parametrize("name", TRAINED)
def test_whitened_matching_undoes_a_planted_permutation(name):
    seed = fresh_seed()
    model, x, data, spec, hidden = planted(name, seed)
    other = hidden.apply(model)
    whitened = fm.ActivationMatching(data, similarity="cca")
    found = fm.align(model, other, x, whitened)
    assert data.reads == 1
    truth = hidden.invert().permutations
    gains = whitened.similarities(model, other, spec)
    for group, perm in found.permutations.items():
        units = torch.arange(len(perm))
        # Units that never fire are alike to the data; all others are found.
        alive = gains[group][units, truth[group]].abs() > 1e-6
        assert torch.equal(perm[alive], truth[group][alive]), group


@pytest.mark.parametrize("matcher", [fm.FisherMatching, fm.StraightThrough])
def test_align_takes_them_and_says_what_is_wrong(matcher):
    (one, x), (two, _) = build("mlp", 0), build("mlp", 1)
    data = Batches(torch.randn(20, *x.shape[1:]), torch.randint(0, 3, (20,)), 10)
    found = fm.align(one, two, x, matcher(data))
    assert found.matching is not None
    assert found.matching.matcher == matcher.__name__
    with pytest.raises(TypeError, match="data"):
        matcher()
    for option in ("activation_weight", "similarity"):
        with pytest.raises(TypeError, match=option):
            matcher(data, **{option: 0.5})
    with pytest.raises(ValueError, match=r"expected \(inputs, targets\) pairs"):
        fm.align(one, two, x, matcher([x, x]))
    for bad, message in [(3, "data: expected a loader"), (x, "data: .* got one tensor")]:
        with pytest.raises(TypeError, match=message):
            matcher(bad)
    with pytest.raises(TypeError, match=r"data: is read .* times, but an iterator"):
        matcher(batch for batch in data)
    state = one.state_dict()
    with pytest.raises(TypeError, match="model_a: expected a torch module"):
        fm.align(state, state, None, matcher(data), spec=fm.PermutationSpec.trace(one, x))


def test_options_out_of_range_are_named():
    data = [torch.zeros(2, 12)]
    for option, values in {
        "epochs": (0, -1, 1.5, True, "one"),
        "learning_rate": (0, -1, float("nan"), float("inf"), "fast"),
    }.items():
        for value in values:
            with pytest.raises(ValueError, match=f"{option}: expected a .*; got {value!r}"):
                fm.StraightThrough(data, **{option: value})
    with pytest.raises(TypeError, match="loss: expected a function"):
        fm.StraightThrough(data, loss="cross entropy")
    with pytest.raises(TypeError, match=r"projection: expected fm.WeightMatching\(...\), got 'weights'"):
        fm.StraightThrough(data, projection="weights")
    with pytest.raises(TypeError, match=r"ascent: expected fm.WeightMatching\(...\), got the class"):
        fm.FisherMatching(data, fm.WeightMatching)


def test_a_fisher_that_does_not_fit_is_named():
    one, x = build("mlp", 0)
    spec = fm.PermutationSpec.trace(one, x)
    state = one.state_dict()
    fisher = {n: torch.ones_like(v) for n, v in state.items()}
    name = next(iter(fisher))
    with pytest.raises(ValueError, match=f"fisher_b: expected weights of shape .* for '{name}', got nothing"):
        match_fisher(state, state, spec, fisher, {n: v for n, v in fisher.items() if n != name})
    with pytest.raises(ValueError, match=f"fisher_a: '{name}' holds negative numbers or NaN"):
        match_fisher(state, state, spec, {**fisher, name: -fisher[name]}, fisher)


def test_sampled_labels_give_the_fisher_information_itself():
    # Of a softmax regression it is known: F_c = mean over x of p_c (1 - p_c) x^2.
    torch.manual_seed(fresh_seed())
    model = torch.nn.Linear(4, 3).double()
    x = torch.randn(30, 4).double()
    p = model(x).softmax(1)[:, :, None].detach()
    expected = (p * (1 - p) * x[:, None].square()).mean(0)
    many = [x] * 400  # inputs alone
    found = diagonal_fisher(model, many, labels="sampled", seed=1)["weight"]
    torch.testing.assert_close(found, expected, rtol=0.1, atol=1e-3)
    again = diagonal_fisher(model, many, labels="sampled", seed=1)["weight"]
    assert torch.equal(found, again)
    wrong = torch.zeros(30, dtype=torch.long)  # of the data's labels it is another matrix
    assert not torch.allclose(diagonal_fisher(model, [(x, wrong)])["weight"], expected, rtol=0.2)


def test_a_sample_count_stops_the_fisher_there():
    torch.manual_seed(fresh_seed())
    model, x, y = torch.nn.Linear(4, 3), torch.randn(30, 4), torch.randint(0, 3, (30,))
    one = diagonal_fisher(model, [(x[:16], y[:16]), (x[16:], y[16:])], samples=20)
    other = diagonal_fisher(model, [(x[:20], y[:20])])
    torch.testing.assert_close(one["weight"], other["weight"])


def test_fisher_matching_takes_labels_and_samples_and_refuses_what_it_does_not_use():
    one, x = build("mlp", fresh_seed())
    data = [torch.randn(20, *x.shape[1:]) for _ in range(2)]
    plant = fm.PermutationSpec.trace(one, x)
    moved = fm.Alignment(plant.random(torch.Generator().manual_seed(0)), plant).apply(one)
    matcher = fm.FisherMatching(data, labels="sampled", samples=30, seed=3)
    found = fm.align(one, moved, x, matcher).apply(moved)
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, one.state_dict()[name])
    for option, value in {"labels": "theirs", "samples": 0, "seed": 1}.items():
        with pytest.raises(ValueError, match=option):
            fm.FisherMatching(data, **{option: value})  # type: ignore[arg-type]


def test_torch_does_not_tell_which_kernels_it_runs_sample_by_sample():
    """Attention, in torch 2.14. Warnings are errors here; those of the model's own are told."""

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = torch.nn.Linear(8, 8), torch.nn.Linear(8, 3)

        def forward(self, x):
            warnings.warn("of the model", stacklevel=1)
            h = self.inner(x)[:, None]
            return self.outer(torch.nn.functional.scaled_dot_product_attention(h, h, h)).mean((1, 2))

    with pytest.warns(UserWarning, match="of the model"):
        diagonal_fisher(Attention(), [(torch.randn(4, 5, 8), torch.tensor([0, 1, 2, 0]))])
