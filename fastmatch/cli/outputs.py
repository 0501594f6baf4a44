"""What a command reads, writes and says: checks of paths before torch is loaded, and a summary as text or JSON."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fastmatch._internal.checks import check_format
from fastmatch._internal.launching import is_first
from fastmatch._internal.locks import locked
from fastmatch._internal.outputs import check_target, real_path
from fastmatch._internal.places import check_place
from fastmatch._internal.words import printable

__all__ = ["CSV_SUFFIXES", "check_inputs", "check_outputs", "say"]

CSV_SUFFIXES = frozenset({".csv"})

INPUTS = ("a", "b", "alignment", "checkpoint", "checkpoints", "endpoints", "recipe", "add_difference")
"""Names of the arguments that hold paths of inputs, one or several."""

CALLABLES = ("model", "data", "calibration", "forward", "loss", "metric", "report_data")
"""Names of the options that hold ``module:callable``, one or several."""


def _given(args: argparse.Namespace, *names: str) -> list[str]:
    """Return the values of arguments: none, one or several for each."""
    values = [vars(args).get(name) or [] for name in names]
    return [one for value in values for one in ([value] if isinstance(value, str) else value)]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_inputs(args: argparse.Namespace) -> None:
    """Check what can be looked up quickly: that inputs exist, and files of functions.

    Raises:
        FileNotFoundError: an input does not exist.
        ValueError: an option is not of the form ``module:callable``, or the file that it names does not exist.
    """
    for path in _given(args, *INPUTS):
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
    for name in CALLABLES:
        for argument in _given(args, name):
            check_place(argument, _flag(name))


def check_outputs(args: argparse.Namespace, **suffixes: Collection[str] | None) -> None:
    """Check inputs and outputs before any work: each output has its own file, a suffix that says the format, and may be written.

    That an output exists is said last. Call this after other checks of options: whoever passes ``--force``, or types another
    name, should not be told another error then.

    Args:
        args: the parsed arguments, with ``force``, and ``outputs``, which releases the locks of the outputs.
        suffixes: name of an option -> the suffixes allowed, None for any. The option holds a path, several or None.

    Raises:
        ValueError: see :func:`check_inputs`; or two outputs are the same file, an output is an input, a suffix is not allowed, or
            ``--report-data`` is given without ``--report``, or ``--force`` without an output.
        FileExistsError, FileNotFoundError: an output exists and ``--force`` is not given, or its folder is missing.
    """
    if _given(args, "report_data") and not _given(args, "report"):
        raise ValueError("--report-data: is an option of --report, which is not given")
    if args.force and not _given(args, *suffixes):
        raise ValueError(f"--force: replaces {' and '.join(map(_flag, suffixes))}, and none is given")
    check_inputs(args)
    owners: dict[Path, str] = {}
    folders: set[Path] = set()
    inputs = {real_path(path) for path in _given(args, *INPUTS)}
    for name, allowed in suffixes.items():
        option = _flag(name)
        for path in _given(args, name):
            if real_path(path) in owners:
                other = owners[real_path(path)]
                raise ValueError(
                    f"{option}: {path} is the same file as {other}; each output needs a file of its own"
                )
            if real_path(path) in inputs:
                raise ValueError(f"{option}: {path} is one of the inputs; choose another path")
            owners[real_path(path)] = option
            if allowed is None:
                folders.add(real_path(path))
            else:
                check_format(path, option, allowed)
    for path in owners:
        check_target(path, force=args.force, folder=path in folders)
        if is_first():
            args.outputs.enter_context(locked(path))


def say(args: argparse.Namespace, text: str, **record: Any) -> None:
    """Print the outcome of a command: as text, with ``--json`` as one JSON object, with ``--quiet`` not at all."""
    if args.json:
        print(json.dumps(_plain(record)))
    elif not args.quiet:
        print(printable(text))


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
