"""Ranks that are killed, that stop, that are interrupted or that never come: the others end, say why, and a restart goes on."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import threading

import pytest

from fastmatch._internal import ranks
from fastmatch.checkpoint.journal import journal_path
from fastmatch.cli.main import main
from helpers.llama_pair import contents, write_llama_pair
from helpers.networks import fresh_seed
from helpers.ranked import CommandOnRanks

pytest.importorskip("transformers")

PATIENT = 300
"""Seconds that ranks wait for each other where a fault must be found without the timeout."""


def align(*arguments):
    """Run the command and return its status."""
    return main(["align", *map(str, arguments)])


def align_until(number, moment, hit, delay, *arguments):
    """Run the command, whose ranks ``hit`` send themselves a signal before their exchange of a number, or seconds later."""
    exchange, left = ranks._Group.exchange, [moment]

    def counted(self, value, what):
        left[0] -= 1
        if self.rank in hit and not left[0]:
            if delay:
                threading.Timer(delay, os.kill, (os.getpid(), number)).start()
            else:
                os.kill(os.getpid(), number)
        return exchange(self, value, what)

    ranks._Group.exchange = counted  # in a process of its own
    return align(*arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints")
    write_llama_pair(path)
    return path


@pytest.fixture(scope="module")
def whole(folder):
    """What one process writes."""
    assert align(*arguments_of(folder, "out")) == 0
    return contents(folder / "out")


@pytest.fixture(scope="module")
def waiting(folder):
    """Runs whose ranks wait ten seconds for one that does not answer; other tests run meanwhile."""
    arguments = (signal.SIGSTOP, 6, [1], 0, *arguments_of(folder, "stopped"))
    absent = arguments_of(folder, "absent")
    runs = {
        "stopped": CommandOnRanks(folder, 2, align_until, *arguments, timeout=10),
        "absent": CommandOnRanks(folder, 3, align, *absent, timeout=10, started=2),
    }
    yield runs
    # Where only other tests were chosen, the process would wait for a stopped rank at its end.
    for run in runs.values():
        for rank in run.ranks:
            rank.kill()
            rank.join()


def arguments_of(folder, out):
    return [folder / "a", folder / "b", "--merge", "0.25", "--out", folder / out]


def go_on(folder, out, size):
    """Repeat a command with another number of ranks, and return the files that it writes."""
    run = CommandOnRanks(folder, size, align, *arguments_of(folder, out), "--resume", timeout=PATIENT)
    said = run.end()
    assert run.status == [0] * size, said
    return contents(folder / out)


@pytest.mark.slow
def test_the_others_end_when_a_rank_is_killed_and_a_restart_goes_on(folder, whole):
    moment, hit = random.randint(2, 10), random.randint(0, 2)
    print(f"moment {moment}, rank {hit}")
    arguments = (signal.SIGKILL, moment, [hit], 0, *arguments_of(folder, "killed"))
    run = CommandOnRanks(folder, 3, align_until, *arguments, timeout=PATIENT)
    said = run.end()
    for rank in {0, 1, 2} - {hit}:
        assert run.status[rank] == 2, said
        assert hit in named(said[rank]), said
        assert "does not answer" in said[rank], said
    assert run.status[hit] == -signal.SIGKILL
    if (folder / "killed").exists():  # it had its name before the rank was killed
        assert contents(folder / "killed") == whole
        return
    journal = journal_path(folder / "killed")
    if journal.exists():
        assert json.loads(journal.read_bytes().splitlines()[0].rpartition(b" ")[0])["run"]
    assert go_on(folder, "killed", 2) == whole


@pytest.mark.slow
def test_a_rank_that_stops_ends_the_others_after_the_timeout(folder, waiting):
    run = waiting["stopped"]
    said = run.end(stopped=[1])
    assert run.status[0] == 2, said
    assert "rank 1 does not answer" in said[0]
    assert "no answer in 10 seconds" in said[0]
    assert not (folder / "stopped").exists()


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named_by_all_others(folder, waiting):
    run = waiting["absent"]
    said = run.end()
    assert run.status == [2, 2]
    for text in said.values():
        assert "rank 2 did not come to the start of the run in 10 seconds" in text, said
    assert not (folder / "absent").exists()


def test_after_a_signal_to_all_ranks_the_first_says_what_is_left(folder):
    arguments = (signal.SIGTERM, 8, [0, 1], 0, *arguments_of(folder, "interrupted"))
    run = CommandOnRanks(folder, 2, align_until, *arguments, timeout=PATIENT)
    said = run.end()
    assert run.status == [128 + signal.SIGTERM] * 2, said
    assert said[0].count("ended by SIGTERM; nothing is half-written") == 1
    assert said[1] == ""
    assert not (folder / "interrupted").exists()


def named(text):
    """The ranks that an error names: on a busy machine also ranks that are much slower than the one that says so."""
    return {int(n) for listed in re.findall(r"rank (\d+(?:, \d+)*)", text) for n in listed.split(", ")}


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_and_goes_on_with_other_numbers_of_ranks_ends_in_the_same_bits(
    folder, whole
):
    generator = random.Random(fresh_seed())
    out, kills, resumed = folder / "often killed", 0, 0
    while kills < 20:
        size = generator.randint(1, 4)
        moment, hit, delay = generator.randint(1, 24), generator.randrange(size), generator.random() * 0.2
        resumed += journal_path(out).exists()
        options = (*arguments_of(folder, out.name), "--resume")
        arguments = (signal.SIGKILL, moment, [hit], delay, *options)
        run = CommandOnRanks(folder, size, align_until, *arguments, timeout=PATIENT)
        said = run.end()
        if run.status[hit] == -signal.SIGKILL:
            kills += 1
            for rank in set(range(size)) - {hit}:
                assert run.status[rank] == 0 or (run.status[rank] == 2 and hit in named(said[rank])), said
        else:  # it was done before
            assert run.status == [0] * size, said
        if out.exists():
            assert contents(out) == whole
            shutil.rmtree(out)
    print(f"{resumed} runs went on from a journal")
    assert resumed
    assert go_on(folder, out.name, generator.randint(1, 4)) == whole
