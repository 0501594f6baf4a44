"""``fastmatch renormalize``: correct the statistics of a merged or pruned checkpoint on data."""

from __future__ import annotations

import argparse
from typing import get_args

from fastmatch._internal.allowed import PAGES, STATE_SUFFIXES, Method
from fastmatch._internal.checks import check_integer, check_weights
from fastmatch.cli.options import Commands, add, add_command
from fastmatch.cli.outputs import check_outputs

__all__ = ["add_commands"]


def add_commands(commands: Commands) -> None:
    """Add the command to the grammar."""
    command = add_command(
        commands, "renormalize", renormalize_command,
        examples=(
            "renormalize merged.pt --endpoints a.pt b_aligned.pt --weights 0.5 0.5 --model net.py:build "
            "--data net.py:loader --method repair --out renormalized.pt",
            "renormalize merged.pt --model net.py:build --data net.py:loader --method reset --out renormalized.pt",
        ),
    )  # fmt: skip
    command.add_argument("checkpoint", help="the merged or pruned checkpoint")
    command.add_argument(
        "--endpoints", nargs="+", default=[], metavar="FILE",
        help="the aligned checkpoints that were merged, or the dense one that was pruned; needed unless the method is reset",
    )  # fmt: skip
    add(command, "--model", required=True)
    add(command, "--data", required=True, help="callable that returns the loader to calibrate on")
    add(command, "--forward")
    command.add_argument("--method", default="auto", choices=get_args(Method), help="how to renormalize")
    add(
        command,
        "--weights",
        help="the coefficients of the merge, one per endpoint; not needed for one endpoint",
    )
    command.add_argument(
        "--other-endpoints", action="store_true",
        help="do not check that the checkpoint is the sum of --endpoints by --weights: it was merged in another way, or renormalized before",
    )  # fmt: skip
    add(command, "--mode", "--samples", "--out", "--force", "--report")
    add(
        command,
        "--report-data",
        help="of --report: callable that returns a loader of (inputs, targets) to measure on (default: that of --data)",
    )


def renormalize_command(args: argparse.Namespace) -> None:
    """Renormalize a checkpoint and write it."""
    if args.report is not None and not args.endpoints:
        raise ValueError("--report: compares the result with --endpoints, which are not given")
    if args.method == "reset" and args.report is None:
        for option in ("endpoints", "weights"):
            if getattr(args, option):
                raise ValueError(
                    f"--{option}: --method reset uses the data alone and takes none, except for --report"
                )
    if args.other_endpoints and len(args.endpoints) < 2:
        raise ValueError("--other-endpoints: is for two --endpoints or more, which are checked without it")
    if args.samples is not None:
        check_integer("samples", args.samples, least=1)
    if len(args.endpoints) > 1 and args.method != "reset" and args.weights is None:
        equal = " ".join([f"{1 / len(args.endpoints):.3g}"] * len(args.endpoints))
        raise ValueError(
            f"--weights: needed for {len(args.endpoints)} endpoints, the coefficients of the merge, such as {equal}"
        )
    if args.endpoints:
        check_weights(args.weights, len(args.endpoints))
    check_outputs(args, out=STATE_SUFFIXES, report=PAGES)
    from fastmatch.cli.work.renormalize import renormalize_checkpoint

    renormalize_checkpoint(args)
