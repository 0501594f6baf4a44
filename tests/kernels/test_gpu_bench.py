"""The GPU benchmark runs here on the CPU twins and in the interpreter, checks included."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "bench/reports/gpu.py"


@pytest.mark.parametrize(("backend", "rows"), [("cpu", 2 * 2 + 2 + 3 + 1), ("triton", 3 * 2 + 2 + 3 + 1)])
def test_every_kernel_is_checked_and_timed(tmp_path, backend, rows):
    if torch.cuda.is_available() and backend == "triton":
        pytest.skip("the interpreter is for machines without a GPU")
    out = tmp_path / "table.md"
    command = [
        sys.executable,
        str(SCRIPT),
        "--device",
        "cpu",
        "--backend",
        backend,
        "--tiny",
        "--out",
        str(out),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1" if backend == "triton" else "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = [line for line in out.read_text().splitlines() if line.startswith("| ")][1:]
    assert len(table) == rows
    assert sum(line.startswith("| row_softmin") for line in table) == 2, "float32 and half precision"
    assert all(float(line.split("|")[4]) <= 1 for line in table), "a result outside its bound was recorded"


def test_the_counts_of_stored_matrices_are_taken():
    command = [sys.executable, str(SCRIPT.with_name("stored.py")), "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "'constant', 'n': 200, 'lists': 'given up'" in done.stdout
    assert "'sibling 1', 'n': 200, 'lists': 'suit'" in done.stdout


def test_the_simulation_of_first_duals_runs():
    script = SCRIPT.with_name("duals.py")
    done = subprocess.run(
        [sys.executable, str(script), "--tiny"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 * 8, "two instances from eight starts"
