"""``fastmatch demo`` and ``study``: train, align and measure small networks."""

from __future__ import annotations

import argparse
import io
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmatch._internal.allowed import DEMO_WIDTHS
from fastmatch._internal.checks import check_integer
from fastmatch._internal.places import check_place
from fastmatch.cli.options import Commands, add, add_command
from fastmatch.cli.outputs import say

if TYPE_CHECKING:
    from torch.utils.data import Dataset

__all__ = ["add_commands", "claims_table"]


def add_commands(commands: Commands) -> None:
    """Add the commands to the grammar."""
    command = add_command(
        commands, "demo", demo_command,
        examples=("demo --width 512 --out out",),
    )  # fmt: skip
    command.add_argument("--width", type=int, default=1024, help="width of the MLPs, 128 to 8192")
    command.add_argument(
        "--out", default="out", metavar="FOLDER", help="folder for the picture and the numbers"
    )
    add(command, "--seed", default=0, help="seed of the initial weights, batches and matching")

    command = add_command(
        commands,
        "study",
        study_command,
        examples=("study --widths 1 2 --seeds 0 1 --out study",),
    )
    command.add_argument(
        "--out", default="study", metavar="FOLDER", help="folder for study.html, study.json and study.png"
    )
    command.add_argument(
        "--data", default="digits", metavar="MODULE:CALLABLE",
        help="digits, or a callable that returns (train, test) torch datasets",
    )  # fmt: skip
    command.add_argument(
        "--networks",
        nargs="+",
        metavar="NAME",
        help="some of the study's networks, such as 'VGG, BN'; all by default",
    )
    command.add_argument(
        "--widths", nargs="+", type=int, default=[1, 4], help="factors on the networks' widths"
    )
    command.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4],
        help="each trains one pair of every network and width; verdicts need at least 5",
    )  # fmt: skip
    add(command, "--points", default=5, help="number of points on each curve, odd")
    command.add_argument(
        "--epochs", type=int, help="epochs of training; by default each network's own number"
    )
    command.add_argument(
        "--processes", type=int,
        help="pairs measured side by side, with one thread each; by default as many as torch has threads, at most 8",
    )  # fmt: skip


def demo_command(args: argparse.Namespace) -> None:
    """Train, align, merge and renormalize small networks on digits."""
    least, most = DEMO_WIDTHS
    if not least <= args.width <= most:
        raise ValueError(f"--width: expected {least} to {most}; got {args.width}")
    check_integer("seed", args.seed)
    from fastmatch.studies.demo import run

    silent = args.quiet or args.json
    with redirect_stdout(io.StringIO()) if silent else nullcontext():
        rows = run(args.width, args.out, seed=args.seed)
    if args.json:
        say(args, "", rows=[asdict(row) for row in rows], out=args.out)


def study_command(args: argparse.Namespace) -> None:
    """Measure the paper's claims on small networks and print the verdicts."""
    if args.points < 3 or args.points % 2 == 0:
        raise ValueError(f"--points: expected an odd number of at least 3; got {args.points}")
    for option in ("epochs", "processes"):
        if getattr(args, option) is not None:
            check_integer(option, getattr(args, option), least=1)
    for seed in args.seeds:
        check_integer("seeds", seed)
    if args.data != "digits":
        check_place(args.data, "--data")
    from fastmatch.studies.paper import run

    data = None if args.data == "digits" else _datasets_from(args.data)
    record = run(
        args.out, data=data, networks=args.networks, widths=args.widths, seeds=args.seeds, points=args.points,
        epochs=args.epochs, processes=_default_processes() if args.processes is None else args.processes,
    )  # fmt: skip
    report = Path(args.out) / "study.html"
    text = f"{claims_table(record)}\n\n{record['seconds']['wall']} s; the report is {report}"
    say(args, text, claims=record["claims"], seconds=record["seconds"], report=str(report))


def _default_processes() -> int:
    import torch

    return min(torch.get_num_threads(), 8)  # a process takes up to 1 GB


def _datasets_from(argument: str) -> tuple[Dataset[Any], Dataset[Any]]:
    """Call ``module:callable`` and return the (train, test) datasets that it returns."""
    from fastmatch._internal.callables import called

    built = called(argument, "--data")
    is_pair = isinstance(built, (tuple, list)) and len(built) == 2
    if not is_pair or not all(hasattr(dataset, "__getitem__") for dataset in built):
        raise ValueError(
            f"--data: {argument} returned {type(built).__name__}, expected (train, test) torch datasets"
        )
    return built[0], built[1]


def claims_table(record: dict[str, Any]) -> str:
    """Return the claims of a study's record as lines of text: verdict, cases that hold of those that count, claim."""
    from fastmatch.studies.paper.claims import Claim

    lines = []
    for claim in (Claim(**entry) for entry in record["claims"]):
        counts = claim.counts
        decided = sum(counts[verdict] for verdict in ("holds", "does not hold", "undecided"))
        lines.append(f"{claim.verdict:<13}  {counts['holds']:>2} of {decided:<2}  {claim.claim}")
    return "\n".join(lines)
