"""Curves and barriers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import build, fresh_seed

import fastmatch as fm
from fastmatch.data import Batches


def classify(count: int = 50) -> Batches:
    return Batches(torch.randn(count, 12), torch.randint(5, (count,)), 16)


def test_the_curve_is_what_plain_evaluation_says():
    seed = fresh_seed()
    (a, _), (b, _) = build("mlp", seed), build("mlp", seed + 1)
    data = classify()
    a.train()
    curve = fm.interpolate(a, b, data, points=5)
    assert a.training
    assert data.reads == 5
    assert curve.positions == (0.0, 0.25, 0.5, 0.75, 1.0)
    for position, loss, accuracy in zip(curve.positions, curve.loss, curve.accuracy, strict=True):
        middle = fm.merge([a, b], [1 - position, position]).eval()
        with torch.no_grad():
            out = middle(data.inputs)
        assert loss == pytest.approx(float(F.cross_entropy(out, data.targets)), rel=1e-5)
        assert accuracy == pytest.approx(float((out.argmax(1) == data.targets).float().mean()))
    assert curve.barrier == pytest.approx(max(0, max(curve.loss) - (curve.loss[0] + curve.loss[-1]) / 2))
    assert curve.midpoint == (curve.loss[2], curve.accuracy[2])


def test_barriers_of_known_curves():
    curve = fm.Curve((0.0, 0.5, 1.0), (1.0, 4.0, 2.0), (0.9, 0.2, 0.7))
    assert curve.barrier == 2.5
    assert curve.accuracy_barrier == pytest.approx(0.6)
    assert fm.Curve((0.0, 0.5, 1.0), (1.0, 0.5, 1.0), (0.5, 0.9, 0.5)).barrier == 0.0


def test_the_transform_changes_what_lies_between():
    (a, _), (b, _) = build("mlp", 0), build("mlp", 1)
    data = classify()
    seen = []

    def transform(model, weights):
        seen.append(weights)
        return a

    curve = fm.interpolate(a, b, data, points=4, transform=transform)
    assert [round(w, 3) for _, w in seen] == [0.333, 0.667]
    assert curve.loss[1] == curve.loss[2] == curve.loss[0]


def test_plot_writes_a_picture(tmp_path):
    curve = fm.Curve((0.0, 0.5, 1.0), (1.0, 4.0, 2.0), (0.9, 0.2, 0.7))
    ax = curve.plot(tmp_path / "curve.png", label="naive")
    curve.plot(ax=ax, metric="loss", label="again")
    assert len(ax.lines) == 2
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="metric: expected"):
        curve.plot(metric="f1")


def test_bad_input():
    model, _ = build("mlp", 0)
    with pytest.raises(ValueError, match="points: expected at least 3"):
        fm.interpolate(model, model, classify(), points=2)
    with pytest.raises(ValueError, match="yielded no batch"):
        fm.evaluate(model, [])
    with pytest.raises(ValueError, match="pairs to evaluate on"):
        fm.evaluate(model, [torch.randn(3, 12)])
    with pytest.raises(ValueError, match="got 3 parts"):
        fm.evaluate(model, [(1, 2, 3)])
