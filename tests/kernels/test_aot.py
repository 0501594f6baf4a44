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
    "target", [pytest.param(t, marks=[pytest.mark.slow] if t != "sm_90" else []) for t in TARGETS]
)
def test_one_variant_of_every_kernel(tmp_path, target):
    rows = compiled(tmp_path, target, "--quick")
    assert {r["op"] for r in rows} >= OPS
    for op in ("gain", "cost_rows", "row_softmin"):
        precisions = {r["precision"] for r in rows if r["op"] == op and r["matrix_expected"]}
        assert precisions >= {"fp16", "fp16x3", "half"}
    check(rows)


COUNTED = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from bench.lib import aot
from fastmatch_kernels._triton.tiles import TARGETS

target = TARGETS[sys.argv[1]]
for op, limit in (("moments", {"maxnreg": 40}), ("permute_merge", {})):
    case = next(c for c in aot.cases(target) if c.op == op and c.precision in ("ieee", "-"))
    chip = GPUTarget(target.backend, target.arch, target.warp_size)
    cubin = compile(aot._source(case), target=chip, options=case.tiles.options | limit).asm["cubin"]
    counted = aot.count_instructions(cubin, target.name)
    assert counted == aot.disassembled(cubin), (counted, aot.disassembled(cubin))
    assert counted[1] > 0
    assert (counted[0] > 0) == bool(limit)  # registers are spilled where there are few
"""


@pytest.mark.parametrize("target", TARGETS[:3])
@pytest.mark.slow
def test_instructions_are_counted_as_the_disassembler_does(programs, target):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    programs.run(COUNTED, target, environment=environment, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration(tmp_path, target):
    check(compiled(tmp_path, target))
