"""The tests of the GPU kernels are among those that `make gpu` runs."""

from __future__ import annotations

import pytest

from helpers.forked import Forked

WITHOUT_GPU = ("test_aot.py", "test_cache.py", "test_half.py", "test_row_topk_cpu.py", "test_dispatch.py")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "kernels" and item.path.name not in WITHOUT_GPU:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def numba_programs():
    """Runs programs in processes that have loaded torch and numba, with all that it needs to compile, and none of our modules."""
    forked = Forked("import numba, torch\nnumba.njit(lambda x: x + 1)(1)")
    yield forked
    forked.close()
