"""``fastmatch score``, ``curve``, ``triangle``, ``layers`` and ``distances`` write what the library calls return."""

from __future__ import annotations

import csv
import json

import pytest
from matplotlib.figure import Figure

import fastmatch as fm
from fastmatch._internal.files import save_state
from fastmatch.cli.main import main

FILES = ["a.safetensors", "b.safetensors", "c.pt"]
MODEL = ["--model", "cli_module:build"]
DATA = ["--data", "cli_module:loader"]
CURVE = ["curve", "a.safetensors", "b.safetensors", *MODEL, *DATA, "--points", "5", "--out", "curve.csv"]


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_curve_writes_what_the_library_makes(models, loader, folder, capsys):
    options = ["--renormalize", "rescale", "--calibration", "cli_module:loader", "--plot", "curve.png"]
    assert main([*CURVE, *options]) == 0
    curve = fm.interpolate(*models[:2], loader, 5, between=fm.Renormalized(loader, "rescale"))
    rows = rows_of("curve.csv")
    assert [float(r["loss"]) for r in rows] == pytest.approx(list(curve.loss))
    assert [float(r["top-5"]) for r in rows] == pytest.approx(list(curve.top5))
    printed = capsys.readouterr().out
    assert f"loss barrier {curve.barrier:.4f}" in printed
    assert "; wrote curve.csv and curve.png" in printed
    assert (folder / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert main(CURVE) == 2
    assert "--force" in capsys.readouterr().err


def test_a_barrier_that_is_only_the_difference_of_the_ends_is_told(models, loader, capsys):
    for middle, told in ((2, True), (9, False)):
        curve = fm.Curve((0.0, 0.5, 1.0), (3.0, float(middle), 4.0))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastmatch.cli.work.evaluate.interpolate", lambda *_, c=curve, **__: c)
            assert main([*CURVE, "--force"]) == 0
        printed = capsys.readouterr().out
        assert f"loss barrier {curve.barrier:.4f}" in printed
        assert ("(half the difference of the ends: no merge has a higher loss than both)" in printed) is told


def test_a_picture_has_a_panel_for_each_measure(models, monkeypatch):
    shown, save = [], Figure.savefig

    def noted(self, *args, **options):
        shown.append([ax.get_title(loc="left").split(" ")[0] for ax in self.axes])
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", noted)
    line = [*MODEL, *DATA, "--points", "3", "--out", "o.csv", "--plot", "o.png", "--force"]
    assert main(["curve", *FILES[:2], *line]) == 0
    assert main(["triangle", *FILES, *line, "--metric", "torch.nn.functional:cross_entropy"]) == 0
    assert shown[0] == ["Loss", "Accuracy"]
    assert [title for title in shown[1] if title] == ["Loss", "Accuracy", "Metric"]


def test_score_prints_and_writes_what_the_library_measures(models, loader, capsys):
    expected = [fm.score(model, loader) for model in models]
    assert main(["score", *FILES, *MODEL, *DATA, "--out", "s.csv"]) == 0
    printed = capsys.readouterr().out
    for row, path, one in zip(rows_of("s.csv"), FILES, expected, strict=True):
        assert path in printed
        assert row["checkpoint"] == path
        found = [float(row[name]) for name in ("loss", "top-1", "top-5")]
        assert found == pytest.approx([one.loss, one.accuracy, one.top5])
        assert "metric" not in row
    assert (
        main(["score", FILES[2], *MODEL, *DATA, "--metric", "torch.nn.functional:cross_entropy", "--json"])
        == 0
    )
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["metric"] == pytest.approx(row["loss"]) == pytest.approx(expected[2].loss)


def test_triangle_layers_and_distances(models, loader, capsys):
    options = ["--points", "3", "--out", "t.csv", "--plot", "t.png"]
    assert main(["triangle", *FILES, *MODEL, *DATA, *options]) == 0
    found = fm.triangle(models, loader, points=3)
    assert len(rows_of("t.csv")) == len(found.table())
    assert f"loss barrier {found.barrier:.4f}" in capsys.readouterr().out
    assert main(["layers", *FILES, *MODEL, *DATA, "--endpoints", *FILES[:2], "--out", "l.csv"]) == 0
    table = fm.layer_table(dict(zip(FILES, models, strict=True)), loader, endpoints=FILES[:2])
    for row, expected in zip(rows_of("l.csv"), table.rows, strict=True):
        assert row["model"] == expected["model"]
        assert float(row["variance ratio"]) == pytest.approx(expected["variance ratio"])
    assert main(["distances", *FILES, "--out", "d.csv"]) == 0
    expected = fm.distances(dict(zip(FILES, models, strict=True)))
    assert [float(r["distance"]) for r in rows_of("d.csv")] == pytest.approx(expected.column("distance"))


@pytest.mark.parametrize("command", ["curve", "triangle", "layers"])
def test_without_an_output_the_table_is_printed_and_nothing_written(models, folder, capsys, command):
    before = sorted(folder.iterdir())
    points = [] if command == "layers" else ["--points", "3"]
    assert main([command, *FILES[: 2 if command == "curve" else 3], *MODEL, *DATA, *points]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("| ")
    assert "wrote" not in printed
    assert sorted(folder.iterdir()) == before


def test_layers_prints_the_columns_that_fit_a_terminal(models, capsys):
    line = ["layers", *FILES, *MODEL, *DATA, "--endpoints", *FILES[:2]]
    assert main(line) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    shown = ["model", "layer", "variance", "dead inputs", "variance ratio", "feature ratio"]
    assert [name.strip() for name in first.strip("|").split("|")] == shown
    assert last == "11 more columns: --out and --json have them"
    assert main([*line, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"][0]) == 17


@pytest.mark.parametrize(("arguments", "message"), [
    ([*CURVE, "--renormalize", "repair"], "--calibration: needed by --renormalize repair"),
    ([*CURVE, "--calibration", "cli_module:loader"], "--calibration: is an option of --renormalize"),
    ([*CURVE, "--mode", "joint"], "--mode: is an option of --renormalize"),
    ([*CURVE, "--samples", "50"], "--samples: is an option of --renormalize"),
    ([*CURVE, "--plot", "curve.txt"], "--plot: expected a file ending in"),
    ([*CURVE[:-1], "c.txt"], "--out: expected a file ending in .csv"),
    (["triangle", *FILES, *MODEL, *DATA, "--out", "t.csv", "--plot", "t.csv"], "--plot: t.csv is the same file as --out"),
    (["distances", *FILES, "--out", "d.txt"], "--out"),
    (["score", "a.safetensors", "nowhere.pt", *MODEL, *DATA], "nowhere.pt: no such file"),
    (["layers", *FILES, *MODEL, *DATA, "--endpoints", "z", "--out", "l.csv"], "--endpoints: z is not one of the checkpoints"),
])  # fmt: skip
def test_bad_input_is_one_line(models, refused, arguments, message):
    refused(arguments, message)


def test_distances_name_the_checkpoint_that_is_of_another_network(models, refused):
    save_state({"0.weight": models[0].state_dict()["0.weight"]}, "other.pt")
    refused(
        ["distances", "a.safetensors", "other.pt"],
        "distances: other.pt: has no tensor '0.bias', which a.safetensors has",
    )
