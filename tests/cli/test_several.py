"""The commands on several checkpoints write what the library calls return."""

from __future__ import annotations

import csv
import sys

import pytest
import torch

import fastmatch as fm
from fastmatch._internal.files import load_state, save_state
from fastmatch.cli.main import build_model, main
from helpers.networks import fresh_seed

MODULE = """
import torch
from torch import nn

def build():
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 7))
    return net, torch.zeros(2, 6)

def loader():
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(20, 6, generator=g), torch.randint(7, (20,), generator=g)) for _ in range(2)]
"""
FILES = ["a.safetensors", "b.safetensors", "c.pt"]
MODEL = ["--model", "several_module:build"]
DATA = ["--data", "several_module:loader"]


@pytest.fixture
def models(tmp_path, monkeypatch):
    torch.manual_seed(fresh_seed())
    (tmp_path / "several_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    found = [build_model("several_module:build")[0].eval() for _ in FILES]
    for path, model in zip(FILES, found, strict=True):
        save_state(model.state_dict(), path)
    yield found
    sys.modules.pop("several_module", None)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("options", [["--how", "mean"], ["--how", "universe"], ["--how", "chain", *DATA]])
def test_align_many(models, options, capsys):
    assert main(["align-many", *FILES, *MODEL, *options, "--out", "b2.safetensors", "c2.safetensors"]) == 0
    assert capsys.readouterr().out.count("wrote") == 2
    data = sys.modules["several_module"].loader() if "--data" in options else None
    identity = fm.WeightMatching(init="identity")
    strategy = {
        "mean": lambda: fm.MergeMany(identity),
        "universe": lambda: fm.FrankWolfe(identity),
        "chain": lambda: fm.Chain(fm.ActivationMatching(data)),
    }[options[1]]()
    found = fm.align_many(models, torch.zeros(2, 6), strategy)
    for alignment, model, path in zip(
        found[1:], models[1:], ["b2.safetensors", "c2.safetensors"], strict=True
    ):
        expected = alignment.apply(model).state_dict()
        assert all(torch.equal(expected[k], v) for k, v in load_state(path).items())


@pytest.mark.parametrize("biases", ["average", "normalize", "remove"])
def test_merge(models, biases):
    weights = ["--weights", "0.5", "0.25", "0.25"]
    assert main(["merge", *FILES, *MODEL, *weights, "--biases", biases, "--out", "m.safetensors"]) == 0
    alphas = [0.5, 0.25, 0.25]
    expected = {
        "average": lambda: fm.merge(models, alphas),
        "normalize": lambda: fm.merge(models, alphas, biases="normalize"),
        "remove": lambda: fm.remove_biases(fm.merge(models, alphas)),
    }[biases]()
    found = load_state("m.safetensors")
    assert all(torch.equal(found[k], v) for k, v in expected.state_dict().items())


def test_triangle_layers_and_distances(models, capsys):
    data = sys.modules["several_module"].loader()
    assert (
        main(["triangle", *FILES, *MODEL, *DATA, "--points", "3", "--out", "t.csv", "--plot", "t.png"]) == 0
    )
    found = fm.triangle(models, data, points=3)
    assert len(rows_of("t.csv")) == len(found.table())
    assert f"loss barrier {found.barrier:.4f}" in capsys.readouterr().out
    assert main(["layers", *FILES, *MODEL, *DATA, "--endpoints", *FILES[:2], "--out", "l.csv"]) == 0
    table = fm.layer_table(dict(zip(FILES, models, strict=True)), data, endpoints=FILES[:2])
    for row, expected in zip(rows_of("l.csv"), table.rows, strict=True):
        assert row["model"] == expected["model"]
        assert float(row["variance ratio"]) == pytest.approx(expected["variance ratio"])
    assert main(["distances", *FILES, "--out", "d.csv"]) == 0
    expected = fm.distances(dict(zip(FILES, models, strict=True)))
    assert [float(r["distance"]) for r in rows_of("d.csv")] == pytest.approx(expected.column("distance"))


def test_bad_input_is_one_line_and_nothing_is_written(models, tmp_path, capsys):
    before = sorted(p.name for p in tmp_path.iterdir())
    for arguments, message in (
        (["align-many", *FILES, *MODEL, "--out", "b2.pt"], "--out: expected 2 files"),
        (["align-many", *FILES, *MODEL, "--out", "x.pt", "x.pt"], "a file of its own"),
        (["merge", *FILES, *MODEL, "--out", "a.safetensors"], "--force"),
        (["merge", *FILES, *MODEL, "--out", "m.ckpt"], "--out"),
        (["merge", *FILES, *MODEL, "--weights", "1", "--out", "m.pt"], "weights: expected 3"),
        (["distances", *FILES, "--out", "d.txt"], "--out"),
        (["layers", *FILES, *MODEL, *DATA, "--endpoints", "z", "--out", "l.csv"], "endpoints"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err, arguments
    assert [n for n in sorted(p.name for p in tmp_path.iterdir()) if n != "__pycache__"] == [
        n for n in before if n != "__pycache__"
    ]
