"""Outputs have one writer at a time, replace nothing by chance, and leave nothing when a run ends or is killed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmatch._internal import renaming
from fastmatch._internal.files import save_state
from fastmatch._internal.locks import hidden, locked
from fastmatch._internal.outputs import claimed, writing
from fastmatch._internal.safetensors_file import write_safetensors
from fastmatch.checkpoint import WriteOptions, align_checkpoints
from fastmatch.spec.formats import from_axes

AS_ON_WINDOWS = """
import fcntl, sys, types

def locking(descriptor, mode, count):
    assert (mode, count) == (2, 1)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PermissionError(13, "Permission denied") from None

sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
sys.modules["fcntl"] = None
"""

HOLDER = """
import sys
from fastmatch._internal.locks import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def names(path):
    return sorted(p.name for p in path.iterdir())


@pytest.fixture(params=["renameat2", "without"])
def renames(request, monkeypatch):
    """With the system's call that exchanges names, and where there is none."""
    if request.param == "without":
        monkeypatch.setattr(renaming, "_renameat2", lambda: None)


@pytest.mark.parametrize("force", [False, True])
def test_a_second_run_into_one_output_is_refused_while_the_first_is_at_work(tmp_path, force):
    out = tmp_path / "out.pt"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=r"another run is writing this output.*out\.pt"):
            save_state({"a": torch.zeros(1)}, out, force=force)
        holder.kill()
        holder.communicate()
    assert names(tmp_path) == [".out.pt.lock"]  # left by the kill; nobody holds it
    save_state({"a": torch.zeros(1)}, out)
    assert names(tmp_path) == ["out.pt"]


@pytest.mark.parametrize("system", ["", AS_ON_WINDOWS], ids=["flock", "msvcrt"])
def test_outputs_are_locked_with_whatever_the_system_has(tmp_path, system):
    out = tmp_path / "out.pt"
    code = system + HOLDER
    second = (
        system
        + "import fastmatch, sys\nfrom fastmatch._internal.locks import locked\nwith locked(sys.argv[1]): pass"
    )
    run = [sys.executable, "-c", second, str(out)]
    with subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        refused = subprocess.run(run, capture_output=True, text=True, check=False)
        assert "another run is writing this output" in refused.stderr
        holder.communicate("")
    assert names(tmp_path) == []
    subprocess.run(run, check=True)
    assert names(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="the flag that is left out")
