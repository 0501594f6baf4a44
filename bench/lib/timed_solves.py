"""Assignment solvers in processes of their own: a limit of processor time, and a crash is a result, not the end.

A :class:`Runner` keeps one process for each solver. The matrix goes by a file, so that every solver reads the same entries
into an array of its own. A solver that uses its limit is ended; its process starts anew for the next problem.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import tempfile
import time
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from bench.lib.families import Factors

OURS = "fastmatch"

SHORT = 0.02
"""Seconds of processor time that a measurement takes at least: faster solves are repeated within it."""

PATIENCE = 20.0
"""Seconds of a clock for every second of processor time that a solver may use, on a machine with other work."""

START = "spawn"
"""How processes start: without what this one holds."""


@dataclass(frozen=True)
class Outcome:
    """What a solver did with one matrix.

    Args:
        seconds: processor time of one solve; None if it failed.
        failure: "limit", "crash", or the text of its error. "" if it returned a matching.
        objective: the exact sum of the matched entries.
        size: the sum of their absolute values.
        gap: the gap that was claimed, and its bound; None for peers.
    """

    seconds: float | None
    failure: str = ""
    objective: Fraction = Fraction(0)
    size: Fraction = Fraction(0)
    gap: tuple[float, float] | None = None


def matched(cost: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> tuple[Fraction, Fraction]:
    """Return the exact objective and the sum of the sizes of a matching.

    Raises:
        ValueError: it is no matching of the shorter side, or it uses a forbidden entry.
    """
    rows, columns = np.asarray(rows), np.asarray(columns)
    k = min(cost.shape)
    if len(rows) != k or len(np.unique(rows)) != k or len(np.unique(columns)) != k:
        raise ValueError("no matching of the shorter side")
    values = cost[rows, columns].tolist()
    if not all(map(math.isfinite, values)):
        raise ValueError("a forbidden entry is used")
    exact = [Fraction(value) for value in values]
    return sum(exact, Fraction(0)), sum(map(abs, exact), Fraction(0))


def work(name: str, asked: Connection) -> None:
    """Solve what comes through the pipe: the path of a matrix, again and again. Say when the first may come."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if name == OURS:
        from fastmatch.assignment import linear_sum_assignment as solve

        for dtype in (np.float64, np.float32):  # loads the kernels
            for shape in ((1100, 1100), (1100, 1200), (40, 50)):
                solve(np.random.default_rng(0).random(shape).astype(dtype))
    else:
        from bench.lib.peers import peers

        solve = peers()[name].solve
    asked.send(None)
    while True:
        try:
            path = asked.recv()
        except EOFError:
            return
        cost = loaded(path)
        try:
            outcome = attempt(name, solve, cost)
        except Exception as error:  # what a peer raises is its result
            outcome = Outcome(None, f"{type(error).__name__}: {error}"[:120])
        asked.send(outcome)


def loaded(path: str) -> np.ndarray | Factors:
    """Return an array of this process, or factors."""
    found = np.load(path, mmap_mode="r")
    if path.endswith(".npy"):
        return np.array(found)
    with found:
        return Factors(found["a"], found["b"], str(found["metric"]))  # type: ignore[arg-type]


def attempt(name: str, solver: Any, cost: np.ndarray | Factors) -> Outcome:
    """Time a solve, repeated while that is short, and describe what it returned."""
    if isinstance(cost, Factors):
        solve = by_factors if name == OURS else lambda factors: solver(factors.matrix())
    else:
        solve = solver
    count, taken = 1, 0.0
    while True:
        start = time.process_time()
        for _ in range(count):
            pairs = solve(cost)
        taken = time.process_time() - start
        if taken >= SHORT:
            break
        count *= 2 if taken > SHORT / 8 else 8
    objective, size = matched(cost.matrix() if isinstance(cost, Factors) else cost, *pairs)
    gap = None
    if name == OURS:
        from fastmatch.assignment import FactorCost
        from fastmatch.assignment import solve as proved

        found = proved(FactorCost([(cost.a, cost.b)], cost.metric) if isinstance(cost, Factors) else cost)
        gap = (float(found.gap), float(found.gap_bound))
    return Outcome(taken / count, "", objective, size, gap)


def by_factors(factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    """Solve without the matrix, or as the library decides."""
    from fastmatch.assignment import FactorCost, solve

    found = solve(FactorCost([(factors.a, factors.b)], factors.metric))
    return found.row_ind, found.col_ind


def processor_seconds(pid: int | None) -> float:
    """Return the processor time of a process so far, where Linux tells; 0 elsewhere."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Runner:
    """Solvers by name, each in its process.

    Example:
        with Runner(limit=20) as runner:
            runner.place(cost)
            runner.run("scipy").seconds
    """

    def __init__(self, limit: float):
        self.limit = limit
        self._context = multiprocessing.get_context(START)
        self._processes: dict[str, tuple[BaseProcess, Connection]] = {}

    def __enter__(self) -> Runner:
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name)
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._processes):
            self._end(name)
        self._folder.cleanup()

    def place(self, cost: np.ndarray | Factors) -> None:
        """Give all solvers this cost."""
        if isinstance(cost, Factors):
            self._path = Path(self._folder.name) / "cost.npz"
            np.savez(self._path, a=cost.a, b=cost.b, metric=cost.metric)
        else:
            self._path = Path(self._folder.name) / "cost.npy"
            np.save(self._path, cost)

    def run(self, name: str, limit: float | None = None) -> Outcome:
        """Solve the matrix by the named solver, within a limit of its own if there is one."""
        process, pipe = self._processes.get(name) or self._start(name)
        allowed = min(self.limit, limit or self.limit)
        if name == OURS:
            allowed *= 2  # it solves again, for its gap
        start, used = time.monotonic(), processor_seconds(process.pid)
        try:
            pipe.send(str(self._path))
            while not pipe.poll(0.5):
                late = time.monotonic() - start > PATIENCE * allowed
                if late or processor_seconds(process.pid) - used > allowed:
                    return self._failed(name, "limit")
            return pipe.recv()
        except (EOFError, ConnectionError):
            return self._failed(name, "crash")

    def _failed(self, name: str, what: str) -> Outcome:
        self._end(name)
        return Outcome(None, what)

    def _start(self, name: str) -> tuple[BaseProcess, Connection]:
        mine, theirs = self._context.Pipe()
        process = self._context.Process(target=work, args=(name, theirs), daemon=True)
        process.start()
        theirs.close()
        mine.recv()  # it is ready
        self._processes[name] = (process, mine)
        return self._processes[name]

    def _end(self, name: str) -> None:
        process, pipe = self._processes.pop(name)
        pipe.close()
        process.kill()
        process.join()
