"""The command line, as a user runs it."""

from __future__ import annotations

import subprocess
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
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

def build_with_inputs():
    return build(), torch.zeros(2, 6)

def broken():
    return 3

def loader():
    torch.manual_seed(0)
    return [(torch.randn(64, 6), torch.randint(0, 3, (64,))) for _ in range(2)]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    model, x = build_model("my_module:build_with_inputs")
    spec = fm.PermutationSpec.trace(model, x)
    save_state(model.state_dict(), "a.safetensors")
    save_state(fm.Alignment(spec.random(), spec).apply(model.state_dict()), "b.safetensors")
    yield tmp_path
    sys.modules.pop("my_module", None)


ALIGN = ["align", "a.safetensors", "b.safetensors", "--model", "my_module:build_with_inputs", "--out"]


def test_align_undoes_a_planted_permutation(folder, capsys):
    assert main([*ALIGN, "b_aligned.safetensors", "--permutations", "perms.safetensors"]) == 0
    assert "2 groups" in capsys.readouterr().out
    a, aligned = load_state("a.safetensors"), load_state("b_aligned.safetensors")
    assert all(torch.equal(aligned[k], v) for k, v in a.items())
    moved = fm.Alignment.load("perms.safetensors").apply(load_state("b.safetensors"))
    assert all(torch.equal(moved[k], v) for k, v in a.items())


@pytest.mark.parametrize("options", [[], ["--similarity", "cca"], ["--method", "straight-through"]])
def test_align_on_data(folder, options, capsys):
    assert main([*ALIGN, "b_aligned.safetensors", "--data", "my_module:loader", *options]) == 0
    model, _ = build_model("my_module:build_with_inputs")
    x = torch.randn(9, 6)
    outputs = []
    for path in ("b.safetensors", "b_aligned.safetensors"):
        model.load_state_dict(load_state(path))
        outputs.append(model(x))
    assert torch.allclose(*outputs, atol=1e-5)
    if "straight-through" in options:  # by weights every unit is found, dead or alive
        a, aligned = load_state("a.safetensors"), load_state("b_aligned.safetensors")
        assert all(torch.equal(aligned[k], v) for k, v in a.items())


def test_a_method_without_its_data_is_an_error(folder, capsys):
    assert main([*ALIGN, "c.safetensors", "--method", "fisher"]) == 2
    assert "--data: --method fisher needs a loader" in capsys.readouterr().err
    assert not (folder / "c.safetensors").exists()


def test_merge_writes_the_average(folder):
    assert main([*ALIGN, "merged.pt", "--merge", "0.5"]) == 0
    a, merged = load_state("a.safetensors"), load_state("merged.pt")
    assert all(torch.allclose(merged[k], v) for k, v in a.items())


def test_an_existing_output_needs_force_and_is_left_alone(folder, capsys):
    (folder / "b_aligned.safetensors").write_text("mine")
    assert main([*ALIGN, "b_aligned.safetensors"]) == 2
    assert "--force" in capsys.readouterr().err
    assert (folder / "b_aligned.safetensors").read_text() == "mine"
    assert main([*ALIGN, "b_aligned.safetensors", "--force"]) == 0
    assert load_state("b_aligned.safetensors").keys() == load_state("a.safetensors").keys()


def test_two_outputs_in_one_file_lose_nothing(folder, capsys):
    (folder / "same.safetensors").write_text("mine")
    for extra in ([], ["--force"]):
        for second in ("same.safetensors", "./same.safetensors"):
            assert main([*ALIGN, "same.safetensors", "--permutations", second, *extra]) == 2
            assert "same file as --out" in capsys.readouterr().err
    assert (folder / "same.safetensors").read_text() == "mine"


@pytest.mark.parametrize("outputs", [
    ["z.ckpt"], ["noext"], ["z.pt", "--permutations", "p.pt"],
])  # fmt: skip
def test_a_suffix_that_could_not_be_read_back_is_refused(folder, capsys, outputs):
    assert main([*ALIGN, *outputs]) == 2
    assert "expected a file ending in" in capsys.readouterr().err
    assert not any((folder / name).exists() for name in ("z.ckpt", "noext", "z.pt", "p.pt"))


def test_weights_that_are_not_finite_are_named(folder, capsys):
    state = load_state("b.safetensors")
    state["2.weight"][3] = float("nan")
    save_state(state, "nan.safetensors")
    assert main(["align", "a.safetensors", "nan.safetensors", *ALIGN[3:], "o.pt"]) == 2
    assert "nan.safetensors: tensor '2.weight' holds 16 NaN" in capsys.readouterr().err
    assert not (folder / "o.pt").exists()


def test_inspect_prints_groups_and_pins(folder, capsys):
    assert main(["inspect", "--model", "my_module:build", "--input-shape", "2,6"]) == 0
    out = capsys.readouterr().out
    assert "0.weight:0, 0.bias:0, 2.weight:1" in out
    assert "4.weight:0 of 3: model output" in out
    assert main(["inspect", "--model", "my_module:build", "--input-shape", "2x6", "--json"]) == 0
    assert list(fm.PermutationSpec.from_json(capsys.readouterr().out).groups) == ["0", "2"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["inspect", "--model", "my_module"], "expected module:callable"),
    (["inspect", "--model", "no_such:build"], "no module 'no_such'"),
    (["inspect", "--model", "my_module:nothing"], "has no callable 'nothing'"),
    (["inspect", "--model", "my_module:broken"], "returned int"),
    (["inspect", "--model", "my_module:build"], "--input-shape: needed"),
    (["inspect", "--model", "my_module:build", "--input-shape", "a,b"], "expected whole numbers"),
    (["align", "a.safetensors", "none.safetensors", "--model", "my_module:build_with_inputs", "--out", "o.pt"],
     "none.safetensors: no such file"),
    ([*ALIGN, "missing/out.pt"], "is not a folder"),
    (["demo", "--width", "100000"], "width: expected 128 to 8192"),
])  # fmt: skip
def test_bad_input_is_one_line_and_status_2(folder, capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (folder / "o.pt").exists()


def test_checkpoints_of_another_architecture_are_named(folder, capsys):
    state = load_state("b.safetensors")
    state["2.weight"] = torch.zeros(16, 15)
    save_state(state, "c.safetensors")
    arguments = ["align", "a.safetensors", "c.safetensors", *ALIGN[3:], "o.pt"]
    assert main(arguments) == 2
    assert "c.safetensors: tensor '2.weight' has shape (16, 15)" in capsys.readouterr().err


def test_the_installed_command_runs(folder):
    done = subprocess.run(
        [sys.executable, "-m", "fastmatch", "--help"], capture_output=True, text=True, check=True, cwd=folder
    )
    assert "inspect" in done.stdout


def test_importing_the_package_loads_neither_triton_nor_numba():
    code = "import sys, fastmatch; print([m for m in ('triton', 'numba', 'lapjv', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
