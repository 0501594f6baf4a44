"""The journal belongs to one run: its tensors, its groups, its settings. It is read and written nowhere else."""

from __future__ import annotations

import json
import os
import weakref

import pytest
import torch

import fastmatch as fm
from fastmatch._internal.files import load_state, save_state
from fastmatch._internal.ranks import ALONE
from fastmatch.checkpoint import Checkpoint, WriteOptions, align_checkpoints
from fastmatch.checkpoint.journal import Journal, journal_path
from fastmatch.checkpoint.survey import survey
from helpers.networks import build, fresh_seed


@pytest.fixture
def run(tmp_path):
    """A function that aligns b.safetensors to a.safetensors, and the spec."""
    model, x = build("mlp", fresh_seed())
    spec = fm.PermutationSpec.trace(model, x)
    state = model.state_dict()
    noisy = {k: v + 0.5 * torch.randn_like(v) for k, v in state.items()}
    save_state(state, tmp_path / "a.safetensors")
    save_state(fm.Alignment(spec.random(), spec).apply(noisy), tmp_path / "b.safetensors")
    return lambda out="out", **options: align_checkpoints(
        *(tmp_path / f"{name}.safetensors" for name in ("a", "b", out)), **{"spec": spec, **options}
    )


@pytest.fixture
def interrupted(run, tmp_path, monkeypatch):
    """The journal of a run that failed when it wrote its output."""

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastmatch.checkpoint.align.write_like", fail)
        with pytest.raises(KeyboardInterrupt):
            run()
    return journal_path(tmp_path / "out.safetensors")


def test_a_resumed_run_computes_no_step_again_and_writes_the_same_bits(
    run, interrupted, tmp_path, monkeypatch
):
    run("undisturbed")
    monkeypatch.setattr(
        "fastmatch.matching.ascent.Ascent._solve", lambda *a, **k: pytest.fail("solved again")
    )
    run(resume=True)
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "undisturbed.safetensors").read_bytes()
    assert not interrupted.exists()


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_run_that_is_killed_after_any_step_ends_in_the_same_bits(run, interrupted, tmp_path, steps, caplog):
    """After none too: then nothing is known, and no group may be taken as solved."""
    run("undisturbed")
    lines = interrupted.read_bytes().splitlines(keepends=True)
    assert len(lines) > 4
    interrupted.write_bytes(b"".join(lines[: steps + 1]))
    run(resume=True)
    told = [
        message for message in caplog.messages if "taken over from the run that was interrupted" in message
    ]
    assert [message.rpartition(" ")[2] for message in told] == [str(steps)] * (steps > 0)
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "undisturbed.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["a", "b"])
def test_an_input_that_has_changed_is_named_even_if_size_and_time_have_not(run, interrupted, tmp_path, name):
    path = tmp_path / f"{name}.safetensors"
    times, state = path.stat(), load_state(path)
    first = next(iter(state))
    state[first].view(-1)[0] += 1
    save_state(state, path, force=True)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ValueError, match=rf"another run \(not the same: the tensors of {name.upper()}\)"):
        run(resume=True)


def test_inputs_that_have_moved_are_the_same(run, interrupted, tmp_path):
    for name in ("a", "b"):
        data = (tmp_path / f"{name}.safetensors").read_bytes()
        (tmp_path / f"{name}.safetensors").unlink()
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    run(resume=True)


def test_other_groups_are_named_and_other_ways_to_write_are_not_another_run(run, interrupted, tmp_path):
    model, x = build("mlp", 0)
    spec = fm.PermutationSpec.trace(model, x)
    with pytest.raises(ValueError, match=r"not the same: the groups"):
        run(resume=True, spec=spec.select(list(spec.groups)[:1]))
    run(resume=True, write=WriteOptions(dtype=torch.bfloat16))
    assert all(v.dtype == torch.bfloat16 for v in load_state(tmp_path / "out.safetensors").values())


@pytest.mark.parametrize("resume", [False, True])
def test_links_and_files_of_others_are_refused_and_left_alone(run, tmp_path, resume):
    journal, mine = journal_path(tmp_path / "out.safetensors"), tmp_path / "mine"
    mine.write_text("mine")
    for place, message in (
        (journal.symlink_to, "a symbolic link"),
        (journal.hardlink_to, "not a file of its own"),
    ):
        place(mine)
        with pytest.raises(ValueError, match=rf"\.out\.safetensors\.journal: is {message}"):
            run(resume=resume)
        journal.unlink()
    for text, message in (
        ("my notes", "is not a journal; remove it"),
        (
            '{"format": "fastmatch-journal-1", "run": {}}',
            "of an older version .* with the version that began it, or remove",
        ),
        ('{"format": "fastmatch-journal-99", "run": {}}', "of a newer version of fastmatch"),
    ):
        journal.write_text(text)
        with pytest.raises(ValueError, match=message):
            run(resume=resume)
        assert journal.read_text() == text
    journal.unlink()
    os.mkfifo(journal)
    with pytest.raises(ValueError, match="is not a file of its own"):
        run(resume=resume)
    assert mine.read_text() == "mine"
    assert not (tmp_path / "out.safetensors").exists()


def test_a_line_of_another_run_is_found(run, interrupted, tmp_path, monkeypatch):
    lines = interrupted.read_bytes().splitlines(keepends=True)
    for changed in (
        [lines[0], *lines[2:]],
        [lines[0], lines[1], lines[1]],
        [*lines[:2], *reversed(lines[2:])],
    ):
        interrupted.write_bytes(b"".join(changed))
        with pytest.raises(ValueError, match="is damaged, or a line of it belongs to another run"):
            run(resume=True)
    record = json.loads(lines[2].rpartition(b" ")[0])
    assert set(record) == {"group", "value", "permutations", "solution"}


def test_a_run_that_fails_before_its_first_step_leaves_no_journal(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Journal, "step", lambda *a: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        run()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_values_are_hashed_and_checked_with_one_tensor_of_each_in_memory(run, tmp_path, monkeypatch):
    alive, most = [], []
    read = Checkpoint._read

    def noted(self, name):
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        most.append(sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "_read", noted)
    a, b = (Checkpoint(tmp_path / f"{x}.safetensors") for x in "ab")
    first = survey(a, b, ALONE)
    assert len(most) == len(a) + len(b)
    assert max(most) <= 4  # the last ones are let go when the next have been read
    state = load_state(tmp_path / "a.safetensors")
    save_state(state, tmp_path / "c.pt")
    same = survey(Checkpoint(tmp_path / "c.pt"), b, ALONE)
    assert same == first
    name, tensor = list(state.items())[-1]
    assert first.sums[name] == pytest.approx(
        [
            float((x.double() * y.double()).sum())
            for x, y in ((tensor, tensor), (b[name], b[name]), (tensor, b[name]))
        ]
    )
    tensor.view(-1)[0] = float("inf")
    save_state(state, tmp_path / "d.pt")
    with pytest.raises(ValueError, match=rf"d\.pt: tensor '{name}' holds 1 NaN or infinite"):
        survey(Checkpoint(tmp_path / "d.pt"), b, ALONE)
    with pytest.raises(ValueError, match=rf"d\.pt: tensor '{name}' holds 1 NaN or infinite"):
        survey(a, Checkpoint(tmp_path / "d.pt"), ALONE)
