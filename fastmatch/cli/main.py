"""The ``fastmatch`` command: the grammar of all commands, and how errors are reported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from fastmatch._internal.ranks import RanksError, is_launched
from fastmatch.cli import (
    align,
    apply,
    bench,
    evaluate,
    inspect,
    merge,
    pipeline,
    plan,
    renormalize,
    run,
    studies,
)

__all__ = ["main", "parser"]

GROUPS = (align, plan, apply, merge, renormalize, pipeline, evaluate, inspect, studies, bench, run)
"""The modules that add commands, in the order of the help."""

SHARED = ("align", "run")
"""The commands that several processes of a launcher may run together."""


def parser() -> argparse.ArgumentParser:
    """Return the grammar of the command line."""
    root = argparse.ArgumentParser(
        prog="fastmatch",
        description="Align, merge and renormalize neural networks of the same architecture.",
        epilog="`fastmatch COMMAND --help` lists a command's options.",
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in GROUPS:
        group.add_commands(commands)
    return root


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments. Those after ``run`` belong to the script, options included, unless help is asked for."""
    given, script = list(arguments), []
    if given[:1] == ["run"] and given[1:] not in (["-h"], ["--help"]):
        given, script = given[:1], given[1:]
    args = parser().parse_args(given)
    args.script = script
    args.arguments = list(arguments)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0 on success, 2 after a one-line message about wrong input."""
    args = _parse(sys.argv[1:] if arguments is None else arguments)
    try:
        if is_launched() and args.command not in SHARED:
            raise ValueError(
                f"runs in one process; start it without torchrun ({', '.join(SHARED)} share work)"
            )
        with ExitStack() as args.outputs:
            script = args.run(args)
    except (ValueError, TypeError, OSError, ImportError, RanksError) as error:
        if not getattr(error, "said_by_first", False):
            print(f"fastmatch {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    if script is not None:
        script()  # the user's own script: its errors are not ours, and its traceback is wanted
    return 0
