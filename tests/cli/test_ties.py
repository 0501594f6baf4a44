"""Files that hold a tied parameter under one name, as safetensors' save_model writes them, in every command that loads."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model

from fastmatch.cli.loading import build_model
from fastmatch.cli.main import main

MODEL = ["--model", "cli_module:build_tied"]


@pytest.fixture
def tied(folder):
    """Files a and b of two networks, each without one name of the tied parameter."""
    for name in "ab":
        save_model(build_model("cli_module:build_tied")[0], f"{name}.safetensors")
    assert {"first.weight", "second.weight"} - load_file("b.safetensors").keys()


@pytest.mark.filterwarnings("ignore:renormalize leaves these alone")  # the tied layers
@pytest.mark.parametrize("command", [
    ["align", "a.safetensors", "b.safetensors", *MODEL],
    ["align", "a.safetensors", "b.safetensors", *MODEL, "--merge", "0.5"],
    ["align-many", "a.safetensors", "b.safetensors", *MODEL],
    ["merge", "a.safetensors", "b.safetensors", *MODEL],
    ["renormalize", "a.safetensors", *MODEL, "--data", "cli_module:loader", "--method", "repair",
     "--endpoints", "a.safetensors", "b.safetensors", "--weights", "1", "0"],
])  # fmt: skip
def test_the_output_has_the_names_of_the_input_and_is_loaded_again(tied, command, capsys):
    assert main([*command, "--out", "out.safetensors"]) == 0, capsys.readouterr().err
    assert load_file("out.safetensors").keys() == load_file("b.safetensors").keys()
    load_model(build_model("cli_module:build_tied")[0], "out.safetensors")


def test_aligned_b_is_the_same_function(tied):
    assert main(["align", "a.safetensors", "b.safetensors", *MODEL, "--out", "out.safetensors"]) == 0
    x, outputs = torch.randn(5, 6), []
    for path in ("b.safetensors", "out.safetensors"):
        model = build_model("cli_module:build_tied")[0]
        load_model(model, path)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs)


def test_a_file_that_lacks_both_names_is_refused(tied, capsys):
    state = load_file("b.safetensors")
    save_file({k: v for k, v in state.items() if k not in ("first.weight", "second.weight")}, "b.safetensors")
    assert main(["align", "a.safetensors", "b.safetensors", *MODEL, "--out", "out.safetensors"]) == 2
    assert "b.safetensors: has no tensor" in capsys.readouterr().err
