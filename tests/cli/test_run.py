"""``fastmatch run`` and ``libraries``, as a user runs them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import traceback

import numpy as np
import pytest
import scipy.optimize
from scipy.optimize import linear_sum_assignment

from fastmatch.cli.main import main


@pytest.mark.parametrize("way", ["script", pytest.param("module", marks=pytest.mark.slow)])
def test_a_script_runs_unedited(tmp_path, way):
    (tmp_path / "published.py").write_text(
        textwrap.dedent("""
            import os, sys
            import numpy as np
            from scipy.optimize import linear_sum_assignment
            if __name__ == "__main__":
                cost = np.random.default_rng(0).random((300, 300))
                rows, cols = linear_sum_assignment(cost)
                print(hasattr(linear_sum_assignment, "__wrapped__"), f"{cost[rows, cols].sum():.10f}", sys.argv[1:])
                assert os.path.isabs(__file__)  # as python has it
                sys.exit(3)
        """)
    )
    command = ["-m", "published"] if way == "module" else ["published.py"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "fastmatch", "run", *command, "--flag", "2"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    cost = np.random.default_rng(0).random((300, 300))
    assert done.returncode == 3, done.stderr
    assert done.stdout.split(" ", 2) == [
        "True",
        f"{cost[linear_sum_assignment(cost)].sum():.10f}",
        "['--flag', '2']\n",
    ]


@pytest.mark.parametrize(("command", "text", "first"), [
    (["bad.py"], "def f():\n    raise ValueError('theirs')\nf()\n", "line 3, in <module>"),
    (["-m", "bad"], "def f():\n    raise ValueError('theirs')\nf()\n", "line 3, in <module>"),
    (["bad.py"], "x = (\n", "line 1\n"),  # nothing of it has run
])  # fmt: skip
def test_the_traceback_of_a_script_begins_in_the_script(tmp_path, monkeypatch, capsys, command, text, first):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises((ValueError, SyntaxError)) as raised:
        main(["run", *command])
    sys.excepthook(raised.type, raised.value, raised.tb)  # as python does at its end
    shown = capsys.readouterr().err
    assert shown.removeprefix("Traceback (most recent call last):\n").startswith(f'  File "{path}", {first}')
    assert shown.endswith(f"{traceback.format_exception_only(raised.value)[-1]}")


def test_an_error_of_the_script_is_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    original = scipy.optimize.linear_sum_assignment
    path = tmp_path / "raises.py"
    path.write_text("import sys\nassert sys.argv[1:] == ['-h']\nraise ValueError('theirs')\n")
    arguments, folders = sys.argv, list(sys.path)
    with pytest.raises(ValueError, match="theirs"):
        main(["run", str(path), "-h"])
    assert sys.argv is arguments
    assert sys.path == folders
    assert scipy.optimize.linear_sum_assignment is original


@pytest.mark.parametrize(("arguments", "message"), [
    (["run", "missing.py"], "fastmatch run: no file missing.py"),
    (["run"], "expected a script, or -m and a module"),
    (["run", "-m"], "expected a script, or -m and a module"),
])  # fmt: skip
def test_a_missing_script_is_named(folder, refused, arguments, message):
    refused(arguments, message)


def test_libraries_says_which_rebasin_is_installed(capsys):
    original = scipy.optimize.linear_sum_assignment
    assert main(["libraries"]) == 0
    assert "rebasin  found: the package rebasin" in capsys.readouterr().out
    assert scipy.optimize.linear_sum_assignment is original


def test_help_is_ours_before_a_script(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["run", "--help"])
    assert ended.value.code == 0
    assert "script.py [arguments]" in capsys.readouterr().out
