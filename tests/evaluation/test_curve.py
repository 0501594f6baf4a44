"""Curves and barriers."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import fastmatch as fm
from fastmatch.evaluation.plots import draw_panels
from fastmatch.studies.digits import Batches
from helpers.networks import build, fresh_seed


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


def test_points_may_be_a_numpy_scalar():
    model, _ = build("mlp", 0)
    curve = fm.interpolate(model, model, classify(), points=np.int64(3))
    assert all(type(position) is float for position in curve.positions)
    assert fm.triangle([model] * 3, classify(), points=np.int64(2)).weights[0] == (1.0, 0.0, 0.0)


def test_barriers_of_known_curves():
    curve = fm.Curve((0.0, 0.5, 1.0), (1.0, 4.0, 2.0), (0.9, 0.2, 0.7))
    assert curve.barrier == 2.5
    assert curve.accuracy_barrier == pytest.approx(0.6)
    assert fm.Curve((0.0, 0.5, 1.0), (1.0, 0.5, 1.0), (0.5, 0.9, 0.5)).barrier == 0.0


def test_a_curve_below_both_ends_has_no_rise():
    """Its barrier is half the difference of the ends, which was called a barrier like any other."""
    below = fm.Curve((0.0, 0.5, 1.0), (0.10, 0.05, 0.16))
    assert below.has_no_rise
    assert below.barrier == pytest.approx(0.03)
    above = fm.Curve((0.0, 0.5, 1.0), (0.10, 0.17, 0.16))
    assert not above.has_no_rise
    assert above.barrier == pytest.approx(0.04)
    assert fm.Curve((0.0, 0.5, 1.0), (0.1, 0.1, 0.1)).has_no_rise
    assert not fm.Curve((0.0, 0.5, 1.0), (0.1, float("nan"), 0.1)).has_no_rise
    mixed = fm.Triangle(
        ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
        tuple(fm.Scores(x, 0.5, 0.5, float("nan")) for x in (0.1, 0.2, 0.3)),
    )
    assert mixed.barrier == 0


def test_a_callable_replaces_the_merges_between_the_ends():
    (a, _), (b, _) = build("mlp", 0), build("mlp", 1)
    data = classify()
    seen = []

    def between(model, weights):
        seen.append(weights)
        return a

    curve = fm.interpolate(a, b, data, points=4, between=between)
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
    with pytest.raises(ValueError, match="metric: 'top5' was not measured"):
        curve.plot(metric="top5")


def test_a_curve_says_its_barrier_and_its_legend_hides_no_line():
    naive = fm.Curve((0.0, 0.5, 1.0), (1.0, 4.0, 2.0), (0.9, 0.2, 0.7))
    ax = naive.plot()
    assert ax.get_title(loc="left") == "Loss on the line from A to B, barrier 2.5"
    assert ax.get_legend() is None
    ax = naive.plot(metric="accuracy", label="naive")
    fm.Curve((0.0, 0.5, 1.0), (1.0, 1.0, 2.0), (0.9, 0.95, 0.9)).plot(
        ax=ax, metric="accuracy", label="aligned"
    )
    legend = ax.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        "naive: drop 60.0 points",
        "aligned: drop 0.0 points",
    ]
    ax.figure.draw_without_rendering()
    assert legend.get_window_extent().x0 >= ax.get_window_extent().x1
    table = fm.Table(({"x": 1, "y": 1.0, "z": 2.0}, {"x": 2, "y": 2.0, "z": 1.0}))
    ax = table.plot("x", "y", "z")
    ax.figure.draw_without_rendering()
    assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1
    assert table.plot("x", "y").get_legend() is None


def test_a_barrier_with_a_loss_that_is_no_number_is_no_number():
    nan = float("nan")
    assert np.isnan(fm.Curve((0.0, 0.5, 1.0), (1.0, nan, 2.0), (0.9, 0.2, 0.7)).barrier)
    corners = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    assert np.isnan(
        fm.Triangle(corners, (fm.Scores(1.0, 0, 0), fm.Scores(nan, 0, 0), fm.Scores(1.0, 0, 0))).barrier
    )


def test_a_triangle_has_the_names_of_its_models_and_no_hole():
    rows = tuple(((2 - i - j) / 2, i / 2, j / 2) for i in range(3) for j in range(3 - i))
    found = fm.Triangle(rows, tuple(fm.Scores(1 - max(row), 0.9, 0.9) for row in rows))
    ax = found.plot(names=["first", "second", "third"])
    assert [text.get_text() for text in ax.texts] == ["first", "second", "third"]
    assert ax.get_title(loc="left") == "Loss over the triangle, barrier 0.5"
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    middle = ax.transData.transform((0.5, 3**0.5 / 6))
    pixels = np.asarray(canvas.buffer_rgba())
    assert pixels[len(pixels) - int(middle[1]), int(middle[0]), :3].min() < 200
    with pytest.raises(ValueError, match="names: expected three"):
        found.plot(names=["first"])


@pytest.mark.parametrize("count", [1, 2])
def test_nothing_of_a_triangle_is_cut_off(tmp_path, monkeypatch, count):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, target, **_: (figures.append(self), target.touch()))
    rows = tuple(((2 - i - j) / 2, i / 2, j / 2) for i in range(3) for j in range(3 - i))
    found = fm.Triangle(rows, tuple(fm.Scores(1 - max(row), 0.9, 0.9) for row in rows))
    draw_panels(found.plot, ("loss", "accuracy")[:count], tmp_path / "t.png", (5, 4), is_row=True)
    (figure,) = figures
    figure.draw_without_rendering()
    panels = [ax for ax in figure.axes if ax.texts]  # the others are the bars of colours
    assert len(panels) == count
    for ax in panels:
        assert not any(points.get_clip_on() for points in ax.collections if len(points.get_offsets()) > 1)
        for text in (*ax.texts, ax._left_title):
            extent = text.get_window_extent()
            assert extent.x0 >= 0
            assert extent.y0 >= 0
            assert extent.x1 <= figure.bbox.x1
            assert extent.y1 <= figure.bbox.y1


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch, suffix):
    curve = fm.Curve((0.0, 0.5, 1.0), (1.0, 4.0, 2.0), (0.9, 0.2, 0.7), (1.0, 0.9, 1.0))
    path = tmp_path / f"curve.{suffix}"
    curve.plot(path, metric="top5")
    before = path.read_bytes()
    assert {"png": b"\x89PNG", "svg": b"<?xm", "pdf": b"%PDF"}[suffix] == before[:4]

    def broken(self, target, **options):
        target.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", broken)
    with pytest.raises(OSError, match="no space left"):
        curve.plot(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_cannot_be_drawn_is_said_before_drawing(tmp_path, monkeypatch):
    curve = fm.Curve((0.0, 0.5, 1.0), (1.0, 4.0, 2.0), (0.9, 0.2, 0.7))
    with pytest.raises(ValueError, match=r"path: expected a file ending in \.pdf, \.png, \.svg"):
        curve.plot(tmp_path / "curve.doc")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        curve.plot(tmp_path / "nowhere/curve.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = fm.Triangle(((1.0, 0.0, 0.0),), (fm.Scores(1.0, 0.5, 1.0),))
    for draw in (curve.plot, found.plot, lambda: curve.table().plot("position", "loss")):
        with pytest.raises(ImportError, match=r"pip install 'fastmatch\[plot\]'"):
            draw()


def test_bad_input():
    model, _ = build("mlp", 0)
    with pytest.raises(ValueError, match="points: expected a whole number of at least 3; got 2"):
        fm.interpolate(model, model, classify(), points=2)
    with pytest.raises(TypeError, match=r"between: expected None, .* got 'repair'"):
        fm.interpolate(model, model, classify(), between="repair")
    with pytest.raises(TypeError, match="between: expected None"):
        fm.triangle([model] * 3, classify(), between=fm.Renormalization("repair"))
    with pytest.raises(ValueError, match="method: expected one of"):
        fm.Renormalized(classify(), "fix")
    with pytest.raises(TypeError, match="statistics: expected an EndpointStatistics"):
        fm.Renormalized(classify(), "repair", [model, model])
    with pytest.raises(TypeError, match=r"models\[1\]: expected a torch module"):
        fm.triangle([model, model.state_dict(), model], classify())
    with pytest.raises(ValueError, match="yielded no batch"):
        fm.evaluate(model, [])
    with pytest.raises(ValueError, match="pairs to evaluate on"):
        fm.evaluate(model, [torch.randn(3, 12)])
    with pytest.raises(ValueError, match="got 3 parts"):
        fm.evaluate(model, [(1, 2, 3)])


def test_top5_and_the_curves_table():
    (a, _), (b, _) = build("mlp", fresh_seed()), build("mlp", fresh_seed())
    wide = torch.nn.Linear(5, 9)
    a, b = (torch.nn.Sequential(m, wide) for m in (a, b))
    data = Batches(torch.randn(50, 12), torch.randint(9, (50,)), 16)
    curve = fm.interpolate(a, b, data, points=3)
    with torch.no_grad():
        order = a.eval()(data.inputs).argsort(1, descending=True)[:, :5]
    among = float((order == data.targets[:, None]).any(1).float().mean())
    assert curve.top5[0] == pytest.approx(among)
    assert curve.table().column("top-5") == list(curve.top5)
    assert curve.table().column("top-1") == list(curve.accuracy)
    assert fm.score(a, data)[:3] == (curve.loss[0], curve.accuracy[0], curve.top5[0])


@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_a_renormalized_curve_calibrates_all_points_in_one_read(mode):
    seed = fresh_seed()
    (a, _), (b, _) = build("mlp", seed), build("mlp", seed + 1)
    data, calibration = classify(), classify(32)
    options = fm.Renormalization("repair", mode, 30)
    curve = fm.interpolate(a, b, data, points=5, between=fm.Renormalized(calibration, options))
    assert calibration.reads == 2  # the ends, then all points
    statistics = fm.endpoint_statistics([a, b], calibration, samples=30)
    calibration.reads = 0
    again = fm.interpolate(a, b, data, 5, between=fm.Renormalized(calibration, options, statistics))
    assert calibration.reads == 1
    assert again == curve
    one = fm.renormalize(fm.merge([a, b], [0.75, 0.25]), statistics, calibration, options)
    assert curve.loss[1] == pytest.approx(fm.evaluate(one, data)[0])


def test_a_renormalized_curve_checks_its_data_and_statistics():
    for data, message in [
        (None, "expected a loader or any iterable of batches, got NoneType"),
        ("abc", "got str"),
        (torch.zeros(2, 12), "got one tensor"),
        (iter([torch.zeros(2, 12)]), "is read 2 times"),
    ]:
        with pytest.raises(TypeError, match=f"data: .*{message}"):
            fm.Renormalized(data, "repair")
    model, _ = build("mlp", 0)
    statistics = fm.endpoint_statistics([model, model], classify())
    fm.Renormalized(iter([torch.zeros(2, 12)]), "repair", statistics)
    fm.Renormalized(iter([torch.zeros(2, 12)]), "reset")
    with pytest.raises(ValueError, match='statistics: method "reset" does not use'):
        fm.Renormalized(classify(), fm.Renormalization("reset"), statistics)


def test_the_triangle_of_three_models(tmp_path):
    seed = fresh_seed()
    models = [build("mlp", seed + k)[0] for k in range(3)]
    data = classify()
    found = fm.triangle(models, data, points=4)
    assert len(found.weights) == len(found.scores) == 10
    for weights, scores in zip(found.weights, found.scores, strict=True):
        assert sum(weights) == pytest.approx(1)
        assert scores.loss == pytest.approx(fm.evaluate(fm.merge(models, weights), data)[0], rel=1e-5)
    assert fm.triangle(models, data, 4, between=lambda merged, weights: merged) == found
    side = fm.interpolate(models[0], models[1], data, points=4)
    edge = [s.loss for w, s in zip(found.weights, found.scores, strict=True) if w[2] == 0]
    assert edge == pytest.approx(list(side.loss), rel=1e-5)
    corners = [fm.evaluate(m, data)[0] for m in models]
    rise = max(
        s.loss - sum(w * c for w, c in zip(row, corners, strict=True))
        for row, s in zip(found.weights, found.scores, strict=True)
    )
    assert found.barrier == pytest.approx(max(0.0, rise), rel=1e-4, abs=1e-6)
    assert found.table().columns == ["a", "b", "c", "loss", "top-1", "top-5"]
    found.plot(tmp_path / "triangle.png", metric="accuracy")
    assert (tmp_path / "triangle.png").read_bytes()[:4] == b"\x89PNG"
    calibration = classify(32)
    renewed = fm.triangle(models, data, points=3, between=fm.Renormalized(calibration, "repair"))
    assert calibration.reads == 2
    assert len(renewed.scores) == 6
    with pytest.raises(ValueError, match="models: expected three"):
        fm.triangle(models[:2], data)
    with pytest.raises(ValueError, match="points: expected a whole number of at least 2; got 1"):
        fm.triangle(models, data, points=1)
    with pytest.raises(ValueError, match="metric: expected"):
        found.plot(metric="f1")


def images() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images with a class for each pixel, some of them to be ignored."""
    targets = torch.randint(5, (6, 8, 8))
    targets[0, :4] = -100
    return [(torch.randn(4, 1, 8, 8), targets[:4]), (torch.randn(2, 1, 8, 8), targets[4:])]