def test_a_link_is_refused_where_the_system_always_follows_links(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_NOFOLLOW")
    (tmp_path / ".out.pt.lock").symlink_to(tmp_path / "mine")
    with (
        pytest.raises(OSError, match=r"lock \.out\.pt\.lock: is a symbolic link"),
        locked(tmp_path / "out.pt"),
    ):
        pass
    assert not (tmp_path / "mine").exists()


def test_a_lock_is_one_for_every_spelling_of_a_path_and_nests_in_a_thread(tmp_path):
    (tmp_path / "inner").mkdir()
    with locked(tmp_path / "x"), locked(tmp_path / "inner" / ".." / "x"):
        assert names(tmp_path) == [".x.lock", "inner"]
    assert names(tmp_path) == ["inner"]


def test_a_lock_that_is_a_link_is_refused_and_its_target_left_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".out.pt.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match=r"lock \.out\.pt\.lock: is a symbolic link"):
        save_state({"a": torch.zeros(1)}, tmp_path / "out.pt")
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.usefixtures("renames")
@pytest.mark.parametrize("force", [False, True])
def test_what_appears_during_a_run_is_left_alone(tmp_path, force):
    out = tmp_path / "out"

    def run():
        with claimed(out, force=force, folder=True) as claim:
            claim.part.mkdir()
            out.mkdir()
            (out / "mine").write_text("mine")
            claim.publish()

    with pytest.raises(FileExistsError, match="appeared while this run was at work"):
        run()
    assert names(tmp_path) == ["out"]
    assert (out / "mine").read_text() == "mine"


@pytest.mark.usefixtures("renames")
def test_a_file_that_appears_during_a_run_is_left_alone(tmp_path):
    out = tmp_path / "out.pt"

    def run():
        with writing(out) as temporary:
            temporary.write_text("new")
            out.write_text("mine")

    with pytest.raises(FileExistsError, match="appeared"):
        run()
    assert out.read_text() == "mine"
    assert names(tmp_path) == ["out.pt"]


@pytest.mark.usefixtures("renames")
def test_a_folder_is_replaced_as_a_whole(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with claimed(out, force=True, folder=True) as claim:
        claim.part.mkdir()
        (claim.part / "new").write_text("new")
        claim.publish()
    assert names(tmp_path) == ["out"]
    assert names(out) == ["new"]


def test_what_killed_runs_leave_is_removed_by_the_next_run_into_the_same_output(tmp_path):
    out = tmp_path / "out.pt"
    hidden(out, "part").mkdir()
    (hidden(out, "part") / "half").write_text("half")
    other = hidden(tmp_path / "other.pt", "part")
    other.write_text("another run's")
    (tmp_path / "mine").write_text("mine")
    save_state({"a": torch.zeros(1)}, out)
    assert names(tmp_path) == [".other.pt.part", "mine", "out.pt"]


def test_a_part_that_is_a_link_is_not_followed(tmp_path):
    out = tmp_path / "out.pt"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    hidden(out, "part").symlink_to(tmp_path / "mine")
    save_state({"a": torch.zeros(1)}, out)
    assert (tmp_path / "mine" / "file").read_text() == "mine"
    assert names(tmp_path) == ["mine", "out.pt"]


def test_an_old_folder_that_a_kill_left_aside_comes_back(tmp_path):
    """Where names cannot be exchanged, there is a moment in which the output has no name."""
    out = tmp_path / "out"
    hidden(out, "old").mkdir()
    (hidden(out, "old") / "old").write_text("old")
    with pytest.raises(FileExistsError, match="exists"), claimed(out, folder=True):
        pass
    assert names(tmp_path) == ["out"]
    assert names(out) == ["old"]


@pytest.mark.parametrize("kind", ["link", "file"])
def test_only_a_folder_comes_back(tmp_path, kind):
    out, aside = tmp_path / "out.pt", hidden(tmp_path / "out.pt", "old")
    (tmp_path / "mine").write_text("mine")
    aside.symlink_to("mine") if kind == "link" else aside.write_text("old")
    save_state({"a": torch.zeros(1)}, out)
    assert names(tmp_path) == ["mine", "out.pt"]
    assert not out.is_symlink()
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_link_to_itself_is_replaced_like_any_other(tmp_path):
    out = tmp_path / "out.safetensors"
    out.symlink_to(out.name)
    for name in "ab":
        save_state(
            {"0.weight": torch.randn(4, 2), "1.weight": torch.randn(2, 4)}, tmp_path / f"{name}.safetensors"
        )
    axes = {"0.weight": ("P", None), "1.weight": (None, "P")}
    spec = from_axes(axes, {"0.weight": (4, 2), "1.weight": (2, 4)})
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    with pytest.raises(FileExistsError, match="exists"):
        align_checkpoints(*paths, out, spec=spec)
    align_checkpoints(*paths, out, spec=spec, write=WriteOptions(force=True))
    assert out.is_file()
    assert not out.is_symlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
@pytest.mark.parametrize("name", ["pipe", "link"])
def test_a_pipe_or_a_device_is_replaced_by_no_output(tmp_path, name):
    """The superuser may rename over ``/dev/null``."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for given in (tmp_path / name, Path(os.devnull)):
        for folder in (False, True):
            with (
                pytest.raises(FileExistsError, match="is a device, a pipe or a socket"),
                claimed(given, force=True, folder=folder),
            ):
                pass
    assert names(tmp_path) == ["link", "pipe"]


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    sync, rename = os.fsync, renaming.rename_new
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(os.path.realpath(f"/proc/self/fd/{fd}")), sync(fd))
    )
    monkeypatch.setattr(
        "fastmatch._internal.outputs.rename_new", lambda *paths: (events.append("rename"), rename(*paths))
    )
    save_state({"a": torch.zeros(1)}, tmp_path / "out.pt")
    real = os.path.realpath(tmp_path)
    assert events == [f"{real}/.out.pt.part", "rename", real]


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.ESTALE])
def test_a_failed_write_is_one_line_that_names_the_output(tmp_path, monkeypatch, name, number):
    def fail(descriptor, data):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(OSError, match=rf"could not be written \(.*\).*{name}") as found:
        save_state({"a": torch.zeros(100)}, tmp_path / name)
    assert found.value.errno == number
    assert not names(tmp_path)


def test_a_tensor_that_cannot_be_read_is_not_called_unwritten(tmp_path):
    def read(name):
        if name == "b":
            raise OSError(errno.EIO, "Input/output error", "inputs.safetensors")
        return torch.zeros(3)

    headers = {name: torch.empty(3, device="meta") for name in "abc"}
    with pytest.raises(OSError, match=r"Input/output error: 'inputs\.safetensors'"):
        write_safetensors(tmp_path / "x.part", tmp_path / "x", headers, read, {})


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write")
def test_a_folder_that_cannot_be_written_is_named_before_any_work():
    with pytest.raises(OSError, match=r"/proc/x\.pt"), claimed("/proc/x.pt"):
        pytest.fail("came to work")


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_a_path_without_a_name_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(ValueError, match="is not the name of an output"),
        claimed(name, force=True, folder=True),
    ):
        pytest.fail("came to work")


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    """In every process, whatever the file is called; metadata of many entries included."""
    code = (
        "import sys, torch\nfrom fastmatch._internal.files import save_state\n"
        "g = torch.Generator().manual_seed(0)\nw = torch.randn(4, 3, generator=g)\n"
        "state = {'w': w, 'tied': w, 'half': w.half(), 'count': torch.tensor(3)}\n"
        "for path in sys.argv[1:]: save_state(state, path, metadata={str(k): 'x' for k in range(20)})\n"
    )
    found = []
    for seed in ("1", "2"):
        paths = [tmp_path / f"{'long' * int(seed)}.{suffix}" for suffix in ("pt", "safetensors")]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, *paths], env=environment, check=True)
        found.append([path.read_bytes() for path in paths])
    assert found[0] == found[1]
