"""``fastmatch score``, ``curve``, ``triangle``, ``layers`` and ``distances``: evaluate checkpoints and write a table."""

from __future__ import annotations

import argparse
from typing import Any

from fastmatch._internal.allowed import LEAST_ON_A_LINE, LEAST_ON_A_SIDE, PICTURES
from fastmatch._internal.checks import check_integer
from fastmatch._internal.outputs import real_path
from fastmatch.cli.options import Commands, add, add_command
from fastmatch.cli.outputs import CSV_SUFFIXES, check_outputs

__all__ = ["add_commands"]

LABELLED = "callable that returns a loader of (inputs, targets), or of mappings with labels"


def add_commands(commands: Commands) -> None:
    """Add the commands to the grammar."""
    command = add_command(
        commands, "score", score_command,
        examples=(
            "score a.pt b.pt merged.pt --model net.py:build --data net.py:test_loader",
            "score merged.pt --model net.py:build --data net.py:test_loader --metric net.py:error_rate --out scores.csv",
        ),
    )  # fmt: skip
    command.add_argument("checkpoints", nargs="+", help="one or more checkpoints of one architecture")
    add(command, "--model", required=True)
    add(command, "--data", required=True, help=LABELLED)
    _add_measures(command)
    _add_outputs(command)

    command = add_command(
        commands, "curve", curve_command,
        examples=(
            "curve a.pt b_aligned.pt --model net.py:build --data net.py:test_loader --plot curve.svg --out curve.csv",
            "curve a.pt b_aligned.pt --model net.py:build --data net.py:test_loader --loss torch.nn.functional:mse_loss "
            "--out curve.csv",
        ),
    )  # fmt: skip
    command.add_argument("a", help="the checkpoint at lambda = 0")
    command.add_argument("b", help="the checkpoint at lambda = 1, aligned to the first")
    add(command, "--model", required=True)
    add(command, "--data", required=True, help=LABELLED)
    _add_measures(command)
    add(command, "--points", default=11, help="number of equidistant points, endpoints included")
    add(command, "--renormalize", help="renormalize the merges between the endpoints by this method")
    command.add_argument(
        "--calibration", metavar="MODULE:CALLABLE",
        help="callable that returns the loader to renormalize on; needed with --renormalize",
    )  # fmt: skip
    add(command, "--mode", "--samples")
    _add_outputs(command, plot=True)

    command = add_command(
        commands, "triangle", triangle_command,
        examples=("triangle a.pt b_aligned.pt c_aligned.pt --model net.py:build --data net.py:test_loader --out t.csv",),
    )  # fmt: skip
    command.add_argument("checkpoints", nargs=3, help="three aligned checkpoints")
    add(command, "--model", required=True)
    add(command, "--data", required=True, help=LABELLED)
    _add_measures(command)
    add(command, "--points", default=5, help="number of points on each side, corners included")
    _add_outputs(command, plot=True)

    command = add_command(
        commands, "layers", layers_command,
        examples=(
            "layers a.pt b_aligned.pt merged.pt --endpoints a.pt b_aligned.pt --model net.py:build --data net.py:loader "
            "--out layers.csv",
        ),
    )  # fmt: skip
    command.add_argument("checkpoints", nargs="+", help="one or more checkpoints")
    add(command, "--model", "--data", required=True)
    add(command, "--forward")
    command.add_argument(
        "--endpoints", nargs="*", default=[], metavar="FILE",
        help="those of the checkpoints whose mean variance is the denominator of the variance ratios",
    )  # fmt: skip
    _add_outputs(command)

    command = add_command(
        commands, "distances", distances_command,
        examples=("distances a.pt b.pt b_aligned.pt --out distances.csv",),
    )  # fmt: skip
    command.add_argument("checkpoints", nargs="+", help="two or more checkpoints")
    _add_outputs(command)


def _add_measures(command: argparse.ArgumentParser) -> None:
    measure: dict[str, Any] = {"metavar": "MODULE:CALLABLE"}
    command.add_argument(
        "--loss", **measure,
        help="function of (outputs, targets), such as torch.nn.functional:mse_loss; by default the loss that the network "
        "returns if it takes labels, else the cross entropy",
    )  # fmt: skip
    command.add_argument("--metric", **measure, help="another function of (outputs, targets) to measure")
    add(command, "--forward")


def _add_outputs(command: argparse.ArgumentParser, *, plot: bool = False) -> None:
    add(command, "--out", help="CSV file to write; by default the table is printed alone", required=False)
    if plot:
        add(command, "--plot")
    add(command, "--force")


def score_command(args: argparse.Namespace) -> None:
    """Evaluate checkpoints one after the other."""
    check_outputs(args, out=CSV_SUFFIXES)
    from fastmatch.cli.work.evaluate import score_checkpoints

    score_checkpoints(args)


def curve_command(args: argparse.Namespace) -> None:
    """Evaluate the line between two checkpoints."""
    check_integer("points", args.points, LEAST_ON_A_LINE)
    for option in ("calibration", "mode", "samples"):
        if args.renormalize is None and getattr(args, option) is not None:
            raise ValueError(f"--{option}: is an option of --renormalize, which is not given")
    if args.renormalize is not None and args.calibration is None:
        raise ValueError(f"--calibration: needed by --renormalize {args.renormalize}")
    if args.samples is not None:
        check_integer("samples", args.samples, least=1)
    check_outputs(args, out=CSV_SUFFIXES, plot=PICTURES)
    from fastmatch.cli.work.evaluate import draw_curve

    draw_curve(args)


def triangle_command(args: argparse.Namespace) -> None:
    """Evaluate the triangle of three checkpoints."""
    check_integer("points", args.points, LEAST_ON_A_SIDE)
    check_outputs(args, out=CSV_SUFFIXES, plot=PICTURES)
    from fastmatch.cli.work.evaluate import draw_triangle

    draw_triangle(args)


def layers_command(args: argparse.Namespace) -> None:
    """Measure the layers of checkpoints, a row for each; all columns would be too wide for a terminal."""
    if unknown := [path for path in args.endpoints if path not in args.checkpoints]:
        raise ValueError(
            f"--endpoints: {unknown[0]} is not one of the checkpoints {' '.join(args.checkpoints)}"
        )
    check_outputs(args, out=CSV_SUFFIXES)
    from fastmatch.cli.work.evaluate import measure_layers

    measure_layers(args)


def distances_command(args: argparse.Namespace) -> None:
    """Write the distance of every two checkpoints."""
    places = [real_path(path) for path in args.checkpoints]
    twice = [path for path, place in zip(args.checkpoints, places, strict=True) if places.count(place) > 1]
    if twice:
        raise ValueError(f"checkpoints: expected different ones; {twice[0]} is there twice")
    if len(args.checkpoints) < 2:
        raise ValueError("checkpoints: expected at least two, got 1")
    check_outputs(args, out=CSV_SUFFIXES)
    from fastmatch.cli.work.evaluate import measure_distances

    measure_distances(args)
