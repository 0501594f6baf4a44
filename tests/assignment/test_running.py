"""How the solvers behave in a process: compilation and its line, Ctrl-C, the lock, memory, indices beyond 2^31."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest

from fastmatch.assignment import CandidateLists, DenseShortlists, FactorCost, _compile, solve
from helpers.networks import fresh_seed


def test_a_factor_cost_does_not_load_torchs_compiler(programs):
    code = (
        "import sys, numpy as np; from fastmatch.assignment import CandidateLists, FactorCost, solve; a = np.eye(60);"
        "solve(FactorCost([(a, a)]), solver=CandidateLists()); print('torch._dynamo' in sys.modules)"
    )
    assert programs.run(code, check=True).stdout.strip() == "False"


@pytest.mark.slow
def test_compiling_is_announced_and_loading_is_not(programs, tmp_path):
    code = (
        "import numpy as np; from fastmatch.assignment import DenseShortlists, solve;"
        "solve(np.eye(300, dtype=np.float32), solver=DenseShortlists())"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    first = programs.run(code, environment=environment, check=True)
    assert "compiling the assignment kernels for float32" in first.stderr
    assert "once per installation and version of the sources" in first.stderr
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")}
    assert files
    programs.run(code, environment=environment, check=True)
    assert {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")
    } == files  # nothing compiled again


def test_a_kernel_that_is_long_in_loading_is_not_announced_as_compiling(monkeypatch, caplog):
    monkeypatch.setattr(_compile, "SILENT_SECONDS", 0.02)
    _compile.prepared("a kernel", object(), lambda: time.sleep(0.2))
    assert not caplog.records
    begun = []
    monkeypatch.setattr(_compile, "_compiled", lambda: len(begun))
    _compile.prepared("a kernel", object(), lambda: begun.append(1) or time.sleep(0.2))
    assert caplog.messages == [
        "compiling a kernel (6 to 25 s on a slow processor, once per installation and version of the sources; "
        "fastmatch warm-up does it beforehand)"
    ]


INTERRUPTED = """
import _thread, signal, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
import numpy as np
from fastmatch.assignment import CandidateLists, DenseShortlists, FactorCost, solve, solve_batched
g = np.random.default_rng(0)
{setup}
asked = []
def interrupt():
    asked.append(time.process_time())
    _thread.interrupt_main()
threading.Timer(0.7, interrupt).start()
try:
    while not asked or time.process_time() - asked[0] < 20:
        {call}
    raise SystemExit("not interrupted")
except KeyboardInterrupt:
    print(time.process_time() - asked[0])
"""

LONG = {
    "matrix": (
        "x, y = (g.standard_normal((3000, 8), np.float32) * np.exp(g.standard_normal((3000, 1))).astype(np.float32)"
        " for _ in range(2)); c = x @ y.T; solve(c[:300, :300], solver=DenseShortlists())",
        "solve(c)",
    ),
    "stack": (
        "c = g.standard_normal((8000, 64, 64), np.float32); solve_batched(c[:1])",
        "solve_batched(c)",
    ),
    "factors": (
        "c = FactorCost([tuple(g.standard_normal((6000, 8), np.float32) for _ in range(2))]);"
        " solve(FactorCost([tuple(g.standard_normal((200, 8), np.float32) for _ in range(2))]), solver=CandidateLists())",
        "solve(c, solver=CandidateLists())",
    ),
}


@pytest.mark.parametrize(
    "kind", [kind if kind == "matrix" else pytest.param(kind, marks=pytest.mark.slow) for kind in LONG]
)
def test_an_interrupt_is_heard_within_a_second_of_work(programs, kind):
    setup, call = LONG[kind]
    done = programs.run(INTERRUPTED.format(setup=setup, call=call), check=True)
    # Processor time, which other work on the machine does not lengthen.
    assert float(done.stdout) < 1.0


def test_the_lock_is_released_while_a_kernel_runs():
    """Another thread goes on ticking inside one kernel call; it would stand still if the lock were held."""
    from fastmatch_kernels.lap import state
    from fastmatch_kernels.lap.augment import augment
    from fastmatch_kernels.lap.rows import list_rows

    seed = fresh_seed()
    n = 700
    g = np.random.default_rng(seed)
    cost = np.outer(np.arange(1.0, n + 1), np.arange(1.0, n + 1))[g.permutation(n)]  # long paths
    solve(cost[:5, :5], solver=DenseShortlists())
    v = cost.min(axis=0)
    lists, rows = tuple(state.matrix_lists(n, cost.dtype)), np.arange(n)
    list_rows(cost, 1.0, rows, v, lists)
    matching, paths = tuple(state.new_matching(n, n)), tuple(state.new_paths(n, n))
    ticks: list[float] = []
    over = threading.Event()

    def tick() -> None:
        while not over.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    done, waits = augment(
        cost,
        1.0,
        v,
        lists,
        matching,
        rows,
        0,
        1 << 60,
        tuple(state.new_refills(n)),
        0,
        paths,
        np.zeros(4, np.int64),
    )
    end = time.perf_counter()
    over.set()
    thread.join()
    assert (done, waits) == (n, 0)
    inside = [t for t in ticks if begin < t < end]
    assert len(inside) >= 3, (end - begin, len(ticks))


MEMORY = """
import resource, sys
import numpy as np
from fastmatch.assignment import DenseShortlists, solve
n = int(sys.argv[1])
g = np.random.default_rng(0)
solve(g.standard_normal((600, 600), np.float32), solver=DenseShortlists())
cost = np.empty((n, n), np.float32)
for row in cost:
    row[:] = g.standard_normal(n, np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
found = solve(cost)
assert found.gap <= found.gap_bound
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / cost.nbytes)
"""


@pytest.mark.parametrize("n", [4096, pytest.param(16384, marks=pytest.mark.slow)])
def test_a_solve_adds_a_fifth_of_the_matrix_at_most(programs, n):
    done = programs.run(MEMORY, str(n), check=True)
    assert float(done.stdout) <= 0.2


@pytest.mark.slow
def test_a_planted_permutation_of_fifty_thousand(monkeypatch):
    """50,000 x 50,000 entries have indices beyond 2^31; none of them is stored."""
    seed = fresh_seed()
    g = np.random.default_rng(seed)
    n = 50_000
    rows = g.standard_normal((n, 16), np.float32)
    planted = g.permutation(n)
    found = solve(FactorCost([(rows, rows[planted])], metric="l2"), solver=CandidateLists())
    assert np.array_equal(planted[found.col_ind], np.arange(n))
    assert found.gap <= found.gap_bound


@pytest.mark.slow
def test_a_permuted_copy_of_twenty_thousand():
    seed = fresh_seed()
    g = np.random.default_rng(seed)
    n = 20_000
    rows = g.standard_normal((n, 64), np.float32)
    planted = g.permutation(n)
    found = solve(FactorCost([(rows, rows[planted])]), maximize=True)
    assert np.array_equal(planted[found.col_ind], np.arange(n))
    assert found.gap <= found.gap_bound
