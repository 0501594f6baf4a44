"""Long runs that hunt for faults: random networks, changed files, killed runs and full disks.

    PYTHONPATH=tests python -m bench.reports.soundness networks --seed 1 --count 2000
    PYTHONPATH=tests python -m bench.reports.soundness files --seed 1 --count 5000
    PYTHONPATH=tests python -m bench.reports.soundness kills --seed 1

The hunters are those of the tests (`tests/helpers`), which run a short form of each. A run adds rows to the record. A fault ends
it: of files and kills with an error that tells how to repeat it; of networks, their seeds are in the row.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.lib import record

NAME = "soundness"
KEYS = ("part", "case", "seed")
FOUND = ("changed", "alarms", "missed", "undecided", "failed")


def networks(seed: int, count: int) -> Iterator[record.Row]:
    from helpers.network_fuzz import fuzz

    *_, found = fuzz(seed, count)
    yield {
        "case": "random networks", "seed": seed, "count": found.networks, "groups": found.groups,
        **{name: [number for number, _ in getattr(found, name)] for name in FOUND},
    }  # fmt: skip


def files(seed: int, count: int) -> Iterator[record.Row]:
    from helpers.readers import READERS, judged

    for reader in READERS:
        with tempfile.TemporaryDirectory() as folder:
            refused = judged(reader, Path(folder), count, seed)
        yield {
            "case": reader.__name__.removeprefix("read_"), "seed": seed, "count": count, "refused": refused, "faults": 0,
        }  # fmt: skip


def kills(seed: int, count: int) -> Iterator[record.Row]:
    from helpers.interrupted_runs import run

    with tempfile.TemporaryDirectory() as folder:
        for row in run(Path(folder), 0, seed):
            yield {**row, "seed": seed, "faults": 0}


PARTS = {"networks": networks, "files": files, "kills": kills}


def part(name: str) -> str:
    """Return the name of a part as it is, or let argparse say which there are."""
    if name not in PARTS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(PARTS)}; got {name!r}")
    return name


def used() -> float:
    """Return the processor time of this process and of those that it has waited for, in seconds."""
    return sum(os.times()[:4])


def measure(args: argparse.Namespace) -> record.Record:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    count = 3 if args.tiny else args.count

    def rows() -> Iterator[record.Row]:
        for part in args.parts:
            begin = used()
            for row in PARTS[part](args.seed, count):
                found = {"part": part, **row, "processor seconds": round(used() - begin, 1)}
                if args.lines:
                    with args.lines.open("a") as file:
                        file.write(json.dumps(found) + "\n")
                yield found
                begin = used()

    return record.with_earlier(NAME, record.record(rows()), *KEYS)


def page(found: record.Record) -> str:
    parts = {name: [row for row in found["rows"] if row["part"] == name] for name in PARTS}
    sections = []
    if rows := parts["networks"]:
        total, groups = (sum(row[key] for row in rows) for key in ("count", "groups"))
        rows = [{"undecided": [], **row} for row in rows]  # rows of earlier runs do not tell them from alarms
        counts = {name: sum(len(row[name]) for row in rows) for name in FOUND}
        table = [{k: len(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
        sections += [
            "## Random networks",
            f"{total:,} networks with {groups:,} groups: the function of {counts['changed']} changes under random permutations, "
            f"`verify` raises for {counts['alarms']} whose function does not change and finds no proof for {counts['undecided']} whose outputs "
            f"rounding alone makes jump, and {counts['failed']} could not be run or traced. "
            "Every network is a program of twelve random steps over all accepted operators, judged by `verify` and by new weights "
            "and inputs.",
            record.table(table, ("seed", "count", "groups", *FOUND, "processor seconds")),
        ]  # fmt: skip
    if rows := parts["files"]:
        sections += [
            "## Changed files",
            "Copies of a file with one to three changes of bytes, lengths or values. Each was read, or refused with one line that "
            "names it; *faults* are other errors.",
            record.table([{k: v for k, v in row.items() if k != "part"} for row in rows]),
        ]  # fmt: skip
    if rows := parts["kills"]:
        sections += [
            "## Killed runs and full disks",
            "A run is killed (SIGKILL) at every event of the file system, and once more when it is resumed; then it is repeated. Its files "
            "may grow to every one of *sizes* bytes. *Faults* are outputs that are neither old nor complete, other bits than those of "
            "an undisturbed run, and files that are left.",
            record.table([{k: v for k, v in row.items() if k != "part"} for row in rows]),
        ]  # fmt: skip
    return record.page("Hunts for faults", NAME, found, *sections)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    # No choices: before Python 3.12, argparse looks for an empty list among them.
    parser.add_argument(
        "parts", nargs="*", type=part, default=list(PARTS), help=f"{', '.join(PARTS)}; all by default"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=20_000, help="networks, or changes of each file")
    parser.add_argument("--lines", type=Path, help="a file to add each row to as soon as it is there")
    return record.run(NAME, measure, page, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
