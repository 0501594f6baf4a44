"""``fastmatch renormalize``: correct the statistics of a merged or pruned checkpoint on data."""

from __future__ import annotations

import argparse
from typing import get_args

from fastmatch._internal.batches import default_forward
from fastmatch._internal.callables import loader_from
from fastmatch._internal.coefficients import check_weights
from fastmatch._internal.files import STATE_SUFFIXES, shared_metadata
from fastmatch._internal.model_files import with_names_of
from fastmatch.cli.loading import build_model, function_from, load_into
from fastmatch.cli.options import Commands, add, add_command
from fastmatch.cli.outputs import check_outputs, say, write_weights
from fastmatch.cli.reports import PAGES, report_data, write_report
from fastmatch.renorm import Renormalization, applied_plan, renormalize
from fastmatch.renorm.options import Method
from fastmatch.renorm.plan import candidates

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
    options = Renormalization(args.method, args.mode or "joint", args.samples)
    if len(args.endpoints) > 1 and options.method != "reset" and args.weights is None:
        equal = " ".join([f"{1 / len(args.endpoints):.3g}"] * len(args.endpoints))
        raise ValueError(
            f"--weights: needed for {len(args.endpoints)} endpoints, the coefficients of the merge, such as {equal}"
        )
    if args.endpoints:
        check_weights(args.weights, len(args.endpoints))
    check_outputs(args, out=STATE_SUFFIXES, report=PAGES)
    measured = report_data(args)
    model, _ = build_model(args.model)
    data = loader_from(args.data, "--data")
    merged = load_into(model, args.checkpoint)
    endpoints = [load_into(model, path) for path in args.endpoints]
    if not endpoints and options.method != "reset" and "reset" not in candidates(merged, options):
        raise ValueError(f"--endpoints: needed for method {options.method!r}")
    forward = function_from(args.forward, "--forward", default_forward)
    if options.method == "reset":
        new = renormalize(merged, None, data, options, forward=forward)
    else:
        new = renormalize(merged, endpoints or None, data, options, weights=args.weights, forward=forward)
    state = with_names_of(new.state_dict(), args.checkpoint, new)
    write_weights(state, args.out, force=args.force, metadata=shared_metadata([args.checkpoint]))
    plan = applied_plan(new)
    assert plan is not None
    say(
        args,
        f"{plan}\nwrote {args.out}",
        method=plan.method,
        why=plan.why,
        layers=list(plan.layers),
        left_alone=dict(plan.left_alone),
        kept=dict(plan.kept),
        new_parameters=list(plan.added),
        out=args.out,
        report=args.report,
    )
    if args.report is not None:
        from fastmatch.report.merge import merge_report

        report = merge_report(
            merged, endpoints, data if measured is None else measured, renormalized=new, weights=args.weights,
            names=args.endpoints, forward=forward,
        )  # fmt: skip
        write_report(report, args)
