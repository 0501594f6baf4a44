"""``fastmatch inspect`` and ``verify``, as a user runs them."""

from __future__ import annotations

import pytest

import fastmatch as fm
from fastmatch._internal.files import load_state, save_state
from fastmatch.cli.main import main


def test_inspect_prints_groups_and_pins(folder, capsys):
    assert main(["inspect", "--model", "cli_module:build", "--input-shape", "2,6"]) == 0
    out = capsys.readouterr().out
    assert "0.weight:0, 0.bias:0, 2.weight:1" in out
    assert "4.weight:0 of 7: model output" in out
    # All but the 7 entries of the last bias.
    assert out.endswith("\n98.6% of 503 parameters can move\n")
    assert main(["inspect", "--model", "cli_module:build", "--input-shape", "2x6", "--json"]) == 0
    assert list(fm.PermutationSpec.from_json(capsys.readouterr().out).groups) == ["0", "2"]


def test_verify_compares_files_under_a_model(planted, capsys):
    verify = ["verify", "a.safetensors", "b.safetensors", "--model", "cli_module:build"]
    assert main([*verify, "--input-shape", "5,6"]) == 0
    assert "the same function: 1 output agrees" in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["module.", "model."])
def test_verify_takes_a_prefix_off(planted, capsys, prefix):
    for name in "ab":
        state = load_state(f"{name}.safetensors")
        save_state({prefix + key: tensor for key, tensor in state.items()}, f"{name}.pt")
    assert main(["verify", "a.pt", "b.pt", "--model", "cli_module:build", "--input-shape", "5,6"]) == 0
    assert "the same function: 1 output agrees" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (["plan", "a.safetensors", "b.safetensors"], "a.safetensors: expected a folder with a config.json"),
    (["apply", "cli_module.py", "b.safetensors", "--out", "o.safetensors"], "as the first argument; got cli_module.py"),
    (["inspect", "--model", "cli_module"], "expected module:callable"),
    (["inspect", "--model", "no_such:build"], "no module 'no_such'"),
    (["inspect", "--model", "cli_module:nothing"], "has no callable 'nothing'"),
    (["inspect", "--model", "cli_module:broken"], "returned int"),
    (["inspect", "--model", "cli_module:build"], "--input-shape: needed"),
    (["inspect", "--model", "cli_module:build", "--input-shape", "a,b"], "expected whole numbers"),
    (["verify", "a.safetensors", "b.safetensors", "--input-shape", "2,6"], "--input-shape: needs --model"),
    (["verify", "a.safetensors", "b.safetensors", "--model", "cli_module:build_with_inputs", "--dtype", "int8"],
     "--dtype: expected a floating point type"),
])  # fmt: skip
def test_bad_input_is_one_line(planted, refused, arguments, message):
    refused(arguments, message)
