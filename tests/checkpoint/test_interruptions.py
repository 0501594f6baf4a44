"""Runs killed at events of the file system and runs with a full disk leave the old output, a complete one, or nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.networks import fresh_seed

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("points", [1, pytest.param(0, marks=pytest.mark.slow, id="all")])
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits the size of files")
def test_kills_and_full_disks_leave_nothing_half_written(tmp_path, points):
    seed = fresh_seed()
    paths = [ROOT / "tests", ROOT, ROOT / "kernels", os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-m", "helpers.interrupted_runs", tmp_path, "--points", points, "--seed", seed]
    done = subprocess.run(
        [str(x) for x in command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("'events'") == 15
