"""Threads and backends of the test processes, set before anything loads OpenMP, numba or Triton."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from typing import Any

# Tests run in parallel processes, one for each core. OpenMP's threads spin while they wait for each other, which
# slows every process of a full machine down by an order of magnitude; passive ones sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from helpers.forked import Forked
from helpers.grid import mark_repeated_values_slow
from helpers.interpreter import quicken
from helpers.plain_text import encodable

# Without a GPU, Triton runs kernels in its interpreter, on CPU tensors. It reads this when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton"):
        quicken()

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def programs() -> Iterator[Forked]:
    """Runs programs in processes that have loaded torch and nothing else."""
    forked = Forked("import torch")
    yield forked
    forked.close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_repeated_values_slow(items)


def pytest_collection_finish():
    """Leave what torch, transformers and diffusers loaded out of garbage collections: they take a tenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Escape what UTF-8 cannot hold: a report with such a string, from a damaged file, would end the whole run."""
    return encodable((yield))


def pytest_unconfigure():
    gc.unfreeze()  # so that libraries in C++ find their objects freed at the end
