"""A directory aligned by 1, 2, 3 and 4 ranks through the command line: the same files, or an error and no file."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest
import torch

from fastmatch._internal.ranks import current
from fastmatch.checkpoint import Checkpoint, trace_config
from fastmatch.checkpoint.journal import Journal, journal_path
from fastmatch.checkpoint.writer import write_like
from fastmatch.cli.main import main
from fastmatch.permutations.apply import permute_tensor
from helpers.ranked import on_ranks

transformers = pytest.importorskip("transformers")

SIZES = (1, 2, 3, 4)


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def command(folder, out, *options):
    """Run the command in this process and return its status and what it prints."""
    printed, errors = StringIO(), StringIO()
    with redirect_stdout(printed), redirect_stderr(errors):
        status = main(["align", str(folder / "a"), str(folder / "b"), "--out", str(folder / out), *options])
    return status, printed.getvalue(), errors.getvalue()


def work(folder):
    """All that these tests look at, in one start of the processes."""
    ranks = current()
    whole = command(folder, f"out{ranks.size}", "--merge", "0.25")
    again = command(folder, f"out{ranks.size}")

    # The first run ends after three steps; another number of ranks goes on from its journal.
    add, steps = Journal.add, []

    def add_three(self, name, step):
        if len(steps) == 3:
            raise OSError("no space left on the journal's disk")
        steps.append(name)
        add(self, name, step)

    Journal.add = add_three
    stopped = command(folder, f"resumed{ranks.size}", "--merge", "0.25")
    Journal.add = add
    return {"whole": whole, "again": again, "stopped": stopped, "steps": steps}


def resume(folder):
    """Go on from the journal that a number of ranks left; another number of them does it."""
    size = current().size
    left = {1: 4, 2: 3, 3: 1, 4: 2}[size]
    repeated = []
    step = Journal.step

    def note(self, name, compute):
        repeated.append(bool(self._waiting))
        return step(self, name, compute)

    Journal.step = note
    found = command(folder, f"resumed{left}", "--merge", "0.25", "--resume")
    Journal.step = step
    return found, sum(repeated)


def full(folder):
    """The last rank's disk is full while it writes its files."""
    from fastmatch.checkpoint import writer

    ranks, write = current(), writer.write_safetensors

    def failing(*args):
        if ranks.rank == ranks.size - 1:
            raise OSError(28, "No space left on device", "model-00001.safetensors")
        return write(*args)

    writer.write_safetensors = failing
    found = command(folder, f"full{ranks.size}")
    writer.write_safetensors = write
    return found


def every(folder):
    return {"work": work(folder), "full": full(folder)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """a and b: sharded directories of a small Llama, b a with every group moved, and noise."""
    path = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path / "a", max_shard_size="8KB")
    checkpoint, spec = Checkpoint(path / "a"), trace_config(path / "a")
    permutations = spec.random()

    def moved(name):
        tensor = permute_tensor(checkpoint[name], name, spec, permutations)
        return tensor + 0.3 * tensor.std() * torch.randn_like(tensor) if tensor.ndim > 1 else tensor

    write_like(checkpoint, path / "b", moved)
    return path


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory):
    return on_ranks(tmp_path_factory.mktemp("ranks"), SIZES, [every, resume], folder)


@pytest.fixture(scope="module")
def expected(folder):
    assert command(folder, "out", "--merge", "0.25")[0] == 0
    return contents(folder / "out")


def test_every_number_of_ranks_writes_the_files_of_one_process(folder, results, expected):
    for size in SIZES:
        assert contents(folder / f"out{size}") == expected
        first, *others = [value["work"]["whole"] for value in results[0][size]]
        assert first[0] == 0
        assert "wrote" in first[1]
        assert others == [(0, "", "")] * (size - 1)  # rank 0 speaks


def test_an_error_that_all_ranks_find_is_said_once(results):
    for size in SIZES:
        first, *others = [value["work"]["again"] for value in results[0][size]]
        assert first[0] == 2
        assert "exists" in first[2]
        assert [status for status, _, _ in others] == [2] * (size - 1)
        assert not any(text for _, _, text in others)


def test_another_number_of_ranks_goes_on_from_the_journal_to_the_same_files(folder, results, expected):
    first, second = results
    for size in SIZES:
        for rank, value in enumerate(first[size]):
            status, _, said = value["work"]["stopped"]
            assert status == 2
            assert "the journal's disk" in said
            assert rank == 0 or "rank 0 failed: OSError" in said
        assert len(first[size][0]["work"]["steps"]) == 3
        assert [found[0] for found, _ in second[size]] == [0] * size
        assert second[size][0][1] >= 3  # steps came from the journal
        assert contents(folder / f"resumed{size}") == expected
        assert not journal_path(folder / f"resumed{size}").exists()


def test_a_full_disk_of_one_rank_leaves_no_output_and_is_named_by_all(folder, results):
    for size in SIZES:
        assert not (folder / f"full{size}").exists()
        for rank, value in enumerate(results[0][size]):
            status, _, said = value["full"]
            assert status == 2
            assert "No space left" in said
            assert rank == size - 1 or f"rank {size - 1} failed: OSError" in said


def test_torchrun_aligns(folder, expected):
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "fastmatch",
    ]
    command = [*run, "align", folder / "a", folder / "b", "--out", folder / "run", "--merge", "0.25"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    assert contents(folder / "run") == expected


def test_commands_that_run_in_one_process_say_so_to_a_launcher(monkeypatch, capsys):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["libraries"]) == 2
    assert "runs in one process" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from fastmatch._internal import ranks
from fastmatch.cli.main import main
exchange, left = ranks._Group.exchange, [int(sys.argv[1])]
def counted(self, value, what):
    left[0] -= 1
    if self.rank == 1 and not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return exchange(self, value, what)
ranks._Group.exchange = counted
sys.exit(main(["align", *sys.argv[2:]]))
"""


def test_the_others_end_when_a_rank_is_killed_and_a_restart_goes_on(folder, expected):
    moment = random.randint(2, 14)
    print(f"moment {moment}")
    out, arguments = folder / "killed", [str(folder / "a"), str(folder / "b"), "--merge", "0.25"]
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "FASTMATCH_TIMEOUT": "300"}
    environment["MASTER_PORT"] = str(free_port())
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, str(moment), *arguments, "--out", str(out)],
            env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [run.communicate(timeout=600)[1] for run in runs]
    assert runs[1].returncode == -signal.SIGKILL
    assert runs[0].returncode == 2, said[0]
    assert "rank 1 does not answer" in said[0]
    assert not out.exists()
    journal = journal_path(out)
    if journal.exists():
        assert json.loads(journal.read_bytes().splitlines()[0].rpartition(b" ")[0])["run"]
    assert main(["align", *arguments, "--out", str(out), "--resume"]) == 0
    assert contents(out) == expected


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
