"""``fastmatch run`` and ``libraries``: run a script with other libraries' solvers replaced, unedited."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from fastmatch.cli.options import Commands, add_command
from fastmatch.cli.outputs import say

__all__ = ["add_commands", "run_script"]


def add_commands(commands: Commands) -> None:
    """Add the commands to the grammar."""
    command = add_command(
        commands, "run", run_command,
        examples=("run their_script.py --their-option 3", "run -m their_package.main"), outcome=False,
        usage="%(prog)s script.py [arguments]  |  -m module [arguments]",
    )  # fmt: skip
    command.add_argument(
        "script", nargs=argparse.REMAINDER,
        help="script.py or -m module, as python takes them, followed by the script's own arguments",
    )  # fmt: skip
    add_command(
        commands, "libraries", libraries_command,
        examples=("libraries",),
    )  # fmt: skip


def run_command(args: argparse.Namespace) -> Callable[[], None]:
    """Check the command and return the script, whose errors and exit status are its own.

    Raises:
        ValueError: no script is given, or there is no such file.
    """
    script = args.script
    if script in ([], ["-m"]):
        raise ValueError("expected a script, or -m and a module")
    if script[0] != "-m" and not Path(script[0]).is_file():
        raise ValueError(f"no file {script[0]}")
    return lambda: run_script(script)


def run_script(command: list[str]) -> None:
    """Run ``script.py arguments`` or ``-m module arguments`` as python does, with the replacements installed."""
    from fastmatch.backends import installed

    is_module = command[0] == "-m"
    if is_module:
        command = command[1:]
    arguments, path = sys.argv, list(sys.path)
    sys.argv = list(command)
    sys.path.insert(0, "" if is_module else str(Path(command[0]).resolve().parent))
    try:
        with installed():
            if is_module:
                runpy.run_module(command[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(Path(command[0]).absolute()), run_name="__main__")  # as python does
    except (Exception, KeyboardInterrupt):
        # Whoever catches the error has the whole traceback; python shows what the hook of the moment is given.
        sys.excepthook = partial(_shown_from_script, sys.excepthook)
        raise
    finally:
        sys.argv, sys.path[:] = arguments, path


def _shown_from_script(
    hook: Callable[..., object], kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Show an error without the frames that led to the script: as python does that runs the script alone."""
    frame = trace
    while frame is not None and frame.tb_frame.f_code is not run_script.__code__:
        frame = frame.tb_next
    if frame is not None:  # it came from the script
        trace = frame.tb_next
        while trace is not None and trace.tb_frame.f_globals.get("__name__") == "runpy":
            trace = trace.tb_next
    hook(kind, error.with_traceback(trace), trace)


def libraries_command(args: argparse.Namespace) -> None:
    """Print one line per library; for rebasin, which of the two packages of that name is installed."""
    from fastmatch.backends import which_rebasin
    from fastmatch.backends.patching import TARGETS

    states = {}
    for name, module in {target.library: target.module for target in TARGETS}.items():
        states[name] = "found" if find_spec(module.partition(".")[0]) else "not installed"
        if name == "rebasin" and which_rebasin():
            states[name] = f"found: the package {which_rebasin()}"
    say(args, "\n".join(f"{name:8} {state}" for name, state in states.items()), libraries=states)
