"""``fastmatch curve``, ``triangle``, ``layers`` and ``distances``: evaluate checkpoints and write a table."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastmatch._internal.files import load_state
from fastmatch.cli.loading import (
    CSV_SUFFIXES,
    build_model,
    check_outputs,
    load_into,
    load_models,
    loader_from,
    write_table,
)
from fastmatch.cli.options import Commands, add, add_command
from fastmatch.evaluation.between import Renormalized
from fastmatch.evaluation.curve import interpolate
from fastmatch.evaluation.distances import distances
from fastmatch.evaluation.layers import layer_table
from fastmatch.evaluation.plots import PICTURES
from fastmatch.evaluation.triangle import triangle
from fastmatch.renorm import Renormalization

__all__ = ["add_commands"]

LABELLED = "callable that returns a loader of (inputs, targets)"


def add_commands(commands: Commands) -> None:
    """Add the commands to the grammar."""
    command = add_command(
        commands, "curve", curve_command, "loss, top-1 and top-5 accuracy on the line between two checkpoints"
    )
    command.add_argument("a", help="the checkpoint at lambda = 0")
    command.add_argument("b", help="the checkpoint at lambda = 1, aligned to the first")
    add(command, "--model", required=True)
    add(command, "--data", required=True, help=LABELLED)
    add(command, "--points", default=11, help="number of equidistant points, endpoints included")
    add(command, "--renormalize", help="renormalize the merges between the endpoints by this method")
    command.add_argument(
        "--calibration", metavar="MODULE:CALLABLE",
        help="callable that returns the loader to renormalize on; needed with --renormalize",
    )  # fmt: skip
    add(command, "--mode", "--samples")
    _add_outputs(command, plot=True)

    command = add_command(
        commands, "triangle", triangle_command, "loss and accuracy over the triangle of three checkpoints"
    )
    command.add_argument("checkpoints", nargs=3, help="three aligned checkpoints")
    add(command, "--model", required=True)
    add(command, "--data", required=True, help=LABELLED)
    add(command, "--points", default=5, help="number of points on each side, corners included")
    _add_outputs(command, plot=True)

    command = add_command(
        commands, "layers", layers_command, "per layer: variances, dead inputs and vanishing features on data"
    )
    command.add_argument("checkpoints", nargs="+", help="one or more checkpoints")
    add(command, "--model", "--data", required=True)
    command.add_argument(
        "--endpoints", nargs="*", default=[], metavar="FILE",
        help="those of the checkpoints whose mean variance is the denominator of the variance ratios",
    )  # fmt: skip
    _add_outputs(command)

    command = add_command(commands, "distances", distances_command, "L2 distances between checkpoints")
    command.add_argument("checkpoints", nargs="+", help="two or more checkpoints")
    _add_outputs(command)


def _add_outputs(command: argparse.ArgumentParser, *, plot: bool = False) -> None:
    add(command, "--out", help="CSV file to write")
    if plot:
        add(command, "--plot")
    add(command, "--force")


def curve_command(args: argparse.Namespace) -> None:
    """Evaluate the line between two checkpoints."""
    check_outputs(args, out=CSV_SUFFIXES, plot=PICTURES)
    for option in ("calibration", "mode", "samples"):
        if args.renormalize is None and getattr(args, option) is not None:
            raise ValueError(f"--{option}: is an option of --renormalize, which is not given")
    if args.renormalize is not None and args.calibration is None:
        raise ValueError(f"--calibration: needed by --renormalize {args.renormalize}")
    model, _ = build_model(args.model)
    data = loader_from(args.data, "--data")
    between = None
    if args.renormalize is not None:
        options = Renormalization(args.renormalize, args.mode or "joint", args.samples)
        between = Renormalized(loader_from(args.calibration, "--calibration"), options)
    curve = interpolate(
        load_into(model, args.a), load_into(model, args.b), data, args.points, between=between
    )
    if args.plot is not None:
        curve.plot(args.plot)
    write_table(curve.table(), args)
    print(f"loss barrier {curve.barrier:.4f}, accuracy barrier {curve.accuracy_barrier:.4f}")


def triangle_command(args: argparse.Namespace) -> None:
    """Evaluate the triangle of three checkpoints."""
    check_outputs(args, out=CSV_SUFFIXES, plot=PICTURES)
    found = triangle(load_models(args), loader_from(args.data, "--data"), points=args.points)
    if args.plot is not None:
        found.plot(args.plot, names=[Path(path).stem for path in args.checkpoints])
    write_table(found.table(), args)
    print(f"loss barrier {found.barrier:.4f}")


def layers_command(args: argparse.Namespace) -> None:
    """Write one row per checkpoint and layer."""
    check_outputs(args, out=CSV_SUFFIXES)
    models = dict(zip(args.checkpoints, load_models(args), strict=True))
    write_table(layer_table(models, loader_from(args.data, "--data"), endpoints=args.endpoints), args)


def distances_command(args: argparse.Namespace) -> None:
    """Write the distance of every two checkpoints."""
    check_outputs(args, out=CSV_SUFFIXES)
    write_table(distances({path: load_state(path) for path in args.checkpoints}), args)
