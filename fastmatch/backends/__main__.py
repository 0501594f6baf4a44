"""``python -m fastmatch.backends run script.py``: a script as it is, on this engine."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from fastmatch.backends import LIBRARIES, installed, which_rebasin


def run(command: list[str]) -> None:
    """Runs ``script.py arguments`` or ``-m module arguments`` as python would, with the replacements in place."""
    is_module = command[0] == "-m"
    if is_module:
        command = command[1:]
    before, path = sys.argv, list(sys.path)
    sys.argv = list(command)
    sys.path.insert(0, "" if is_module else str(Path(command[0]).resolve().parent))
    try:
        with installed():
            if is_module:
                runpy.run_module(command[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(command[0], run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before, path


def status() -> str:
    """Which libraries are here to be replaced; for rebasin, which of the two packages of that name."""
    lines = []
    for name in LIBRARIES:
        found = "found" if find_spec(name) else "not installed"
        if name == "rebasin" and which_rebasin():
            found = f"found: the package {which_rebasin()}"
        lines.append(f"{name:8} {found}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the script's own exit status passes through."""
    parser = argparse.ArgumentParser(prog="python -m fastmatch.backends", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "run", help="run a script, or -m module, with the replacements in place",
        usage="%(prog)s script.py [arguments]  |  -m module [arguments]",
    )  # fmt: skip
    commands.add_parser("status", help="list the libraries that would be replaced")
    given = list(sys.argv[1:] if arguments is None else arguments)
    # What follows `run` is the script's, flags included; only a lone --help is ours.
    command, script = (given[:1], given[1:]) if given[:1] == ["run"] else (given, [])
    args = parser.parse_args([*command, *(script if script in (["-h"], ["--help"]) else [])])
    if args.command == "status":
        print(status())
        return 0
    if script in ([], ["-m"]):
        parser.error("run: expected a script, or -m and a module")
    if script[0] != "-m" and not Path(script[0]).is_file():
        print(f"run: no file {script[0]}", file=sys.stderr)
        return 2
    run(script)
    return 0


if __name__ == "__main__":
    sys.exit(main())
