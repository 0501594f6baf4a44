"""``fastmatch score``, ``curve``, ``triangle``, ``layers`` and ``distances``: evaluate checkpoints and write a table."""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

from fastmatch._internal.batches import default_forward
from fastmatch._internal.callables import loader_from
from fastmatch._internal.checks import check_integer
from fastmatch._internal.files import load_state
from fastmatch.cli.loading import build_model, function_from, load_into, load_models
from fastmatch.cli.options import Commands, add, add_command
from fastmatch.cli.outputs import CSV_SUFFIXES, check_outputs, write_table
from fastmatch.evaluation.between import Renormalized
from fastmatch.evaluation.curve import LEAST_ON_A_LINE, interpolate
from fastmatch.evaluation.distances import distances
from fastmatch.evaluation.layers import layer_table
from fastmatch.evaluation.plots import PICTURES, draw_panels
from fastmatch.evaluation.scores import score
from fastmatch.evaluation.table import Table
from fastmatch.evaluation.triangle import LEAST_ON_A_SIDE, triangle
from fastmatch.renorm import Renormalization

__all__ = ["add_commands"]

DRAWN = ("loss", "accuracy", "metric")
"""What a picture shows, a panel each, as far as it was measured."""
LAYER_COLUMNS = ("model", "layer", "variance", "dead inputs", "variance ratio", "feature ratio")
"""The columns of ``layers`` that are printed: those that tell in which layer a merge loses what its endpoints have."""
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


def _measures(args: argparse.Namespace) -> dict[str, Any]:
    """Return the functions that the options name, as arguments of the library's calls."""
    return {
        "loss": function_from(args.loss, "--loss", None),
        "metric": function_from(args.metric, "--metric", None),
        "forward": function_from(args.forward, "--forward", default_forward),
    }


def _add_outputs(command: argparse.ArgumentParser, *, plot: bool = False) -> None:
    add(command, "--out", help="CSV file to write; by default the table is printed alone", required=False)
    if plot:
        add(command, "--plot")
    add(command, "--force")


def score_command(args: argparse.Namespace) -> None:
    """Evaluate checkpoints one after the other."""
    check_outputs(args, out=CSV_SUFFIXES)
    model, _ = build_model(args.model)
    data, measures = loader_from(args.data, "--data"), _measures(args)
    rows = []
    for path in args.checkpoints:
        found = score(load_into(model, path), data, **measures)
        rows.append({"checkpoint": path, "loss": found.loss, "top-1": found.accuracy, "top-5": found.top5})
        if args.metric is not None:
            rows[-1]["metric"] = found.metric
    write_table(Table(tuple(rows)), args)


def curve_command(args: argparse.Namespace) -> None:
    """Evaluate the line between two checkpoints."""
    check_integer("points", args.points, LEAST_ON_A_LINE)
    for option in ("calibration", "mode", "samples"):
        if args.renormalize is None and getattr(args, option) is not None:
            raise ValueError(f"--{option}: is an option of --renormalize, which is not given")
    if args.renormalize is not None and args.calibration is None:
        raise ValueError(f"--calibration: needed by --renormalize {args.renormalize}")
    options = Renormalization(args.renormalize or "auto", args.mode or "joint", args.samples)
    check_outputs(args, out=CSV_SUFFIXES, plot=PICTURES)
    model, _ = build_model(args.model)
    data = loader_from(args.data, "--data")
    between = None
    if args.renormalize is not None:
        between = Renormalized(loader_from(args.calibration, "--calibration"), options)
    pair = load_into(model, args.a), load_into(model, args.b)
    curve = interpolate(*pair, data, args.points, between=between, **_measures(args))
    if args.plot is not None:
        measured = [metric for metric in DRAWN if getattr(curve, metric)]
        draw_panels(curve.plot, measured, args.plot, (5, 2.6), is_row=False)
    text = f"loss barrier {curve.barrier:.4f}"
    if curve.accuracy:
        text += f", accuracy barrier {curve.accuracy_barrier:.4f}"
    write_table(
        curve.table(), args, text, loss_barrier=curve.barrier, accuracy_barrier=curve.accuracy_barrier
    )


def triangle_command(args: argparse.Namespace) -> None:
    """Evaluate the triangle of three checkpoints."""
    check_integer("points", args.points, LEAST_ON_A_SIDE)
    check_outputs(args, out=CSV_SUFFIXES, plot=PICTURES)
    found = triangle(
        load_models(args), loader_from(args.data, "--data"), points=args.points, **_measures(args)
    )
    if args.plot is not None:
        rows = found.scores
        measured = [m for m in DRAWN if m == "loss" or not all(math.isnan(getattr(s, m)) for s in rows)]
        plot = partial(found.plot, names=[Path(path).stem for path in args.checkpoints])
        draw_panels(plot, measured, args.plot, (5, 4), is_row=True)
    write_table(found.table(), args, f"loss barrier {found.barrier:.4f}", loss_barrier=found.barrier)


def layers_command(args: argparse.Namespace) -> None:
    """Measure the layers of checkpoints, a row for each; all columns would be too wide for a terminal."""
    if unknown := [path for path in args.endpoints if path not in args.checkpoints]:
        raise ValueError(
            f"--endpoints: {unknown[0]} is not one of the checkpoints {' '.join(args.checkpoints)}"
        )
    check_outputs(args, out=CSV_SUFFIXES)
    models = dict(zip(args.checkpoints, load_models(args), strict=True))
    forward = function_from(args.forward, "--forward", default_forward)
    data = loader_from(args.data, "--data")
    table = layer_table(models, data, endpoints=args.endpoints, forward=forward)
    write_table(table, args, shown=LAYER_COLUMNS)


def distances_command(args: argparse.Namespace) -> None:
    """Write the distance of every two checkpoints."""
    check_outputs(args, out=CSV_SUFFIXES)
    write_table(distances({path: load_state(path) for path in args.checkpoints}), args)
