"""What an alignment remembers of how it was found: certificates, the matcher as code, seconds."""

from __future__ import annotations

import pytest
import torch

import fastmatch as fm
from helpers.examples import namespace


@pytest.mark.parametrize("kind", ["weights", "activations", "fisher"])
def test_every_group_has_the_certificate_of_its_last_problem(kind):
    names = namespace()
    a, b, x, data = (names[key] for key in ("model_a", "model_b", "x", "loader"))
    matcher = {
        "weights": lambda: fm.WeightMatching(),
        "activations": lambda: fm.ActivationMatching(data),
        "fisher": lambda: fm.FisherMatching(data),
    }[kind]()
    found = fm.align(a, b, x, matcher)
    assert found.matching is not None
    assert found.matching.gaps.keys() == found.spec.groups.keys()
    assert all(gap <= bound for gap, bound in found.matching.gaps.values())
    assert found.seconds.keys() == {"trace", "verify", "match"}
    assert all(seconds >= 0 for seconds in found.seconds.values())


def test_an_alignment_shows_its_matcher_as_code():
    names = namespace()
    a, b, x, data = (names[key] for key in ("model_a", "model_b", "x", "loader"))
    assert fm.align(a, b, x).method == "WeightMatching()"
    spec = fm.PermutationSpec.trace(a, x)
    start = fm.WeightMatching(init=spec.identity(), max_sweeps=3)
    assert fm.align(a, b, x, start).method == "WeightMatching(init=..., max_sweeps=3)"
    mixed = fm.Mixture(fm.WeightMatching(seed=2), fm.ActivationMatching(data, similarity="covariance"))
    text = fm.align(a, b, x, mixed).method
    assert "weight_matching=WeightMatching(seed=2)" in text
    assert "ActivationMatching(data=..., similarity='covariance')" in text
    assert fm.Alignment(spec.identity(), spec).method == ""
    assert torch.equal(next(iter(spec.identity().values())), torch.arange(8))
