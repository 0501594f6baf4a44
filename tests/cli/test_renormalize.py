"""``fastmatch renormalize`` and ``fastmatch curve``, as a user runs them."""

from __future__ import annotations

import csv
import sys

import pytest
import torch

import fastmatch as fm
from fastmatch._internal.files import load_state, save_state
from fastmatch.cli.main import build_model, main

MODULE = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 7))

def loader():
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(20, 6, generator=g), torch.randint(7, (20,), generator=g)) for _ in range(3)]

def stream():
    return iter(loader())
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "renorm_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    pair = [build_model("renorm_module:build")[0] for _ in range(2)]
    for name, model in zip("ab", pair, strict=True):
        save_state(model.state_dict(), f"{name}.safetensors")
    save_state(fm.merge(pair, [0.25, 0.75]).state_dict(), "merged.pt")
    yield pair, sys.modules["renorm_module"].loader()
    sys.modules.pop("renorm_module", None)


COMMON = ["--model", "renorm_module:build", "--data", "renorm_module:loader"]
RENORMALIZE = ["renormalize", "merged.pt", "--endpoints", "a.safetensors", "b.safetensors", *COMMON]


@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_renormalize_writes_what_the_library_makes(models, mode, capsys):
    pair, data = models
    options = ["--weights", "0.25", "0.75", "--method", "repair", "--mode", mode, "--samples", "50"]
    assert main([*RENORMALIZE, *options, "--out", "new.safetensors"]) == 0
    assert "repair: as asked; 3 layers" in capsys.readouterr().out
    expected = fm.renormalize(
        fm.merge(pair, [0.25, 0.75]), pair, data, fm.Renormalization("repair", mode, 50)
    )
    for name, tensor in load_state("new.safetensors").items():
        torch.testing.assert_close(tensor, expected.state_dict()[name])


def test_curve_writes_what_the_library_makes(models, tmp_path, capsys):
    pair, data = models
    arguments = ["curve", "a.safetensors", "b.safetensors", *COMMON, "--points", "5", "--out", "curve.csv"]
    options = ["--renormalize", "rescale", "--calibration", "renorm_module:loader", "--plot", "curve.png"]
    assert main([*arguments, *options]) == 0
    curve = fm.interpolate(*pair, data, 5, between=fm.Renormalized(data, "rescale"))
    rows = list(csv.DictReader((tmp_path / "curve.csv").read_text().splitlines()))
    assert [float(r["loss"]) for r in rows] == pytest.approx(list(curve.loss))
    assert [float(r["top-5"]) for r in rows] == pytest.approx(list(curve.top5))
    assert f"loss barrier {curve.barrier:.4f}" in capsys.readouterr().out
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert main(arguments) == 2
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    ([*RENORMALIZE, "--out", "new.pt"], "weights: needed for 2 endpoints"),
    (["renormalize", "merged.pt", *COMMON, "--out", "new.pt"], "--endpoints: needed"),
    ([*RENORMALIZE, "--out", "new.ckpt"], "expected a file ending in"),
    ([*RENORMALIZE[:-1], "renorm_module:stream", "--out", "new.pt"], "--data: expected a callable that returns a loader"),
    ([*RENORMALIZE, "--method", "reset", "--out", "new.pt"], "needs batch norm"),
    (["curve", "a.safetensors", "b.safetensors", *COMMON, "--renormalize", "repair", "--out", "c.csv"],
     "--calibration: needed to renormalize a curve"),
])  # fmt: skip
def test_bad_input_is_one_line_and_status_2(models, tmp_path, capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new.pt").exists()
