"""``fastmatch renormalize``: correct the statistics of a merged or pruned checkpoint on data."""

from __future__ import annotations

import argparse
from typing import get_args

from fastmatch._internal.batches import default_forward
from fastmatch._internal.files import STATE_SUFFIXES
from fastmatch.cli.loading import build_model, function_from, load_into, loader_from
from fastmatch.cli.options import Commands, add, add_command
from fastmatch.cli.outputs import check_outputs, say, write_weights
from fastmatch.renorm import Renormalization, plan_renormalization, renormalize
from fastmatch.renorm.options import Method

__all__ = ["add_commands"]


def add_commands(commands: Commands) -> None:
    """Add the command to the grammar."""
    command = add_command(
        commands, "renormalize", renormalize_command,
        "give a merged or pruned checkpoint the activation statistics of its endpoints",
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
    forward = function_from(args.forward, "--forward", default_forward)
    new = renormalize(merged, endpoints or None, data, options, weights=args.weights, forward=forward)
    write_weights(new.state_dict(), args.out, force=args.force)
    left = dict(plan.left_alone)
    say(
        args,
        f"{plan}\nwrote {args.out}",
        method=plan.method,
        layers=list(plan.layers),
        left_alone=left,
        out=args.out,
    )
