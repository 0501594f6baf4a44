"""The grammar of the command line, and what starting it loads."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from fastmatch.cli.main import main, parser

COMMANDS = {
    "align", "align-many", "apply", "merge", "partial", "pipeline", "plan", "renormalize", "curve", "triangle", "layers",
    "distances", "inspect", "verify", "demo", "study", "bench", "run", "libraries",
}  # fmt: skip


def subcommands(root: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in root._actions if isinstance(a, argparse._SubParsersAction))
    assert {a.dest for a in action._choices_actions if a.help} == set(action.choices)  # each in the summary
    return dict(action.choices)


def test_every_option_of_every_command_has_help_text():
    commands = subcommands(parser())
    assert commands.keys() == COMMANDS
    for name, command in commands.items():
        assert command.description, name
        assert callable(command.get_default("run")), name
        for action in command._actions:
            assert action.help, f"{name} {action.option_strings or action.dest}"
            assert action.help != argparse.SUPPRESS


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_help_shows_every_default(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for action in subcommands(parser())[command]._actions:
        is_unset = action.default is None or isinstance(action.default, bool) or action.default == []
        if action.option_strings and not is_unset and action.default != argparse.SUPPRESS:
            assert f"(default: {action.default})" in shown, action.dest


def test_a_shared_option_is_the_same_everywhere():
    settings: dict[str, set[object]] = {}
    for command in subcommands(parser()).values():
        for action in command._actions:
            for flag in action.option_strings:
                settings.setdefault(flag, set()).add((action.type, type(action), str(action.choices)))
    # After a partial merge "auto" is not among the methods. A plan names a kind of device, which need not be there.
    assert {flag for flag, found in settings.items() if len(found) > 1} == {"--renormalize", "--device"}


def test_the_installed_command_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fastmatch", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert "inspect" in done.stdout


@pytest.mark.parametrize("code", ["import fastmatch", "from fastmatch import *", "import fastmatch.cli.main"])
def test_importing_loads_neither_triton_nor_numba(code):
    heavy = ("triton", "numba", "lapjv", "matplotlib", "scipy", "sklearn", "transformers", "pandas")
    code = f"import sys; {code}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
