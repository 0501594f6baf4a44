"""What a command writes and says: checks of paths, weights that are finite, and a summary as text or JSON."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fastmatch._internal.callables import check_place
from fastmatch._internal.files import check_format, check_target, save_state
from fastmatch._internal.locks import locked
from fastmatch._internal.outputs import real_path
from fastmatch._internal.ranks import is_first
from fastmatch._internal.states import State, check_finite
from fastmatch._internal.words import printable
from fastmatch.evaluation.table import Table

__all__ = ["CSV_SUFFIXES", "check_outputs", "say", "write_table", "write_weights"]

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
            ``--report-data`` is given without ``--report``.
        FileExistsError, FileNotFoundError: an output exists and ``--force`` is not given, or its folder is missing.
    """
    if _given(args, "report_data") and not _given(args, "report"):
        raise ValueError("--report-data: is an option of --report, which is not given")
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


def write_weights(state: State, out: str, *, force: bool, metadata: Mapping[str, str] | None = None) -> None:
    """Write a state dict whose numbers are all finite; ``metadata`` is for the header of a safetensors file.

    Raises:
        ValueError: a tensor holds NaN or infinity; it is named, and nothing is written.
    """
    check_finite(state, f"{out} is not written: the result")
    save_state(state, out, force=force, metadata=metadata)


def write_table(
    table: Table, args: argparse.Namespace, text: str = "", *, shown: Collection[str] = (), **record: Any
) -> None:
    """Write a table to ``--out`` as CSV, if that is given, and say it with a last line of text.

    Keys of ``--json`` hold no blanks, as some columns of the CSV do. Text has the columns ``shown`` alone, if there are any.
    """
    last = [text] if text else []
    seen = table
    if shown:
        seen = Table(tuple({name: row[name] for name in row if name in shown} for row in table.rows))
        last.append(f"{len(table.columns) - len(seen.columns)} more columns: --out and --json have them")
    if args.out is not None:
        table.to_csv(args.out, force=args.force)
    if written := [path for path in (args.out, getattr(args, "plot", None)) if path is not None]:
        last.append(f"wrote {' and '.join(written)}")
    say(
        args,
        "\n".join([str(seen), *(["; ".join(last)] if last else [])]),
        **record,
        rows=[{name.replace(" ", "_"): value for name, value in row.items()} for row in table.rows],
        out=args.out,
    )


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
