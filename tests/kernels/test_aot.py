"""Ahead-of-time compilation: in a process of its own, since here kernels are defined for the interpreter."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
OPS = {
    "gain",
    "cost_rows",
    "cost_rows, selection",
    "moments",
    "moments, no product",
    "permute_merge",
    "channel_affine",
    "row_softmin",
}


def compiled(tmp_path, target, *options):
    out = tmp_path / "rows.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # Triton makes syntax trees in a way that Python 3.13 warns of.
    strict = ["-W", "error", "-W", "ignore:AnnAssign.__init__ missing:DeprecationWarning"]
    command = [sys.executable, *strict, "-m", "bench.reports.aot", "--target", target]
    done = subprocess.run(
        [*command, "--json", str(out), *options], env=environment, capture_output=True, text=True, check=False
    )
    assert out.exists(), done.stderr
    record = json.loads(out.read_text())
    assert record["versions"]["triton"] == version("triton")
    return record["rows"]


def check(rows):
    for row in rows:
        assert row["faults"] == [], row
        assert row["spills"] == 0
        assert row["shared"] <= row["shared_limit"]
        assert row["matrix"] > 0 or not row["matrix_expected"]
        assert row["wide_loads"] > 0 or not row["wide_expected"]
        assert 1 <= row["registers"] <= 512
        assert 0 < row["occupancy"] <= 1


@pytest.mark.parametrize(
    "target", [pytest.param(t, marks=[pytest.mark.slow] if t in ("sm_80", "sm_100") else []) for t in TARGETS]
)
def test_one_variant_of_every_kernel(tmp_path, target):
    rows = compiled(tmp_path, target, "--quick")
    assert {r["op"] for r in rows} >= OPS
    for op in ("gain", "cost_rows", "row_softmin"):
        precisions = {r["precision"] for r in rows if r["op"] == op and r["matrix_expected"]}
        assert precisions >= {"fp16", "fp16x3", "half"}
    check(rows)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration(tmp_path, target):
    check(compiled(tmp_path, target))
