"""``fastmatch renormalize``: correct the statistics of a merged or pruned checkpoint on data."""

from __future__ import annotations

import argparse
from typing import get_args

from fastmatch._internal.files import STATE_SUFFIXES, save_state
from fastmatch.cli.loading import build_model, check_outputs, load_into, loader_from
from fastmatch.cli.options import Commands, add, add_command
from fastmatch.renorm import Renormalization, plan_renormalization, renormalize
from fastmatch.renorm.options import Method

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
    add(command, "--mode", "--samples", "--out", "--force")


def renormalize_command(args: argparse.Namespace) -> None:
    """Renormalize a checkpoint and write it."""
    check_outputs(args, out=STATE_SUFFIXES)
    if args.method == "reset":
        for option in ("endpoints", "weights"):
            if getattr(args, option):
                raise ValueError(f"--{option}: --method reset uses the data alone and takes none")
    options = Renormalization(args.method, args.mode or "joint", args.samples)
    model, _ = build_model(args.model)
    data = loader_from(args.data, "--data")
    merged = load_into(model, args.checkpoint)
    endpoints = [load_into(model, path) for path in args.endpoints]
    plan = plan_renormalization(merged, options)
    if plan.method != "reset" and not endpoints:
        raise ValueError(f"--endpoints: needed for method {plan.method!r}")
    new = renormalize(merged, endpoints or None, data, options, weights=args.weights)
    save_state(new.state_dict(), args.out, force=args.force)
    print(f"{plan}\nwrote {args.out}")
