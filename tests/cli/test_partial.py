"""``fastmatch partial``, as a user runs it."""

from __future__ import annotations

import sys

import pytest
import torch

import fastmatch as fm
from fastmatch._internal.files import save_state
from fastmatch.cli.main import build_model, main

MODULE = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 7))

def loader():
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(40, 6, generator=g), torch.randint(7, (40,), generator=g)) for _ in range(3)]
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "partial_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    pair = [build_model("partial_module:build")[0].eval() for _ in range(2)]
    for name, model in zip("ab", pair, strict=True):
        save_state(model.state_dict(), f"{name}.safetensors")
    yield pair, sys.modules["partial_module"].loader()
    sys.modules.pop("partial_module", None)


COMMON = [
    "partial",
    "a.safetensors",
    "b.safetensors",
    "--model",
    "partial_module:build",
    "--input-shape",
    "2,6",
]
DATA = ["--data", "partial_module:loader"]


@pytest.mark.parametrize("method", [None, "repair", "reset"])
def test_partial_writes_a_program_that_computes_what_the_library_makes(models, method, capsys):
    pair, data = models
    options = ["--rule", "zip", "--start-at", "3", "--weights", "0.25", "0.75", "--out", "merged.pt2"]
    assert main([*COMMON, *DATA, *options, *(["--renormalize", method] if method else [])]) == 0
    found = fm.merge_partial(pair, torch.zeros(2, 6), fm.Zip(data), start_at="3", weights=[0.25, 0.75])
    expected: torch.nn.Module = found.model
    if method is not None:
        goals = found.endpoint_statistics(pair, data)
        expected = fm.renormalize(found.model, goals, data, method, weights=[0.25, 0.75])
    program = torch.export.load("merged.pt2").module()
    x = torch.randn(11, 6)  # another batch size than the example's
    with torch.no_grad():
        torch.testing.assert_close(program(x), expected(x))
    ratio = fm.model_cost(found.model, x).flops / fm.model_cost(pair[0], x).flops
    said = capsys.readouterr().out
    assert "2 of 2 groups merged by zip" in said  # the first at the boundary
    assert f"{ratio:.2f} times the FLOPs; wrote merged.pt2" in said
    assert main([*COMMON, *DATA, *options]) == 2
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    ([*COMMON, "--out", "new.pt2"], "data: needed by rule 'permute'"),
    ([*COMMON, "--out", "new.pt"], "expected a file ending in"),
    ([*COMMON, *DATA, "--keep", "9", "--out", "new.pt2"], "start_at: expected a position of 0 to 2"),
    ([*COMMON, *DATA, "--start-at", "9", "--out", "new.pt2"], "start_at: unknown group '9'"),
    ([*COMMON, *DATA, "--apart", "9", "--out", "new.pt2"], "apart: unknown group '9'"),
    ([*COMMON, "--rule", "identity", "--renormalize", "reset", "--out", "new.pt2"], "--data: needed to renormalize"),
    ([*COMMON[:2], *COMMON[3:], *DATA, "--out", "new.pt2"], "models: expected at least two, got 1"),
])  # fmt: skip
def test_bad_input_is_one_line_and_status_2(models, tmp_path, capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new.pt2").exists()
