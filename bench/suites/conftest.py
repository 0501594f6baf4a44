"""Options of the benchmark suites, and the machine in their JSON.

    python -m pytest bench/suites                             every suite, at full size
    python -m pytest bench/suites/test_matching.py --quick    one suite, at small sizes
    python -m pytest bench/suites --benchmark-json=run.json   keep what was measured
    python -m bench.reports.suites run.json                   make a page of it
    python -m fastmatch bench                                 all of this at once

``--quick`` measures small sizes: under three minutes on two cores. A benchmark names its sizes by a marker,
``@pytest.mark.widths(quick=(...), full=(...))`` or ``depths``, and takes one as its argument ``width`` or ``depth``.
``--families "*"`` measures the families of costs, which are left out without it. All other options are pytest-benchmark's.
"""

from __future__ import annotations

import numpy as np
import pytest

import fastmatch as fm
from bench.lib.machine import machine, versions
from bench.lib.peers import solvers


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="small sizes: under three minutes on two cores")
    parser.addoption("--families", help="measure the families of costs whose names fit this pattern")


@pytest.fixture(scope="session", autouse=True)
def _solvers_are_loaded() -> None:
    """Load the compiled solvers: without them the first matches of a process are solved in numpy."""
    for dtype in (np.float32, np.float64):
        fm.solve(np.eye(3, dtype=dtype))


@pytest.fixture
def quick(request) -> bool:
    return request.config.getoption("--quick")


def pytest_generate_tests(metafunc):
    """Run a test at the sizes of its marker ``widths(quick=(...), full=(...))`` or ``depths``."""
    for name in ("width", "depth"):
        marker = metafunc.definition.get_closest_marker(f"{name}s")
        if marker is not None:
            quick = metafunc.config.getoption("--quick")
            metafunc.parametrize(name, marker.kwargs["quick" if quick else "full"])


def pytest_configure(config):
    for name in ("width", "depth"):
        config.addinivalue_line("markers", f"{name}s(quick, full): sizes of a benchmark")


def pytest_benchmark_update_machine_info(config, machine_info):
    told = machine()
    machine_info["fastmatch"] = {
        "cpu": told["cpu"], "cores": told["cores"], "load": told["load"], "torch_threads": told["threads"],
        "versions": versions(solvers()[1]),
        "quick": config.getoption("--quick"),
    }  # fmt: skip
