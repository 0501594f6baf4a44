"""Huge pages: tensors that are read into them are those that the library reads, whatever their type; torch is told to use them."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastmatch._internal import safetensors_file
from fastmatch._internal.huge_pages import VARIABLE
from fastmatch._internal.safetensors_file import DTYPES, read_entry, read_header
from fastmatch.cli.start import start
from fastmatch.permutations.precise import Wide


@pytest.mark.parametrize("dtype", sorted(DTYPES.values(), key=str), ids=str)
def test_every_type_is_read_into_huge_pages(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(safetensors_file, "HUGE", 0)
    given = torch.randint(0, 2, (3, 8)).to(dtype)
    save_file({"x": given, "none": given[:0].clone()}, tmp_path / "x.safetensors")
    entries, _ = read_header(tmp_path / "x.safetensors")
    with Wide():
        found = read_entry("x", entries["x"])
        assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), given.view(torch.uint8))
    assert read_entry("none", entries["none"]).shape == (0, 8)


OFFERED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PROGRAM = """
import re
from pathlib import Path
from fastmatch._internal.huge_pages import ask_for_huge_pages
ask_for_huge_pages()
import torch
held = torch.ones(1 << 24)
print(re.search(r"AnonHugePages: *(\\d+) kB", Path("/proc/self/smaps_rollup").read_text())[1])
"""


@pytest.mark.skipif(
    not OFFERED.is_file() or "[madvise]" not in OFFERED.read_text(),
    reason="the system has no huge pages on request",
)
@pytest.mark.parametrize("decided", [None, "0"])
def test_torch_takes_huge_pages_unless_the_user_has_decided(decided):
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
    environment |= {} if decided is None else {VARIABLE: decided}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True, env=environment
    )
    assert (int(done.stdout) > 0) == (decided is None)


def test_the_command_asks_for_huge_pages(monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, "")  # so that it is put back
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(sys, "argv", ["fastmatch", "--version"])
    # The process is not the command's own, and keeps its handlers of signals.
    monkeypatch.setattr("fastmatch.cli.start.ended_by_signals", lambda *_, **__: nullcontext())
    monkeypatch.setattr("fastmatch.cli.start.finished", lambda _: None)
    assert start() == 0
    assert os.environ[VARIABLE] == "1"
    capsys.readouterr()