@pytest.mark.parametrize("left_out", [[2, 3], [0, 1, 2, 3], [2, 3, 4, 5]])
def test_targets_that_are_left_out_have_no_part_in_the_means(left_out):
    """The batches have 4 and 2 samples; in one case nothing of a batch is left."""
    model, x, targets = torch.nn.Linear(3, 2).double(), torch.randn(6, 3).double(), torch.randint(2, (6,))
    targets[left_out] = -100
    kept = targets != -100
    found = fm.score(model, [(x[:4], targets[:4]), (x[4:], targets[4:])], metric=lambda out, y: len(out))
    whole = fm.score(model, [(x[kept], targets[kept])])
    assert found.loss == pytest.approx(whole.loss)
    assert found.accuracy == whole.accuracy
    sizes = [int(kept[:4].sum()), int(kept[4:].sum())]
    assert found.metric == pytest.approx((4 * sizes[0] + 2 * sizes[1]) / sum(sizes))
    with pytest.raises(ValueError, match="none with a target that is not -100"):
        fm.score(model, [(x, torch.full((6,), -100))])


@pytest.mark.parametrize(
    ("model", "data", "loss"),
    [
        (torch.nn.Conv2d(1, 5, 1), images(), None),
        (torch.nn.Linear(4, 1), [(torch.randn(6, 4), torch.randn(6, 1))], F.mse_loss),
        (torch.nn.Linear(4, 3), [(torch.randn(6, 4), torch.rand(6, 3))], F.binary_cross_entropy_with_logits),
        (
            torch.nn.Linear(4, 4),
            [(torch.randn(6, 4), torch.randint(2, (6,)))],
            lambda out, y: out.abs().mean(),
        ),
    ],
    ids=["segmentation", "regression", "several labels", "classes under another loss"],
)
def test_accuracy_is_measured_for_class_targets_alone(model, data, loss):
    found = fm.score(model, data, loss=loss)
    assert np.isfinite(found.loss)
    is_classes = data[0][1].ndim == 1
    assert np.isnan(found.accuracy) != is_classes
    assert np.isnan(found.top5) != is_classes
    curve = fm.interpolate(model, model, data, points=3, loss=loss, metric=lambda out, y: len(out))
    assert (curve.accuracy == ()) != is_classes
    assert curve.table().column("metric") == list(curve.metric)
    if not is_classes:
        with pytest.raises(ValueError, match="metric: 'accuracy' was not measured"):
            curve.plot(metric="accuracy")
        found = fm.triangle([model] * 3, data, points=2, loss=loss)
        with pytest.raises(ValueError, match="metric: 'accuracy' was not measured"):
            found.plot(metric="accuracy")
    else:
        assert curve.accuracy == (found.accuracy,) * 3


