"""The threads of CPU kernels: in forked children, in several threads at once, after the main thread, and their number."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from fastmatch_kernels._numba import parallel
from fastmatch_kernels.ops import channel_affine, moments, permute_merge


@pytest.fixture
def two_threads(monkeypatch):
    """Two threads, on a machine with one core too."""
    monkeypatch.setattr(parallel, "threads", lambda: 2)


def test_blocks_cover_the_rows_once_whatever_their_number(two_threads):
    for n in (1, 2, 7, 100):
        seen: list[int] = []
        parallel.over_rows(n, 1 << 20, lambda lo, hi, seen=seen: seen.extend(range(lo, hi)), 1 << 10)
        assert sorted(seen) == list(range(n))
    empty: list[tuple[int, int]] = []
    parallel.over_rows(0, 0, lambda lo, hi: empty.append((lo, hi)))
    assert empty == [(0, 0)]


def test_two_threads_work_at_the_same_time(two_threads):
    both = threading.Barrier(2, timeout=60)
    parallel.over_blocks([0, 1, 2], lambda lo, hi: both.wait())


def test_an_error_is_raised_after_the_running_blocks_and_ends_the_others(two_threads):
    begun: list[int] = []
    both = threading.Barrier(2, timeout=60)

    def work(lo: int, hi: int) -> None:
        begun.append(lo)
        if lo < 2:
            both.wait()
        raise ZeroDivisionError(f"block {lo}")

    with pytest.raises(ZeroDivisionError, match="block"):
        parallel.over_blocks(range(101), work)
    assert len(begun) < 10


def test_a_block_may_have_blocks_of_its_own(two_threads):
    seen: list[int] = []
    parallel.over_blocks(
        [0, 10, 20, 30],
        lambda lo, hi: parallel.over_blocks(range(lo, hi + 1), lambda a, b: seen.append(a)),
    )
    assert sorted(seen) == list(range(30))


def test_kernels_give_the_same_numbers_in_one_thread_and_in_several_callers_of_two(monkeypatch):
    x, y = torch.randn(40, 33, 20, 21), torch.randn(40, 33, 20, 21)
    w, v, order = torch.randn(700, 601), torch.randn(700, 601), torch.randperm(601)
    goal = torch.linspace(0.5, 1, 33)

    def results() -> list[torch.Tensor]:
        found = []
        for a, b in ((x, y), (x.contiguous(memory_format=torch.channels_last), y)):
            found += [*channel_affine(a, goal, goal), moments(a, b).settle().covariance()]
        return [*found, permute_merge([w, v], [0.25, 0.75], None, [None, order])]

    monkeypatch.setattr(parallel, "threads", lambda: 1)
    wanted = results()
    monkeypatch.setattr(parallel, "threads", lambda: 2)
    got: list[list[torch.Tensor]] = []
    callers = [threading.Thread(target=lambda: got.append(results())) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(120)
    assert len(got) == 3
    for found in got:
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)


FORKED = """
import os, torch
from fastmatch_kernels._numba import parallel
from fastmatch_kernels.ops import moments, permute_merge
parallel.threads = lambda: 2
torch.set_num_threads(2)
a, b, order = torch.randn(800, 800), torch.randn(800, 800), torch.randperm(800)
merged = permute_merge([a, b], [0.5, 0.5], [None, order])
found = moments(a, b).settle().covariance()
for _ in range(2):  # a child, and a child of the child
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # torch's own operations would wait for threads that the child does not have
        assert torch.allclose(moments(a, b).settle().covariance(), found)
        assert torch.equal(permute_merge([a, b], [0.5, 0.5], [None, order]), merged)
        assert parallel._pool._started == 1
    else:
        assert os.waitpid(child, 0)[1] == 0
        break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_has_threads_of_its_own(numba_programs):
    done = numba_programs.run(FORKED)
    assert done.returncode == 0, done.stderr


COMPILING = """
import os, threading, time, numpy as np
from fastmatch_kernels._numba.cache import njit
from numba.core.compiler_lock import global_compiler_lock

@njit(nogil=True, cache=False)
def total(x):
    return x.sum()

held = threading.Event()
def compile_slowly():
    with global_compiler_lock:
        held.set()
        time.sleep(0.5)

threading.Thread(target=compile_slowly).start()
held.wait()
child = os.fork()
if child == 0:
    os._exit(total(np.ones(3)) != 3)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_can_compile_that_was_forked_while_another_thread_compiled(numba_programs):
    done = numba_programs.run(COMPILING)
    assert done.returncode == 0, done.stderr


LATE = """
import atexit, sys, threading, time, torch
from fastmatch_kernels._numba import parallel
from fastmatch_kernels.ops import permute_merge
parallel.threads = lambda: 2
a = torch.randn(800, 800)
if {warm}:
    permute_merge([a, a], [0.5, 0.5])
def work(wait):
    time.sleep(wait)
    print(torch.equal(permute_merge([a, a], [0.5, 0.5]), a))
{places}
"""
PLACES = {
    "after the main thread": "threading.Thread(target=work, args=(0.3,)).start()",
    "atexit": "atexit.register(work, 0)",
}


@pytest.mark.parametrize("places", [list(PLACES), ["atexit"]])
@pytest.mark.parametrize("warm", [True, False])
def test_kernels_run_while_the_interpreter_ends(numba_programs, places, warm):
    done = numba_programs.run(LATE.format(warm=warm, places="\n".join(PLACES[place] for place in places)))
    assert done.stdout.split() == ["True"] * len(places), done.stderr


def test_where_no_thread_can_be_started_the_caller_does_the_work(two_threads, monkeypatch):
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(parallel, "_pool", parallel._Pool())
    monkeypatch.setattr(threading.Thread, "start", refuse)
    seen: list[int] = []
    parallel.over_blocks(range(11), lambda lo, hi: seen.append(lo))
    assert seen == list(range(10))


def test_kernels_use_torchs_number_of_threads_and_leave_it(numba_programs):
    done = numba_programs.run(
        "import torch\n"
        "from fastmatch_kernels._numba import parallel\n"
        "from fastmatch_kernels.ops import channel_affine, moments, permute_merge\n"
        "for count in (1, 2):\n"
        "    torch.set_num_threads(count)\n"
        "    x = torch.randn(64, 8, 30, 30)\n"
        "    channel_affine(x, torch.zeros(8), torch.ones(8))\n"
        "    channel_affine(x.contiguous(memory_format=torch.channels_last), torch.zeros(8), torch.ones(8))\n"
        "    moments(x, x).settle()\n"
        "    permute_merge([x, x], [0.5, 0.5])\n"
        "    assert torch.get_num_threads() == count\n"
        "    assert parallel.threads() <= count\n",
        environment={**os.environ, "NUMBA_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
