"""The machine that a benchmark runs on, and the versions of what it measures."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "numpy", "numba")
"""Packages whose version goes into every record."""

PROBE = 1536
"""Rows of the matrices whose product is timed."""


def processor() -> str:
    """Return the processor's name, or its architecture where Linux does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def cores() -> int:
    """Return the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Return the processor, its cores, torch's threads and the load average of the last minute."""
    import torch

    return {
        "cpu": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Return the versions of Python, of :data:`PACKAGES` and of ``packages``, where they are installed."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def product_rate() -> float:
    """Return the float32 operations of torch's products in a second of the processor: the best of five products."""
    import torch

    a, b = torch.randn(2, PROBE, PROBE)
    best = float("inf")
    for _ in range(5):
        started = time.process_time()
        torch.mm(a, b)
        best = min(best, time.process_time() - started)
    return 2 * PROBE**3 / best


def peak() -> int:
    """Return the peak resident bytes of this process."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024
