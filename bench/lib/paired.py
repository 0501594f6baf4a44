"""One row of a suite: fastmatch and its peers on the same inputs, checked against each other, then timed in turns.

pytest-benchmark runs and records fastmatch. The peers run in its setup before each round, so that a ratio compares
measurements taken one after the other. Peak memory is the process's, above what it held before.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Work = Callable[[], Any]


PAUSE = 0.15
"""Seconds to wait before each measurement, because the BLAS threads of another solver spin for a while."""


def resident(field: str) -> float | None:
    """Return a figure of /proc/self/status in MB, or None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measured(work: Work) -> tuple[Any, float, float | None]:
    """Return the result, the seconds, and the peak MB above the start (Linux resets its peak on request)."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        pass
    time.sleep(PAUSE)
    before = resident("VmRSS")
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    peak = resident("VmHWM")
    return result, seconds, None if before is None or peak is None else max(peak - before, 0.0)


def compare(
    benchmark: Any,
    *,
    suite: str,
    instance: str,
    ours: Work,
    peers: Mapping[str, Work],
    check: Callable[[str, Any, Any], None],
    size: int,
    along: str = "width",
    rounds: int = 3,
    neurons: int | None = None,
    **facts: Any,
) -> Any:
    """Measure one row. Return the result of fastmatch.

    Args:
        suite: the suite's name.
        instance: the row's name. Rows of one instance make a line over ``size``.
        ours: the work of fastmatch, without arguments.
        peers: the work of each peer, without arguments.
        check: ``check(name, result, peer's result)`` asserts that they agree.
        size: the width or depth of the row.
        along: what ``size`` is.
        rounds: timed turns. 0 takes the checked run of each as its time, for work of minutes.
        neurons: how many units are matched, for neurons per second.
        facts: more to keep with the row, such as ``passes`` over the data.
    """
    ours()  # compiles
    result, first, peak = measured(ours)
    peaks = {"fastmatch": peak}
    seconds: dict[str, list[float]] = {}
    for name, peer in peers.items():
        value, taken, peaks[name] = measured(peer)
        check(name, result, value)
        seconds[name] = [] if rounds else [taken]

    def turn() -> None:
        for name, peer in peers.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            peer()
            seconds[name].append(time.perf_counter() - start)
        time.sleep(PAUSE)

    benchmark.group = suite
    if rounds:
        benchmark.pedantic(ours, setup=turn, rounds=rounds, iterations=1, warmup_rounds=0)
    else:
        benchmark.pedantic(
            lambda: time.sleep(0), rounds=1, iterations=1
        )  # recorded; the time is the checked run's
    mine = list(benchmark.stats.stats.data) if rounds else [first]
    benchmark.extra_info.update(
        suite=suite, instance=instance, size=size, along=along, rounds=rounds,
        seconds={"fastmatch": float(np.median(mine))} | {k: float(np.median(v)) for k, v in seconds.items()},
        ratios={k: float(np.median(np.array(v) / np.array(mine))) for k, v in seconds.items()},
        peak_mb=peaks, **facts,
    )  # fmt: skip
    if neurons is not None:
        benchmark.extra_info["neurons_per_second"] = neurons / float(np.median(mine))
    return result
