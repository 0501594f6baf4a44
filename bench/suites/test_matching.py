"""Suite ``matching``: weight matching to convergence and activation matching, against the published algorithms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.lib.nets import mlp, pair, vgg16
from bench.lib.paired import compare
from bench.lib.published import (
    activation_matching,
    activation_matching_by_layer,
    merge_many_torch,
    objective,
    weight_matching,
    weight_matching_torch,
)
from fastmatch.matching.activations import ActivationMatching
from fastmatch.matching.frank_wolfe import FrankWolfe
from fastmatch.matching.merge_many import MergeMany
from fastmatch.matching.pair_objective import sum_over_pairs
from fastmatch.matching.weights import WeightMatching
from fastmatch.permutations.apply import apply_permutations
from fastmatch.spec import PermutationSpec
from fastmatch.studies.digits import Batches

SIBLING = 0.95
"""Cosine between the tensors of a network and of its sibling, before its units are permuted: a fine-tuned model's."""


def sibling(a, spec):
    """Return a state near ``a``, with the units of all groups permuted."""
    g = torch.Generator().manual_seed(1)
    orders = {name: torch.randperm(group.size, generator=g) for name, group in spec.groups.items()}
    noise = (1 - SIBLING**2) ** 0.5
    near = {
        k: SIBLING * v + noise * v.square().mean().sqrt() * torch.randn(v.shape, generator=g)
        for k, v in a.items()
    }
    return apply_permutations(near, spec, orders)


def weights_row(benchmark, name, size, build, example, *, numpy_too, rounds, siblings=False):
    (one, two), spec, _ = pair(build, example)
    a, b = one.state_dict(), two.state_dict()
    if siblings:
        b = sibling(a, spec)

    def value(perms) -> float:
        wide = [{k: v.double().numpy() for k, v in s.items()} for s in (a, b)]
        return objective(*wide, spec, {k: np.asarray(v) for k, v in perms.items()})

    def check(peer, ours, theirs):
        theirs = theirs[0] if peer == "numpy float64" else theirs
        mine, other = value(ours.permutations), value(theirs)
        benchmark.extra_info.setdefault("objectives", {"fastmatch": mine})[peer] = other
        # The torch port ends by a float32 test of progress: a little early, or one sweep late.
        assert mine >= other * (1 - 1e-6), (peer, mine, other)

    peers = {"torch float32": lambda: weight_matching_torch(a, b, spec, 0)}
    if numpy_too:
        peers["numpy float64"] = lambda: weight_matching(a, b, spec, 0)
    found = compare(
        benchmark, suite="matching", instance=f"{name}, weights", size=size, peers=peers, check=check, rounds=rounds,
        ours=lambda: WeightMatching().match(a, b, spec, progress=False), neurons=sum(g.size for g in spec.groups.values()),
    )  # fmt: skip
    benchmark.extra_info.update(sweeps=found.sweeps, solves=found.solves, skipped=found.skipped)


@pytest.mark.widths(quick=(256, 512), full=(256, 512, 1024, 2048, 4096))
@pytest.mark.parametrize("siblings", [False, True])
def test_mlp_by_weights(benchmark, width, siblings):
    weights_row(
        benchmark, "MLP 3 x width" + ", siblings" * siblings, width, lambda: mlp(width), (2, 784),
        numpy_too=width <= 2048, rounds=3 if width <= 512 else 0, siblings=siblings,
    )  # fmt: skip


@pytest.mark.widths(quick=(100,), full=(300, 600))
@pytest.mark.parametrize("strategy", [MergeMany(), FrankWolfe()], ids=lambda s: type(s).__name__)
def test_many_by_weights(benchmark, width, strategy):
    """Five networks at once. Both find local optima: ours may not be worse by more than these differ among seeds."""
    torch.manual_seed(0)
    models = [mlp(width).eval() for _ in range(5)]
    spec = PermutationSpec.trace(models[0], torch.randn(2, 784))
    states = [m.state_dict() for m in models]

    def total(orders) -> float:
        placed = [apply_permutations(s, spec, o) for s, o in zip(states, orders, strict=True)]
        return float(sum_over_pairs([torch.cat([v.double().flatten() for v in s.values()]) for s in placed]))

    def check(peer, ours, theirs):
        mine, other = total([found.permutations for found in ours]), total(theirs)
        benchmark.extra_info.setdefault("objectives", {"fastmatch": mine})[peer] = other
        assert mine >= 0.98 * other, (peer, mine, other)

    compare(
        benchmark, suite="matching", instance=f"5 MLPs 3 x width, {type(strategy).__name__}", size=width, check=check,
        peers={"each to the mean, torch float32": lambda: merge_many_torch(states, spec, 0)}, rounds=0,
        ours=lambda: strategy.match(states, spec, progress=False),
        neurons=5 * sum(g.size for g in spec.groups.values()),
    )  # fmt: skip


@pytest.mark.widths(quick=(0.25,), full=(0.5, 1, 2, 4))
def test_vgg_by_weights(benchmark, width):
    weights_row(
        benchmark, "VGG16", int(512 * width), lambda: vgg16(width), (2, 3, 32, 32),
        numpy_too=width < 1, rounds=int(width < 0.5),
    )  # fmt: skip


@pytest.mark.widths(quick=(256,), full=(256, 512, 1024, 2048))
@pytest.mark.parametrize("name", ["MLP 3 x width", "VGG16"])
def test_by_activations(benchmark, name, width, quick):
    if name == "VGG16" and width > 1024:
        pytest.skip("minutes for the peer")
    build, example = {
        "MLP 3 x width": (lambda: mlp(width), (784,)),
        "VGG16": (lambda: vgg16(width / 512), (3, 32, 32)),
    }[name]
    models, spec, _ = pair(build, (2, *example))
    count = 4096 if name.startswith("MLP") else (64 if quick else 256)
    inputs = torch.randn(count, *example, generator=torch.Generator().manual_seed(1))
    data = Batches(inputs, torch.zeros(count, dtype=torch.long), count // 4)
    correlations: dict[str, torch.Tensor] = {}

    layers = {group: group for group in spec.groups}

    def one_pass():
        columns, found = activation_matching(*models, layers, (x for x, _ in data))
        correlations.update(found)
        return columns

    def a_pass_a_layer():
        return activation_matching_by_layer(*models, layers, lambda: (x for x, _ in data))[0]

    def forward_alone():
        """What any single pass costs before a statistic is taken: no row can be further ahead of this one."""
        with torch.no_grad():
            for x, _ in data:
                models[0](x), models[1](x)

    def check(peer, ours, theirs):
        for group, columns in (theirs or {}).items():
            similarity = correlations[group]
            rows = torch.arange(len(columns))
            mine, other = (
                float(similarity[rows, torch.as_tensor(c)].sum()) for c in (ours.permutations[group], columns)
            )
            assert mine >= other - 1e-4 * len(columns), (peer, group, mine, other)

    reads = data.reads
    ActivationMatching(data, site="pre").match(*models, spec, progress=False)
    passes = data.reads - reads
    compare(
        benchmark, suite="matching", instance=f"{name}, activations", size=width, check=check, rounds=3 if quick else 1,
        passes=passes, peers={
            "torch float64, one pass": one_pass, "torch float64, a pass a layer": a_pass_a_layer,
            "the forward passes alone": forward_alone,
        },
        ours=lambda: ActivationMatching(data, site="pre").match(*models, spec, progress=False),
        neurons=sum(g.size for g in spec.groups.values()),
    )  # fmt: skip
