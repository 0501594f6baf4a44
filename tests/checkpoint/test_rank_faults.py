"""Ranks that are killed, that stop, that are interrupted or that never come: the others end, say why, and a restart goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest

from fastmatch._internal import ranks
from fastmatch.checkpoint.journal import journal_path
from fastmatch.cli.main import main
from helpers.llama_pair import contents, write_llama_pair
from helpers.ranked import CommandOnRanks

pytest.importorskip("transformers")

PATIENT = 300
"""Seconds that ranks wait for each other where a fault must be found without the timeout."""


def align(*arguments):
    """Run the command and return its status."""
    return main(["align", *map(str, arguments)])


def align_until(number, moment, hit, *arguments):
    """Run the command, whose ranks ``hit`` send themselves a signal before their exchange of a number."""
    exchange, left = ranks._Group.exchange, [moment]

    def counted(self, value, what):
        left[0] -= 1
        if self.rank in hit and not left[0]:
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
def seconds(folder):
    """The seconds of an undisturbed run of three ranks, which writes ``out``."""
    begun = time.monotonic()
    run = CommandOnRanks(folder, 3, align, *arguments_of(folder, "out"), timeout=PATIENT)
    run.end()
    assert run.status == [0, 0, 0]
    return time.monotonic() - begun


def arguments_of(folder, out):
    return [folder / "a", folder / "b", "--merge", "0.25", "--out", folder / out]


def go_on(folder, out, size):
    """Repeat a command with another number of ranks, and return the files that it writes."""
    run = CommandOnRanks(folder, size, align, *arguments_of(folder, out), "--resume", timeout=PATIENT)
    said = run.end()
    assert run.status == [0] * size, said
    return contents(folder / out)


def test_the_others_end_when_a_rank_is_killed_and_a_restart_goes_on(folder, seconds):
    moment, hit = random.randint(2, 10), random.randint(0, 2)
    print(f"moment {moment}, rank {hit}")
    arguments = arguments_of(folder, "killed")
    run = CommandOnRanks(folder, 3, align_until, signal.SIGKILL, moment, [hit], *arguments, timeout=PATIENT)
    said = run.end()
    for rank in {0, 1, 2} - {hit}:
        assert run.status[rank] == 2, said
        assert f"rank {hit}" in said[rank], said
        assert "does not answer" in said[rank], said
    assert run.status[hit] == -signal.SIGKILL
    if (folder / "killed").exists():  # it had its name before the rank was killed
        assert contents(folder / "killed") == contents(folder / "out")
        return
    journal = journal_path(folder / "killed")
    if journal.exists():
        assert json.loads(journal.read_bytes().splitlines()[0].rpartition(b" ")[0])["run"]
    assert go_on(folder, "killed", 2) == contents(folder / "out")


def test_a_rank_that_stops_ends_the_others_after_the_timeout(folder):
    arguments = arguments_of(folder, "stopped")
    run = CommandOnRanks(folder, 2, align_until, signal.SIGSTOP, 6, [1], *arguments, timeout=10)
    said = run.end(stopped=[1])
    assert run.status[0] == 2, said
    assert "rank 1 does not answer" in said[0]
    assert "no answer in 10 seconds" in said[0]
    assert not (folder / "stopped").exists()


def test_a_rank_that_never_comes_is_named_by_all_others(folder):
    run = CommandOnRanks(folder, 3, align, *arguments_of(folder, "absent"), timeout=10, started=2)
    said = run.end()
    assert run.status == [2, 2]
    for text in said.values():
        assert "rank 2 did not come to the start of the run in 10 seconds" in text, said
    assert not (folder / "absent").exists()


def test_after_a_signal_to_all_ranks_the_first_says_what_is_left(folder):
    arguments = arguments_of(folder, "interrupted")
    run = CommandOnRanks(folder, 2, align_until, signal.SIGTERM, 8, [0, 1], *arguments, timeout=PATIENT)
    said = run.end()
    assert run.status == [128 + signal.SIGTERM] * 2, said
    assert said[0].count("ended by SIGTERM; nothing is half-written") == 1
    assert said[1] == ""
    assert not (folder / "interrupted").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_a_rank_that_is_killed_at_any_time_leaves_a_complete_output_or_none(folder, seconds, number):
    generator = random.Random(number)
    hit, moment, size = generator.randrange(3), generator.random() * seconds, generator.choice((1, 2, 4))
    out = f"killed{number}"
    run = CommandOnRanks(folder, 3, align, *arguments_of(folder, out), timeout=PATIENT)
    time.sleep(moment)
    run.ranks[hit].kill()
    said = run.end()
    if run.status[hit] == 0:  # it had ended before
        assert run.status == [0, 0, 0]
    elif any(run.status[rank] for rank in {0, 1, 2} - {hit}):
        for rank in {0, 1, 2} - {hit}:
            if run.status[rank]:
                assert f"rank {hit}" in said[rank], said
    if (folder / out).exists():
        assert contents(folder / out) == contents(folder / "out")
    else:
        assert go_on(folder, out, size) == contents(folder / "out")
