"""Every public dataclass compares and hashes: by value where its fields do, else by identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass

import pytest
import torch
from torch import nn

import fastmatch as fm
from fastmatch.statistics.moments import ChannelMoments, CrossMoments
from helpers.networks import build

DATA = [torch.zeros(2, 12)]


def _model() -> nn.Module:
    return build("mlp", 0)[0]


def _spec() -> fm.PermutationSpec:
    return fm.PermutationSpec.trace(_model(), build("mlp", 0)[1])


def _alignment() -> fm.Alignment:
    return fm.align(_model(), _model(), spec=_spec())


def _statistics() -> fm.EndpointStatistics:
    return fm.endpoint_statistics([_model(), _model()], [torch.randn(8, 12)])


def _weights() -> fm.WeightMatching:
    return fm.WeightMatching({"0": torch.arange(24)})


def _identity() -> fm.WeightMatching:
    return fm.WeightMatching("identity")


def _partial_merge() -> fm.PartialMerge:
    x = build("mlp", 0)[1]
    return fm.merge_partial([_model(), _model()], x, fm.Identity(), start_at=1)


def _report() -> fm.Report:
    return fm.merge_report(fm.merge([_model(), _model()]), [_model(), _model()])


BY_VALUE: dict[type, Callable[[], object]] = {
    fm.Axis: lambda: fm.Axis("w", 0),
    fm.Curve: lambda: fm.Curve((0.0, 1.0), (1.0, 1.0), (0.5, 0.5)),
    fm.Group: lambda: fm.Group("g", 3, (fm.Axis("w", 0),)),
    fm.Identity: fm.Identity,
    fm.ModelCost: lambda: fm.ModelCost(1, 2),
    fm.PermutationSpec: _spec,
    fm.Plan: lambda: fm.plan_renormalization(_model(), "repair"),
    fm.Renormalization: lambda: fm.Renormalization("repair", layers=["0"]),
    fm.Table: lambda: fm.Table(({"x": 1, "y": [2]},)),
    fm.Triangle: lambda: fm.Triangle(((1.0, 0.0, 0.0),), (fm.Scores(1.0, 0.5, 0.5),)),
    fm.Verification: lambda: fm.Verification(0.0, ("g",)),
}
BY_IDENTITY: dict[type, Callable[[], object]] = {
    fm.ActivationMatching: lambda: fm.ActivationMatching(DATA),
    fm.Alignment: _alignment,
    fm.Balanced: lambda: fm.balance(_model(), build("mlp", 0)[1]),
    fm.CCA: lambda: fm.CCA(DATA),
    fm.Chain: lambda: fm.Chain(_weights()),
    ChannelMoments: ChannelMoments,
    CrossMoments: CrossMoments,
    fm.EndpointStatistics: _statistics,
    fm.FisherMatching: lambda: fm.FisherMatching(DATA, _weights()),
    fm.FrankWolfe: lambda: fm.FrankWolfe(_identity()),
    fm.Matching: lambda: _alignment().matching,
    fm.MergeMany: lambda: fm.MergeMany(_identity()),
    fm.Mixture: lambda: fm.Mixture(_weights(), fm.ActivationMatching(DATA)),
    fm.Outcome: lambda: fm.Outcome(_model(), (), _report(), {}),
    fm.PartialMerge: _partial_merge,
    fm.Permute: lambda: fm.Permute(DATA),
    fm.Renormalized: lambda: fm.Renormalized(DATA, "repair", _statistics()),
    fm.Report: _report,
    fm.StraightThrough: lambda: fm.StraightThrough(DATA, projection=_weights()),
    fm.ToReference: lambda: fm.ToReference(_weights()),
    fm.WeightMatching: _weights,
    fm.Zip: lambda: fm.Zip(DATA),
}


def test_every_public_dataclass_is_here():
    public = {value for name in fm.__all__ if is_dataclass(value := getattr(fm, name))}
    assert public <= BY_VALUE.keys() | BY_IDENTITY.keys()


@pytest.mark.parametrize("kind", BY_VALUE)
def test_equal_values_are_equal(kind):
    one, other = BY_VALUE[kind](), BY_VALUE[kind]()
    assert type(one) is kind
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize("kind", BY_IDENTITY)
def test_what_holds_tensors_or_data_is_equal_to_itself_alone(kind):
    one, other = BY_IDENTITY[kind](), BY_IDENTITY[kind]()
    assert type(one) is kind
    assert one != other
    assert {one: 1}[one] == 1
