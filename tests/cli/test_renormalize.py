"""``fastmatch renormalize``, as a user runs it."""

from __future__ import annotations

import pytest
import torch

import fastmatch as fm
from fastmatch._internal.files import load_state, save_state
from fastmatch.cli.main import main

MODEL = ["--model", "cli_module:build"]
DATA = ["--data", "cli_module:loader"]
ENDPOINTS = ["--endpoints", "a.safetensors", "b.safetensors"]
RENORMALIZE = ["renormalize", "merged.pt", *ENDPOINTS, *MODEL, *DATA]


@pytest.fixture
def merged(models):
    """The first two models; their merge is merged.pt."""
    save_state(fm.merge(models[:2], [0.25, 0.75]).state_dict(), "merged.pt")
    return models[:2]


@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_renormalize_writes_what_the_library_makes(merged, loader, mode, capsys):
    options = ["--weights", "0.25", "0.75", "--method", "repair", "--mode", mode, "--samples", "50"]
    assert main([*RENORMALIZE, *options, "--out", "new.safetensors"]) == 0
    assert "repair: as asked; 3 layers" in capsys.readouterr().out
    method = fm.Renormalization("repair", mode, 50)
    expected = fm.renormalize(fm.merge(merged, [0.25, 0.75]), merged, loader, method)
    for name, tensor in load_state("new.safetensors").items():
        torch.testing.assert_close(tensor, expected.state_dict()[name])


@pytest.mark.parametrize(("arguments", "message"), [
    ([*RENORMALIZE, "--out", "new.pt"], "--weights: needed for 2 endpoints"),
    (["renormalize", "merged.pt", *MODEL, *DATA, "--out", "new.pt"], "--endpoints: needed"),
    ([*RENORMALIZE, "--out", "new.npz"], "expected a file ending in"),
    ([*RENORMALIZE[:-1], "cli_module:stream", "--out", "new.pt"], "--data: expected a callable that returns a loader"),
    (["renormalize", "merged.pt", *MODEL, *DATA, "--method", "reset", "--out", "new.pt"], "needs batch norm"),
    ([*RENORMALIZE, "--method", "reset", "--out", "new.pt"], "--endpoints: --method reset uses the data alone"),
    (["renormalize", "merged.pt", *MODEL, *DATA, "--method", "reset", "--weights", "1", "--out", "new.pt"],
     "--weights: --method reset uses the data alone"),
])  # fmt: skip
def test_bad_input_is_one_line(merged, refused, arguments, message):
    refused(arguments, message)
