"""The tests that other projects ship, from their installed packages, with our solvers in the place of theirs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.solving_for_others import ANSWERED

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("modules", "calls"),
    [
        pytest.param(["scipy.optimize.tests.test_linear_assignment"], 20, id="scipy, linear"),
        pytest.param(
            ["scipy.optimize.tests.test_quadratic_assignment"], 100, id="scipy, quadratic", marks=pytest.mark.slow
        ),
        pytest.param(
            ["networkx.algorithms.bipartite.tests.test_matching", "networkx.algorithms.tests.test_matching"], 5,
            id="networkx", marks=pytest.mark.slow,
        ),
        pytest.param(["sklearn.metrics.cluster.tests"], 3, id="scikit-learn", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_others_own_tests_pass_on_our_solvers(tmp_path, modules, calls):
    """``calls``: as many, at least, our solver has to answer. All sizes count: the tests' problems are small."""
    for module in modules:
        pytest.importorskip(module.split(".")[0])
        assert importlib.util.find_spec(module) is not None, f"{module} is not installed with its package"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "helpers.solving_for_others",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-p", "no:xdist", "--pyargs", *modules]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    answered = re.search(rf"{ANSWERED} (\d+)", done.stdout)
    assert answered is not None, done.stdout[-1000:]
    assert int(answered[1]) >= calls
