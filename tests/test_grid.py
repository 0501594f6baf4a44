"""What `make test` leaves to `make nightly` of a grid of parameters."""

from __future__ import annotations

import pytest

pytest_plugins = ("pytester",)

GRID = """
import pytest
from helpers.grid import mark_repeated_values_slow

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    mark_repeated_values_slow(items)
"""

TESTS = """
import pytest

@pytest.mark.grid
@pytest.mark.parametrize("a", ["p", "q", "r"])
@pytest.mark.parametrize("b", [pytest.param(0, marks=pytest.mark.slow), 1, 2])
def test_grid(a, b): pass

@pytest.mark.parametrize("a", ["p", "q"])
@pytest.mark.parametrize("b", [1, 2])
def test_other(a, b): pass
"""


def test_every_value_is_left_once(pytester: pytest.Pytester):
    pytester.makeini("[pytest]\nmarkers =\n    grid\n    slow\n")
    pytester.makeconftest(GRID)
    pytester.makepyfile(TESTS)
    done = pytester.runpytest_inprocess("--collect-only", "-q", "-m", "not slow", "-p", "no:cacheprovider")
    names = [line.rpartition("::")[2] for line in done.outlines if "::" in line]
    assert names[:3] == ["test_grid[1-p]", "test_grid[1-r]", "test_grid[2-q]"]
    assert len(names[3:]) == 4
