"""The ``fastmatch`` command: the grammar of all commands, and how errors and signals are reported.

The options of all commands are known, and checked, without torch: help and errors about options are shown at once. What needs torch
is imported by the command that runs; most of it is in :mod:`fastmatch.cli.work`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import itertools
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NoReturn

from fastmatch._internal.checks import nearest
from fastmatch._internal.launching import RanksError, initialized, is_first, is_launched
from fastmatch._internal.locks import remove_locks
from fastmatch._internal.progress import no_progress
from fastmatch._internal.unfinished import is_unfinished
from fastmatch._internal.words import printable
from fastmatch.cli.commands import COMMANDS, module_of
from fastmatch.cli.signals import EARLY, ended_by_signals, tell_interrupted
from fastmatch.cli.typed import as_typed

__all__ = ["command", "main", "parser"]

SHARED = ("align", "run")
"""The commands that several processes of a launcher may run together."""

EXPECTED = (ValueError, TypeError, OSError, ImportError)
"""Errors whose message says what is wrong with the input, as those of ranks do; others are told with their type."""


class _Parser(argparse.ArgumentParser):
    """Reports an error on one line: what is wrong, the nearest word that is right, and where the help is."""

    given: Sequence[str] = ()
    """The words that are parsed."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] - overloads
        self.given = list(args or ())
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if choice:
            words = re.findall(r"[\w-]+", choice[2])
            if message.startswith("argument COMMAND"):  # twenty names would bury what is wrong
                message = f"unknown command {choice[1]!r}"
            message += nearest(choice[1], words)
        # argparse misses --out before it sees that --outt is none of its options.
        unknown = [] if self._subparsers else self.unknown_options()
        if unknown:
            message += f"; {self.named(unknown)}"
        self.refuse(message)

    def unknown_options(self) -> list[str]:
        """Return the long options that were given and are not known. An option may be abbreviated, and ``--`` ends them."""
        words = itertools.takewhile(lambda word: word != "--", self.given)
        options = [word for word in words if word.startswith("--")]
        known = [option for option in self._option_string_actions if option.startswith("--")]
        return [o for o in options if not any(k.startswith(o.partition("=")[0]) for k in known)]

    def named(self, unknown: Sequence[str]) -> str:
        """Return what is said of words that are not known, with the option that is most alike the first."""
        options = {
            option.lstrip("-"): option for option in self._option_string_actions if option.startswith("--")
        }
        # The dashes, which all have, do not count.
        found = difflib.get_close_matches(unknown[0].partition("=")[0].lstrip("-"), options, n=1, cutoff=0.6)
        return f"unknown: {' '.join(unknown)}" + (f"; did you mean {options[found[0]]!r}?" if found else "")

    def refuse(self, message: str) -> NoReturn:
        """Print one line on standard error and exit with status 2."""
        said = f"{self.prog}: {message} (see `{self.prog} --help`)\n"
        self.exit(2, said if is_first() else None)


