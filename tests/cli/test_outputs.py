"""What commands write: one writer at a time, the same bytes each time, the metadata of what was read, one line on failure."""

from __future__ import annotations

import os
import resource
import threading

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

import fastmatch as fm
from fastmatch._internal.files import load_state
from fastmatch._internal.locks import locked
from fastmatch.cli.main import main

MODEL = ["--model", "cli_module:build_with_inputs"]
FILES = ["a.safetensors", "b.safetensors"]
COMMANDS = {
    "align": ["align", *FILES, *MODEL],
    "align out of core": ["align", *FILES, *MODEL, "--out-of-core"],
    "merge": ["merge", *FILES, *MODEL],
    "renormalize": [
        "renormalize", "a.safetensors", *MODEL, "--data", "cli_module:loader", "--method", "repair", "--endpoints", "b.safetensors",
    ],
    "partial": ["partial", *FILES, *MODEL, "--rule", "identity"],
}  # fmt: skip
EACH = pytest.mark.parametrize("command", COMMANDS)


def out_of(command):
    return "o.pt2" if command == "partial" else "o.safetensors"


@pytest.fixture
def metadata(planted):
    """a and b with metadata of which one entry differs."""
    for name in "ab":
        state = load_state(f"{name}.safetensors")
        save_file(state, f"{name}.safetensors", metadata={"format": "pt", "license": "mine", "run": name})


@EACH
def test_an_output_that_another_run_writes_is_refused_at_once(planted, refused, command):
    held, done = threading.Event(), threading.Event()

    def hold():
        with locked(planted / out_of(command)):
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    try:
        refused([*COMMANDS[command], "--out", out_of(command)], "another run is writing this output")
    finally:
        done.set()
        thread.join()


@EACH
@pytest.mark.parametrize("size", [0, 500])
def test_a_full_disk_is_one_line_and_leaves_nothing(planted, refused, command, size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        journal = size > 0 and command == "align out of core"
        before = {p.name for p in planted.iterdir()}
        if journal:
            assert main([*COMMANDS[command], "--out", out_of(command)]) == 2
            assert {p.name for p in planted.iterdir()} - before <= {".o.safetensors.journal", "__pycache__"}
        else:
            refused([*COMMANDS[command], "--out", out_of(command)], "could not be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("command", ["align", "align out of core", "merge", "renormalize"])
def test_a_command_writes_the_same_bytes_each_time(planted, command, suffix):
    for name in ("one", "another"):
        assert main([*COMMANDS[command], "--out", name + suffix]) == 0
    assert (planted / f"one{suffix}").read_bytes() == (planted / f"another{suffix}").read_bytes()


@pytest.mark.parametrize(("command", "extra", "run"), [
    ("align", [], "b"), ("align out of core", [], "b"), ("align", ["--merge", "0.5"], None), ("merge", [], None),
    ("renormalize", [], "a"),
])  # fmt: skip
def test_the_metadata_of_what_was_read_is_kept(metadata, command, extra, run):
    assert main([*COMMANDS[command], *extra, "--out", "o.safetensors"]) == 0
    with safe_open("o.safetensors", framework="pt") as file:
        kept = file.metadata()
    assert kept.pop("run", None) == run
    assert kept == {"format": "pt", "license": "mine"}


@pytest.mark.parametrize("command", ["align", "align out of core"])
def test_permutations_that_cannot_be_written_are_not_lost(planted, monkeypatch, command):
    arguments = [*COMMANDS[command], "--out", "o.safetensors", "--permutations", "p.safetensors"]

    def full(*_args, **_options):
        raise OSError(28, "No space left on device", "p.safetensors")

    with monkeypatch.context() as patched:
        patched.setattr(fm.Alignment, "save", full)
        assert main(arguments) == 2
    assert not (planted / "p.safetensors").exists()
    again = ["--resume", "--force"] if command == "align out of core" else []
    if again:
        assert (planted / ".o.safetensors.journal").exists()
    assert main([*arguments, *again]) == 0
    assert fm.Alignment.load("p.safetensors").moved > 0


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(planted, refused, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and access(path, mode))
    refused([*COMMANDS["align"], "--out", "o.pt"], "this folder cannot be written")


@pytest.mark.parametrize("command", ["align", "merge"])
def test_a_folder_is_not_replaced_by_a_file(planted, refused, command):
    (planted / "o.pt").mkdir()
    refused([*COMMANDS[command], "--out", "o.pt", "--force"], "o.pt is a folder")


CURVE = ["curve", *FILES, *MODEL, "--data", "cli_module:loader"]


@pytest.mark.parametrize(("line", "message"), [
    ([*COMMANDS["align"], "--max-sweeps", "-1"], "--max-sweeps: expected"),
    ([*COMMANDS["align"], "--matcher", "fisher", "--data", "gone.py:loader"], "--data: no file gone.py"),
    ([*COMMANDS["align"], "--matcher", "straight-through", "--data", "m:f", "--epochs", "-1"], "--epochs: expected"),
    ([*COMMANDS["align"], "--report-data", "m:f"], "--report-data: is an option of --report"),
    ([*COMMANDS["align out of core"], "--dtype", "int8"], "--dtype: expected"),
    ([*COMMANDS["align out of core"], "--device", "toaster"], "--device: cannot be used here"),
    (["align", "a.safetensors", "gone.pt", *MODEL], "gone.pt: no such file or folder"),
    (["align-many", *FILES, *MODEL, "--max-rounds", "-1"], "--max-rounds: expected"),
    ([*COMMANDS["merge"], "--weights", "1"], "--weights: expected 2"),
    (["merge", *FILES, "--weights", "1"], "--weights: expected 2"),
    (["merge", *FILES, "--add-difference", "gone.pt"], "gone.pt: no such file or folder"),
    ([*COMMANDS["partial"], "--renormalize", "repair"], "--data: needed by --renormalize repair"),
    ([*COMMANDS["renormalize"], "--samples", "0"], "--samples: expected"),
    ([*COMMANDS["renormalize"], "--weights", "1", "1"], "--weights: expected 1"),
    ([*CURVE, "--points", "1"], "--points: expected"),
    ([*CURVE, "--samples", "3"], "--samples: is an option of --renormalize"),
    ([*CURVE, "--loss", "nothing"], "--loss: expected module:callable"),
])  # fmt: skip
def test_an_output_that_exists_does_not_hide_what_else_is_wrong(planted, refused, line, message):
    out = {"curve": "o.csv", "partial": "o.pt2"}.get(line[0], "o.safetensors")
    (planted / out).write_text("")
    refused([*line, "--out", out], message)
    good = CURVE if line[0] == "curve" else COMMANDS.get(line[0], ["align-many", *FILES, *MODEL])
    refused([*good, "--out", out], f"{out} exists; choose another path, or pass --force to replace it")
