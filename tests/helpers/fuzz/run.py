"""Random assignment problems against scipy, in processes that may crash; :mod:`helpers.fuzz` says how to run them."""

from __future__ import annotations

import argparse
import multiprocessing
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import numpy as np

from bench.lib.timed_solves import processor_seconds
from helpers.fuzz.draw import problem
from helpers.fuzz.judge import FLOOR, TIMES, judge

LOADING = 30.0
"""Seconds of processor time that compiling kernels may take within a solve."""


def work(seed: int, first: int, last: int, largest: int | None, pipe: Connection) -> None:
    """Judge problems from ``first`` up to ``last``. Tell each one's number, what ours may take, and each finding."""
    warnings.simplefilter("ignore")
    for number in range(first, last):
        pipe.send(("problem", number))
        found = problem(seed, number, largest)
        for told in judge(found, seed):
            if isinstance(told, float):
                pipe.send(("time", told))
            else:
                pipe.send(("finding", (number, *told, found.told)))
    pipe.send(("end", last))


def findings(
    seed: int,
    last: int,
    largest: int | None = None,
    until: float = float("inf"),
    work: Callable[..., None] = work,
    loading: float = LOADING,
) -> Iterator[tuple]:
    """Yield (number, kind, detail, description) of what is wrong, and (number, "done", ...) at the end.

    A process that crashes, or that takes more than its time, is replaced by one that goes on after that problem.

    Args:
        seed: of all problems.
        last: the number of the problem after the last.
        largest: bound on their sides.
        until: a time of the monotonic clock.
        work: what the processes run.
        loading: seconds of processor time that compiling may take within a solve.
    """
    first = 0
    context = multiprocessing.get_context("spawn")
    while first < last and time.monotonic() < until:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(seed, first, last, largest, theirs), daemon=True)
        process.start()
        theirs.close()
        number, allowed, used = first, None, 0.0
        kind = ""
        try:
            while time.monotonic() < until:
                if not ours.poll(0.5):
                    if allowed is not None and processor_seconds(process.pid) - used > allowed:
                        kind = "no end"
                        break
                    continue
                what, value = ours.recv()
                if what == "problem":
                    number, allowed = value, None
                elif what == "time":
                    allowed, used = loading + TIMES * value + FLOOR, processor_seconds(process.pid)
                elif what == "finding":
                    yield value
                else:
                    number = last
                    break
        except (EOFError, ConnectionError):
            process.join(10)
            kind = f"crash ({process.exitcode})"
        process.kill()
        process.join()
        if kind:
            yield number, kind, f"allowed {allowed}", problem(seed, number, largest).told
        first = number + 1 if kind or number < last else last
    yield first, "done", "", ""


def run(seed: int, problems: int, seconds: float = float("inf"), largest: int | None = None) -> Counter[str]:
    """Judge so many problems, or as many as the seconds allow. Print every finding; return the count of each kind."""
    until = time.monotonic() + seconds
    counts: Counter[str] = Counter()
    for number, kind, detail, told in findings(seed, problems, largest, until):
        if kind == "done":
            print(
                f"seed {seed}: {number} problems; "
                + (", ".join(f"{v} {k}" for k, v in counts.items()) or "no fault")
            )
        else:
            counts[kind] += 1
            print(f"seed {seed}, problem {number}: {kind}: {detail}; {told}", flush=True)
    return counts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m helpers.fuzz", description="Random assignment problems against scipy."
    )
    parser.add_argument("--problems", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, help="drawn by chance if absent, and printed")
    parser.add_argument("--largest", type=int, help="bound on both sides")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="judge one problem in this process")
    options = parser.parse_args(arguments)
    seed = options.seed
    if seed is None:
        seed = int(np.random.SeedSequence().generate_state(1)[0])
    if options.only is None:
        return int(bool(run(seed, options.problems, options.seconds, options.largest)))
    found = problem(seed, options.only, options.largest)
    print(found.told, flush=True)
    told = [finding for finding in judge(found, seed) if not isinstance(finding, float)]
    print("\n".join(f"{kind}: {detail}" for kind, detail in told) or "no fault")
    return int(bool(told))


if __name__ == "__main__":
    raise SystemExit("this is a part of the fuzz: run python -m helpers.fuzz with these options")