def parser(only: str | None = None) -> argparse.ArgumentParser:
    """Return the grammar of the command line; with the options of one module's commands only, for its name."""
    root = _Parser(
        prog="fastmatch",
        description="Align, merge and renormalize neural networks of the same architecture.",
        epilog="`fastmatch COMMAND --help` lists a command's options, with examples.",
    )
    root.add_argument("--version", action="version", version=f"fastmatch {_version()}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module, summaries in COMMANDS.items():
        if only in (None, module):
            importlib.import_module(f"fastmatch.cli.{module}").add_commands(commands)
        else:
            for name, summary in summaries.items():
                commands.add_parser(name, help=summary)
    return root


def _version() -> str:
    return importlib.import_module("fastmatch").__version__  # the package is above its command line


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments. Those after ``run`` belong to the script, options included, unless help is asked for."""
    given, script = list(arguments), []
    if given[:1] == ["run"] and given[1:] not in (["-h"], ["--help"]):
        given, script = given[:1], given[1:]
    module = module_of(given)
    # A completion is of all commands. Help on all of them needs no module.
    grammar = parser(None if module == "complete" else module or "")
    args, unknown = grammar.parse_known_args(given)
    if unknown:
        (commands,) = (a.choices for a in grammar._actions if isinstance(a, argparse._SubParsersAction))
        command = commands[args.command]
        command.refuse(command.named(unknown))
    args.script, args.grammar, args.arguments = script, grammar, list(arguments)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    0 on success; 2 after one line about wrong input; 1 after one line about any other error; 130 after Ctrl-C, and
    128 plus the number after another signal; 141 if the reader of the output has gone; 3 if ``verify`` finds another function.
    """
    status, script = command(sys.argv[1:] if arguments is None else arguments)
    if script is not None:
        script()  # the user's own script: its errors are not ours, and its traceback is wanted
    return status


def command(arguments: Sequence[str]) -> tuple[int, Callable[[], None] | None]:
    """Run one command but for a user's script, and return the exit status and the script, which has its own signal handlers."""
    try:
        with ended_by_signals(lambda _: EARLY):
            args = _parse(arguments)
    except KeyboardInterrupt as interrupt:
        return tell_interrupted(interrupt, EARLY), None
    verbose, quiet = getattr(args, "verbose", False), getattr(args, "quiet", False)
    try:
        if is_launched() and args.command not in SHARED:
            alone = ValueError(
                f"runs in one process; start it without torchrun ({', '.join(SHARED)} share work)"
            )
            alone.said_by_first = not is_first()  # type: ignore[attr-defined]
            raise alone
        with (
            ended_by_signals(partial(_leaving, args)),
            no_progress(quiet),
            _logging(verbose),
            warnings.catch_warnings(),
            ExitStack() as args.outputs,
        ):
            warnings.showwarning = partial(_warned, args)
            script: Callable[[], None] | None = args.run(args)
            sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer would fail again when Python closes the file.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141, None
    except KeyboardInterrupt as interrupt:
        return tell_interrupted(interrupt, _line(args) or None), None
    except Exception as error:
        return _told(error, args, verbose=verbose), None
    return 0, script


def _line(args: argparse.Namespace) -> str:
    """Return the line about a signal that ended the command; "" for ranks that leave it to the first."""
    what = f"fastmatch {args.command}: {{}}; nothing is half-written{_left_by(args)}"
    return what if is_first() else ""


def _leaving(args: argparse.Namespace, is_asked_twice: bool) -> str | None:
    """Remove the locks of outputs and return the line, if the process can end at once; None if there is something to undo."""
    if (is_unfinished() or initialized() is not None) and not is_asked_twice:
        return None
    remove_locks()
    return _line(args)


def _told(error: Exception, args: argparse.Namespace, *, verbose: bool) -> int:
    """Print an error on one line, after its traceback if ``verbose``, and return the exit status."""
    if verbose:
        traceback.print_exception(error)
    text, is_expected = " ".join(str(error).split()), isinstance(error, (*EXPECTED, RanksError))
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    elif is_expected:
        text = as_typed(text, args)
    if type(error) is OSError:  # such as a full disk; wrong names and locked outputs have types of their own
        text += _left_by(args)
    if not is_expected:
        text = f"{type(error).__name__}: {text} (--verbose shows where)"
    if not getattr(error, "said_by_first", False):  # of several ranks, the first has said it
        print(printable(f"fastmatch {args.command}: {text}"), file=sys.stderr)
    return getattr(error, "exit_status", 2) if is_expected else 1


def _warned(args: argparse.Namespace, message: Warning | str, *_: Any) -> None:
    """Print a warning on one line, without the line of code that gave it."""
    text = as_typed(" ".join(str(message).split()), args)
    print(printable(f"fastmatch {args.command}: warning: {text}"), file=sys.stderr)


def _left_by(args: argparse.Namespace) -> str:
    """Return the sentence about what a command that ended early has left for ``--resume``; none where nothing is kept."""
    kept = None
    if args.command in ("align", "align-many"):
        from fastmatch.cli.align import kept_by

        kept = kept_by(args)
    if kept is None or not kept.exists():
        return ""
    return ". What is solved is kept: the same command with --resume goes on"


class _logging:
    """Print what the library logs on standard error, if ``on``."""

    def __init__(self, on: bool) -> None:
        self.handler = logging.StreamHandler() if on else None
        self.logger = logging.getLogger("fastmatch")

    def __enter__(self) -> None:
        if self.handler is not None:
            self.level = self.logger.level
            self.logger.addHandler(self.handler)
            self.logger.setLevel(logging.INFO)

    def __exit__(self, *error: Any) -> None:
        if self.handler is not None:
            self.logger.removeHandler(self.handler)
            self.logger.setLevel(self.level)
