"""Suite ``families``: the assignment on every family of costs, beside every other solver.

Times are processor time, each solver in a process of its own: see :mod:`bench.reports.assignment_families`. What
pytest-benchmark itself records is our solver within this process.
"""

from __future__ import annotations

import pytest

from bench.lib.families import DTYPES, Factors, select
from bench.lib.timed_solves import OURS, by_factors
from bench.reports.assignment_families import LARGEST, SHAPES, Measurement, sides
from fastmatch.assignment import linear_sum_assignment

QUICK = ((300,), ("1:1",), ("float64", "factors"))
FULL = ((300, 1500, 4096, 8192), SHAPES, DTYPES)


def pytest_generate_tests(metafunc):
    pattern = metafunc.config.getoption("--families")
    sizes, shapes, dtypes = QUICK if metafunc.config.getoption("--quick") else FULL
    cases = [
        (family, size, shape, dtype)
        for family in (select(pattern) if pattern else [])
        for dtype in dtypes
        if dtype in family.dtypes
        for shape in shapes
        for size in sizes
        if sides(size, shape)[0] * sides(size, shape)[1] <= LARGEST
    ]
    names = [f"{family.name}, {shape}, {dtype}, {size}" for family, size, shape, dtype in cases]
    metafunc.parametrize(("family", "size", "shape", "dtype"), cases, ids=names)


@pytest.fixture(scope="module")
def measurement():
    found = Measurement()
    with found.runner:
        yield found


def test_family(benchmark, measurement, family, size, shape, dtype):
    n, m = sides(size, shape)
    row = measurement.row(family, n, m, dtype, seed=0)
    assert not row["fault"], row
    mine = row["seconds"][OURS]
    cost = family(n, m, 0, dtype)
    benchmark.group = "families"
    solve = by_factors if isinstance(cost, Factors) else linear_sum_assignment
    benchmark.pedantic(solve, args=(cost,), rounds=measurement.repeats, iterations=1, warmup_rounds=1)
    right = {k: t for k, t in row["seconds"].items() if k not in (OURS, *row["wrong"])}
    benchmark.extra_info.update(
        suite="families", instance=f"{family.name}, {shape}, {dtype}", size=size, along="rows", rounds=measurement.repeats,
        seconds={OURS: mine} | right, ratios={k: t / mine for k, t in right.items()}, peak_mb={OURS: None},
        wrong=row["wrong"], failed=row["failed"], skipped=row["skipped"],
    )  # fmt: skip
