"""Programs that tests fork: one that hangs is killed, and tells what it printed."""

from __future__ import annotations

import subprocess

import pytest


def test_a_program_that_hangs_is_killed_and_the_next_one_runs(programs):
    with pytest.raises(subprocess.TimeoutExpired) as hung:
        programs.run("import time; print('begun', flush=True); time.sleep(600)", limit=2)
    assert hung.value.output == "begun\n"
    assert programs.run("print('next')", check=True).stdout == "next\n"
    done = programs.run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", limit=60)
    assert done.returncode == -9  # by itself, and not for its time
