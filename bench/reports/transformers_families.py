"""Every family of transformers that a small config builds: traced, permuted, compared.

    python -m bench.reports.transformers_families [FAMILY ...]

Each family is built, traced and verified in a process of its own, with random weights, and may use so many seconds of
processor time. ``python -m bench.reports.transformers_families --page`` writes the page from the committed record.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import fastmatch as fm
from bench.lib import record
from bench.lib.transformers_models import families, small_model
from fastmatch.checkpoint.structure import compared

__all__ = ["NAME", "judge", "judged_apart", "main"]

NAME = "transformers_families"
LIMIT = 300
"""Seconds of processor time for one family."""

WAITING = 20
"""How many times as long one family may take on a busy machine."""

MEMORY = 16 << 30
"""Bytes of addresses for one family."""


def judge(name: str, seed: int = 0) -> record.Row:
    """Build, trace and verify one family; return what came of it, and why it did not get further."""
    row: record.Row = {"family": name}
    try:
        model, inputs, output = small_model(name, seed)
    except Exception as error:
        return {**row, "outcome": "not built", "reason": str(error)}
    count = sum(p.numel() for p in model.parameters())
    row |= {"class": type(model).__name__, "parameters": count, "inputs": ", ".join(inputs), "unread": ""}
    spec = None
    for unread in ("refuse", "hold", "ignore"):
        try:
            spec = fm.PermutationSpec.trace(model, (), kwargs=inputs, outputs=compared(output), unread=unread)
        except Exception as error:
            row |= {"outcome": "not traced", "reason": _line(error)}
            continue
        row["unread"] = "" if unread == "refuse" else unread
        if spec.groups or unread == "refuse":
            break
    if spec is None:
        return row
    moved = sum(p.numel() for n, p in model.named_parameters() if spec.axes_of(n))
    row |= {"groups": len(spec.groups), "moved": moved / count}
    if not spec.groups:
        return {**row, "outcome": "nothing moves", "reason": ""}
    try:
        proof = fm.verify(model, spec, (), kwargs=inputs, outputs=compared(output))
    except Exception as error:
        return {
            **row,
            "outcome": "changed" if "changes the network" in str(error) else "no proof",
            "reason": _line(error),
        }
    return {
        **row,
        "outcome": "verified",
        "reason": "",
        "type": str(proof.dtype).removeprefix("torch."),
        "error": proof.error,
    }


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:200]


def judged_apart(name: str, limit: int = LIMIT) -> record.Row:
    """Judge one family in a forked process that may use ``limit`` seconds of processor time."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            signal.alarm(WAITING * limit)
            warnings.simplefilter("ignore")
            os.write(writing, json.dumps(judge(name)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        said = file.read()
    status = os.waitpid(child, 0)[1]
    if said:
        return json.loads(said)
    why = f"more than {limit} s of processor time" if os.WIFSIGNALED(status) else "its process ended"
    return {"family": name, "outcome": "not finished", "reason": why}


def measure(args: argparse.Namespace) -> record.Record:
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    names = args.families or families()
    names = names[:2] if args.tiny else names
    kept = {row["family"]: row for row in _lines(args.lines)}
    judge("bert")  # loads what all families share, which the forked processes would load again and again

    def rows() -> Iterator[record.Row]:
        for name in names:
            if name not in kept:
                kept[name] = judged_apart(name)
                if args.lines:
                    with args.lines.open("a") as file:
                        file.write(json.dumps(kept[name]) + "\n")
            yield kept[name]

    return record.record(rows(), packages=["transformers"], limit=LIMIT, known=len(families()))


def _lines(path: Path | None) -> list[record.Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


def page(found: record.Record) -> str:
    rows: list[dict[str, Any]] = found["rows"]
    counts = Counter(row["outcome"] for row in rows)
    verified = [row for row in rows if row["outcome"] == "verified"]
    summary = (
        f"{len(rows)} of the {found['settings']['known']} families of transformers were tried, and {len(rows) - counts['not built']} "
        "of them build and run in a small size. "
        f"{len(verified)} are traced and verified: every group is permuted at random, and the outputs stay the same, with the "
        "model's weights and twice with disturbed weights and inputs. "
        f"Not finished in the processor time that the row names: {counts['not finished']}; not traced: "
        f"{counts['not traced']}; no proof: {counts['no proof']}; nothing moves: {counts['nothing moves']}; function changed: "
        f"{counts['changed']}."
    )
    table = [
        {
            "family": row["family"], "class": row["class"], "inputs": row["inputs"], "groups": row["groups"],
            "parameters moved": f"{row['moved']:.1%}", "type": row["type"], "error": f"{row['error']:.0e}",
            "unread": row["unread"],
        }
        for row in verified
    ]  # fmt: skip
    others = [
        {"family": row["family"], "outcome": row["outcome"], "reason": row["reason"].replace("|", "/")}
        for row in rows
        if row["outcome"] not in ("verified", "not built")
    ]
    unbuilt = [row for row in rows if row["outcome"] == "not built"]
    parts = [summary, "## Verified", WORDS, record.table(table) if table else "None."]
    parts += ["## Not verified", record.table(others) if others else "None."]
    parts += ["## Not built", NOT_BUILT, ", ".join(f"`{row['family']}`" for row in unbuilt) or "None."]
    return record.page("Families of transformers", NAME, found, *parts)


WORDS = (
    "*Parameters moved* is the share in tensors of which some axis moves. *Type* is the type that outputs are compared in, "
    "*error* the largest difference relative to the largest output. *Unread* is empty where the inputs reach every part of the "
    "model. `hold`: they do not, and groups that the other parts could share stay in place. `ignore`: then nothing would move, "
    "so all groups of the part that was reached are moved, and the proof is of that part."
)
NOT_BUILT = (
    "Their configs are not made small by the names that most configs share, they need a package that is not installed, or they "
    "do not run on inputs that the names of their arguments suggest. Nothing is known about them from this run; the record "
    "has the reasons."
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("families", nargs="*", help="model types; all of transformers by default")
    parser.add_argument(
        "--lines", type=Path, help="a file of rows: those in it are not measured again, new ones are added"
    )
    return record.run(NAME, measure, page, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
