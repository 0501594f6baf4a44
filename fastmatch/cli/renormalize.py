"""``fastmatch renormalize``: correct the statistics of a merged or pruned checkpoint on data."""

from __future__ import annotations

import argparse
from typing import get_args

from fastmatch._internal.files import STATE_SUFFIXES, save_state, shared_metadata
from fastmatch._internal.ties import with_names_of
from fastmatch.cli.loading import build_model, check_outputs, load_into, loader_from
from fastmatch.cli.options import Commands, add, add_command
from fastmatch.cli.reports import PAGES, report_data, write_report
from fastmatch.renorm import Renormalization, applied_plan, renormalize
from fastmatch.renorm.options import Method
from fastmatch.renorm.plan import candidates

__all__ = ["add_commands"]


def add_commands(commands: Commands) -> None:
    """Add the command to the grammar."""
    command = add_command(
        commands, "renormalize", renormalize_command,
        "give a merged or pruned checkpoint the activation statistics of its endpoints",
    )  # fmt: skip
    command.add_argument("checkpoint", help="the merged or pruned checkpoint")
    command.add_argument(
        "--endpoints", nargs="+", default=[], metavar="FILE",
        help="the aligned checkpoints that were merged, or the dense one that was pruned; needed unless the method is reset",
    )  # fmt: skip
    add(command, "--model", required=True)
    add(command, "--data", required=True, help="callable that returns the loader to calibrate on")
    command.add_argument("--method", default="auto", choices=get_args(Method), help="how to renormalize")
    add(
        command,
        "--weights",
        help="the coefficients of the merge, one per endpoint; not needed for one endpoint",
    )
    add(command, "--mode", "--samples", "--out", "--force", "--report")
    add(
        command,
        "--report-data",
        help="of --report: callable that returns a loader of (inputs, targets) to measure on (default: that of --data)",
    )


def renormalize_command(args: argparse.Namespace) -> None:
    """Renormalize a checkpoint and write it."""
    check_outputs(args, out=STATE_SUFFIXES, report=PAGES)
    if args.report is not None and not args.endpoints:
        raise ValueError("--report: compares the result with --endpoints, which are not given")
    measured = report_data(args)
    if args.method == "reset" and args.report is None:
        for option in ("endpoints", "weights"):
            if getattr(args, option):
                raise ValueError(
                    f"--{option}: --method reset uses the data alone and takes none, except for --report"
                )
    options = Renormalization(args.method, args.mode or "joint", args.samples)
    model, _ = build_model(args.model)
    data = loader_from(args.data, "--data")
    merged = load_into(model, args.checkpoint)
    endpoints = [load_into(model, path) for path in args.endpoints]
    if not endpoints and options.method != "reset" and "reset" not in candidates(merged, options):
        raise ValueError(f"--endpoints: needed for method {options.method!r}")
    if options.method == "reset":
        new = renormalize(merged, None, data, options)
    else:
        new = renormalize(merged, endpoints or None, data, options, weights=args.weights)
    metadata = shared_metadata([args.checkpoint])
    state = with_names_of(new.state_dict(), args.checkpoint, new)
    save_state(state, args.out, force=args.force, metadata=metadata)
    print(f"{applied_plan(new)}\nwrote {args.out}")
    if args.report is not None:
        from fastmatch.report.merge import merge_report

        report = merge_report(
            merged, endpoints, data if measured is None else measured, renormalized=new, weights=args.weights,
            names=args.endpoints,
        )  # fmt: skip
        write_report(report, args)
