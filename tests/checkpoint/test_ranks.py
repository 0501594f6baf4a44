"""A directory aligned by 1 and 2 ranks (nightly: 3 and 4 too) through the command line: the same files, or an error and no file."""

from __future__ import annotations

import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fastmatch._internal.ranks import current
from fastmatch.checkpoint import Checkpoint, align_checkpoints
from fastmatch.checkpoint.journal import Journal, journal_path
from fastmatch.cli.main import main
from helpers.llama_pair import contents, save_distributed, write_llama_pair
from helpers.ranked import on_ranks

pytest.importorskip("transformers")

SIZES = [pytest.param((1, 2), id="2"), pytest.param((1, 2, 3, 4), id="4", marks=pytest.mark.slow)]


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


def resume(folder, sizes):
    """Go on from the journal that a number of ranks left; another number of them does it."""
    size = current().size
    left = size % sizes[-1] + 1
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


def reads(folder, out):
    """The objective of an alignment, and how often this process has read a tensor."""
    read, names = Checkpoint._read, []

    def counted(self, name):
        names.append(name)
        return read(self, name)

    Checkpoint._read = counted
    found = align_checkpoints(folder / "a", folder / "b", folder / out, progress=False)
    Checkpoint._read = read
    return found.matching.objective, len(names)


def divide(folder):
    """Write B by torch.distributed.checkpoint in parts of two ranks, and align it."""
    mesh = init_device_mesh("cpu", (2,))
    divided = partial(distribute_tensor, device_mesh=mesh)
    save_distributed(folder / "b", folder / "divided", lambda t: divided(t, placements=[Shard(t.ndim - 1)]))
    align_checkpoints(folder / "a", folder / "divided", folder / "from parts", progress=False)


def every(folder, sizes):
    if current().size == 2:
        divide(folder)
    read = reads(folder, f"read{current().size}")
    return {"work": work(folder), "full": full(folder), "read": read}


@pytest.fixture(scope="module", params=SIZES)
def sizes(request):
    return request.param


@pytest.fixture(scope="module")
def folder(sizes, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints")
    write_llama_pair(path)
    return path


@pytest.fixture(scope="module")
def results(folder, sizes, tmp_path_factory):
    return on_ranks(tmp_path_factory.mktemp("ranks"), sizes, [every, resume], folder, sizes)


@pytest.fixture(scope="module")
def expected(folder):
    assert command(folder, "out", "--merge", "0.25")[0] == 0
    return contents(folder / "out")


def test_every_number_of_ranks_writes_the_files_of_one_process(sizes, folder, results, expected):
    for size in sizes:
        assert contents(folder / f"out{size}") == expected
        first, *others = [value["work"]["whole"] for value in results[0][size]]
        assert first[0] == 0
        assert "wrote" in first[1]
        assert others == [(0, "", "")] * (size - 1)  # rank 0 speaks


def test_ranks_read_together_what_one_process_reads_and_find_its_objective_to_the_last_bit(
    sizes, folder, results
):
    objective, count = reads(folder, "read")
    for size in sizes:
        found = [value["read"] for value in results[0][size]]
        assert {one for one, _ in found} == {objective}
        assert sum(number for _, number in found) <= count


def test_tensors_in_parts_of_two_ranks_are_aligned_by_two_ranks_as_by_one_process(folder, results):
    whole = align_checkpoints(folder / "a", folder / "b", folder / "whole", progress=False)
    found = align_checkpoints(folder / "a", folder / "divided", folder / "by one", progress=False)
    assert found.matching.objective == whole.matching.objective
    assert contents(folder / "by one") == contents(folder / "from parts")
    plain, written = Checkpoint(folder / "whole"), Checkpoint(folder / "by one")
    assert plain.keys() == written.keys()
    assert all(torch.equal(plain[name], written[name]) for name in plain)
    assert {len(stored.parts) for stored in written.distributed.tensors.values()} == {2}


def test_an_error_that_all_ranks_find_is_said_once(sizes, results):
    for size in sizes:
        first, *others = [value["work"]["again"] for value in results[0][size]]
        assert first[0] == 2
        assert "exists" in first[2]
        assert [status for status, _, _ in others] == [2] * (size - 1)
        assert not any(text for _, _, text in others)


def test_another_number_of_ranks_goes_on_from_the_journal_to_the_same_files(sizes, folder, results, expected):
    first, second = results
    for size in sizes:
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


def test_a_full_disk_of_one_rank_leaves_no_output_and_is_named_by_all(sizes, folder, results):
    for size in sizes:
        assert not (folder / f"full{size}").exists()
        for rank, value in enumerate(results[0][size]):
            status, _, said = value["full"]
            assert status == 2
            assert "No space left" in said
            assert rank == size - 1 or f"rank {size - 1} failed: OSError" in said


@pytest.mark.slow
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
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "0")
    assert main(["libraries"]) == 2
    assert "runs in one process" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert main(["libraries"]) == 2
    assert not capsys.readouterr().err  # rank 0 has said it
