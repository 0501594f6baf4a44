"""Options and machine of the benchmark suites: ``pytest bench --quick``."""

from __future__ import annotations

import os

import numba
import pytest
import torch

from bench.reports.assignment import machine


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="small sizes: under three minutes on two cores")


@pytest.fixture
def quick(request) -> bool:
    return request.config.getoption("--quick")


def pytest_generate_tests(metafunc):
    """``width`` runs over the sizes of the test's marker ``widths(quick=(...), full=(...))``."""
    for name in ("width", "depth"):
        marker = metafunc.definition.get_closest_marker(f"{name}s")
        if marker is not None:
            quick = metafunc.config.getoption("--quick")
            metafunc.parametrize(name, marker.kwargs["quick" if quick else "full"])


def pytest_configure(config):
    for name in ("width", "depth"):
        config.addinivalue_line("markers", f"{name}s(quick, full): sizes of a benchmark")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["fastmatch"] = {
        **machine(), "torch_threads": torch.get_num_threads(), "numba_threads": numba.get_num_threads(),
        "load": os.getloadavg()[0], "quick": config.getoption("--quick"),
    }  # fmt: skip
