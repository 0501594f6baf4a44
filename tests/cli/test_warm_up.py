"""``fastmatch warm-up``: what it says, and that later processes compile nothing."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastmatch.cli import warm_up
from fastmatch.cli.main import main
from fastmatch_kernels._numba import cache

LATER = """
import numpy as np, torch
from torch import nn
import fastmatch as fm
torch.manual_seed(0)
a, b = (nn.Sequential(nn.Linear(20, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)) for _ in range(2))
data = [torch.randn(64, 20) for _ in range(4)]
for matcher in (fm.WeightMatching(), fm.ActivationMatching(data)):
    endpoints = [a, fm.align(a, b, data[0], matcher).apply(b)]
    fm.renormalize(fm.merge(endpoints), endpoints, data)
g = np.random.default_rng(0)
for shape in ((7, 9), (300, 300), (1200, 1200)):
    for dtype in (np.float32, np.float64, np.int64):
        fm.solve((1000 * g.random(shape)).astype(dtype))
factors = g.standard_normal((2, 3000, 16))
fm.solve(fm.assignment.FactorCost([(factors[0], factors[1])]))
"""


@pytest.mark.parametrize("kept", [True, False])
def test_it_says_what_was_compiled_and_where_it_is_kept(tmp_path, monkeypatch, capsys, kept):
    def step():
        if kept:
            (tmp_path / "new.nbc").write_text("")

    (tmp_path / "old.nbc").write_text("")
    monkeypatch.setattr(cache, "folders", lambda: (tmp_path,))
    for name in ("_assignments", "_merges", "_networks"):
        monkeypatch.setattr(warm_up, name, lambda: [step])
    assert main(["warm-up", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["compiled"], said["kept"]) == ((1, 2) if kept else (0, 1))
    assert said["folders"] == [str(tmp_path)]


def test_where_nothing_can_be_kept_it_says_what_to_set(monkeypatch, capsys):
    monkeypatch.setattr(cache, "folders", lambda: ())
    for name in ("_assignments", "_merges", "_networks"):
        monkeypatch.setattr(warm_up, name, list)
    assert main(["warm-up"]) == 0
    assert "set NUMBA_CACHE_DIR to a folder that can be written" in capsys.readouterr().out


@pytest.mark.parametrize("steps", ["_assignments", "_merges", "_networks"])
def test_its_steps_run(steps, monkeypatch):
    """The first of each kind, in small sizes: :func:`test_later_processes_compile_nothing` runs all."""
    monkeypatch.setattr(warm_up, "UNITS", 32)
    ran = [step() for step in itertools.islice(getattr(warm_up, steps)(), 3)]
    assert len(ran) == 3


@pytest.mark.slow
def test_later_processes_compile_nothing(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}

    def run(*arguments: str) -> set[Path]:
        subprocess.run([sys.executable, *arguments], env=environment, check=True, capture_output=True)
        return set(tmp_path.rglob("*.nbc"))

    first = run("-m", "fastmatch", "warm-up")
    assert len(first) > 100
    assert run("-c", LATER) == first
