"""Assignment solvers that a user could pick, by their documented functions. Each gets the array as it is."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

Solver = Callable[[np.ndarray], Any]


def solvers() -> tuple[dict[str, Solver], dict[str, str]]:
    """Return the installed solvers (cost -> column of each row) and their versions, by name."""
    found: dict[str, Solver] = {}
    versions = {}
    for name, package, make in (
        ("scipy", "scipy", _scipy),
        ("lapjv", "lapjv", _lapjv),
        ("lap", "lapx", _lap),
        ("fastlap", "fastlap", _fastlap),
        ("lapcpp", "lapcpp", _lapcpp),
        ("laprust", "laprust", _laprust),
    ):
        try:
            found[name], versions[package] = make(), version(package)
        except (ImportError, PackageNotFoundError):
            continue
    return found, versions


def batch_solvers() -> dict[str, Solver]:
    """Return the installed batch functions (stack -> columns of shape (batch, n)), by name."""
    found: dict[str, Solver] = {}
    for name, entry in (
        ("lap", "lapjvx_batch"),
        ("lap", "lapjvs_batch"),
        ("lapcpp", "lapjv_batch"),
        ("laprust", "lapjv_batch"),
        ("fastlap", "lapjvx_batch"),
    ):
        try:
            function = getattr(__import__(name), entry)
        except (ImportError, AttributeError):
            continue
        found[f"{name}.{entry}"] = lambda stack, function=function: np.stack(function(stack)[2])
    return found


def _scipy() -> Solver:
    from scipy.optimize import linear_sum_assignment

    return lambda cost: linear_sum_assignment(cost)[1]


def _lapjv() -> Solver:
    import lapjv

    return lambda cost: lapjv.lapjv(cost)[0]


def _lap() -> Solver:
    import lap

    return lambda cost: lap.lapjv(cost)[1]


def _fastlap() -> Solver:
    import fastlap

    return lambda cost: fastlap.linear_sum_assignment(cost)[1]


def _lapcpp() -> Solver:
    import lapcpp

    return lambda cost: lapcpp.lapjv(cost)[2]


def _laprust() -> Solver:
    import laprust

    return lambda cost: laprust.lapjv(cost)[2]
