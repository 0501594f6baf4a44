"""``fastmatch curve``, ``triangle``, ``layers`` and ``distances`` write what the library calls return."""

from __future__ import annotations

import csv

import pytest

import fastmatch as fm
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
    assert f"loss barrier {curve.barrier:.4f}" in capsys.readouterr().out
    assert (folder / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert main(CURVE) == 2
    assert "--force" in capsys.readouterr().err


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


@pytest.mark.parametrize(("arguments", "message"), [
    ([*CURVE, "--renormalize", "repair"], "--calibration: needed by --renormalize repair"),
    ([*CURVE, "--calibration", "cli_module:loader"], "--calibration: is an option of --renormalize"),
    ([*CURVE, "--mode", "joint"], "--mode: is an option of --renormalize"),
    ([*CURVE, "--samples", "50"], "--samples: is an option of --renormalize"),
    ([*CURVE, "--plot", "curve.txt"], "--plot: expected a file ending in"),
    ([*CURVE[:-1], "c.txt"], "--out: expected a file ending in .csv"),
    (["triangle", *FILES, *MODEL, *DATA, "--out", "t.csv", "--plot", "t.csv"], "--plot: t.csv is the same file as --out"),
    (["distances", *FILES, "--out", "d.txt"], "--out"),
    (["layers", *FILES, *MODEL, *DATA, "--endpoints", "z", "--out", "l.csv"], "endpoints"),
])  # fmt: skip
def test_bad_input_is_one_line(models, refused, arguments, message):
    refused(arguments, message)