def test_positions_that_a_loss_ignores_do_not_weigh():
    model, data = torch.nn.Conv2d(1, 5, 1), images()
    with torch.no_grad():
        outputs = torch.cat([model(x) for x, _ in data])
        expected = F.cross_entropy(outputs, torch.cat([y for _, y in data])).item()
    assert fm.score(model, data).loss == pytest.approx(expected)


def test_a_metric_is_a_mean_over_samples():
    model, data = torch.nn.Linear(12, 5), classify()
    errors = fm.score(model, data, metric=lambda out, y: (out.argmax(1) != y).float().mean())
    assert errors.metric == pytest.approx(1 - errors.accuracy)
    assert (
        fm.evaluate(model, data, metric=lambda out, y: (out.argmax(1) != y).float().mean())[1]
        == errors.metric
    )


def test_a_picture_of_a_metric_says_no_barrier(tmp_path):
    """Whether more of a metric is better is not known, and what was not measured cannot be drawn."""
    measured = fm.Curve((0.0, 0.5, 1.0), (1.0, 2.0, 1.0), metric=(3.0, 9.0, 4.0))
    axes = measured.plot(tmp_path / "curve.png", metric="metric")
    assert axes.get_title(loc="left") == "Metric on the line from A to B"
    assert len(axes.collections) == 0
    assert measured.plot(metric="metric", label="mine").get_legend_handles_labels()[1] == ["mine"]
    with pytest.raises(ValueError, match="'accuracy' was not measured on this curve"):
        measured.plot(metric="accuracy")
    corners = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    nan = float("nan")
    found = fm.Triangle(corners, tuple(fm.Scores(v, nan, nan, 2 * v) for v in (1.0, 2.0, 3.0)))
    assert found.plot(metric="metric").get_title(loc="left") == "Metric over the triangle"
    with pytest.raises(ValueError, match="'top5' was not measured on this triangle"):
        found.plot(metric="top5")
    diverged = fm.Triangle(corners, (*found.scores[:2], fm.Scores(nan, nan, nan)))
    with pytest.raises(ValueError, match="'loss' has merges where it is no number"):
        diverged.plot()


def test_a_loss_or_metric_that_does_not_fit_is_named():
    model = torch.nn.Linear(12, 1)
    with pytest.raises(
        ValueError, match=r"loss: needed, because cross entropy does not fit outputs \(3, 1\)"
    ):
        fm.score(model, [(torch.randn(3, 12), torch.ones(3, 2))])
    for name in ("loss", "metric"):
        with pytest.raises(TypeError, match=f"{name}: expected a function"):
            fm.score(model, classify(), **{name: "mse"})
