"""What commands write: weights that are finite, and tables."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from typing import Any

from fastmatch._internal.files import save_state
from fastmatch._internal.states import State, check_finite
from fastmatch.cli.outputs import say
from fastmatch.evaluation.table import Table

__all__ = ["write_table", "write_weights"]


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
