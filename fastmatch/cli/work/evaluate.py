"""The work of ``fastmatch score``, ``curve``, ``triangle``, ``layers`` and ``distances``, once their options are checked."""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

from fastmatch._internal.batches import default_forward
from fastmatch._internal.callables import loader_from
from fastmatch._internal.files import load_state
from fastmatch.cli.loading import build_model, function_from, load_into, load_models
from fastmatch.cli.writing import write_table
from fastmatch.evaluation.between import Renormalized
from fastmatch.evaluation.curve import interpolate
from fastmatch.evaluation.distances import distances
from fastmatch.evaluation.layers import layer_table
from fastmatch.evaluation.plots import draw_panels
from fastmatch.evaluation.scores import score
from fastmatch.evaluation.table import Table
from fastmatch.evaluation.triangle import triangle
from fastmatch.renorm import Renormalization

__all__ = ["draw_curve", "draw_triangle", "measure_distances", "measure_layers", "score_checkpoints"]

DRAWN = ("loss", "accuracy", "metric")
"""What a picture shows, a panel each, as far as it was measured."""
LAYER_COLUMNS = ("model", "layer", "variance", "dead inputs", "variance ratio", "feature ratio")
"""The columns of ``layers`` that are printed: those that tell in which layer a merge loses what its endpoints have."""


def _measures(args: argparse.Namespace) -> dict[str, Any]:
    """Return the functions that the options name, as arguments of the library's calls."""
    return {
        "loss": function_from(args.loss, "--loss", None),
        "metric": function_from(args.metric, "--metric", None),
        "forward": function_from(args.forward, "--forward", default_forward),
    }


def score_checkpoints(args: argparse.Namespace) -> None:
    """Evaluate checkpoints one after the other."""
    model, _ = build_model(args.model)
    data, measures = loader_from(args.data, "--data"), _measures(args)
    rows = []
    for path in args.checkpoints:
        found = score(load_into(model, path), data, **measures)
        rows.append({"checkpoint": path, "loss": found.loss, "top-1": found.accuracy, "top-5": found.top5})
        if args.metric is not None:
            rows[-1]["metric"] = found.metric
    write_table(Table(tuple(rows)), args)


def draw_curve(args: argparse.Namespace) -> None:
    """Evaluate the line between two checkpoints."""
    options = Renormalization(args.renormalize or "auto", args.mode or "joint", args.samples)
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
    if curve.has_no_rise:
        text += " (half the difference of the ends: no merge has a higher loss than both)"
    if curve.accuracy:
        text += f", accuracy barrier {curve.accuracy_barrier:.4f}"
    write_table(
        curve.table(), args, text, loss_barrier=curve.barrier, accuracy_barrier=curve.accuracy_barrier
    )


def draw_triangle(args: argparse.Namespace) -> None:
    """Evaluate the triangle of three checkpoints."""
    found = triangle(
        load_models(args), loader_from(args.data, "--data"), points=args.points, **_measures(args)
    )
    if args.plot is not None:
        rows = found.scores
        measured = [m for m in DRAWN if m == "loss" or not all(math.isnan(getattr(s, m)) for s in rows)]
        plot = partial(found.plot, names=[Path(path).stem for path in args.checkpoints])
        draw_panels(plot, measured, args.plot, (5, 4), is_row=True)
    write_table(
        found.table(),
        args,
        f"loss barrier {found.barrier:.4f} above the mixed corners",
        loss_barrier=found.barrier,
    )


def measure_layers(args: argparse.Namespace) -> None:
    """Measure the layers of checkpoints, a row for each; all columns would be too wide for a terminal."""
    models = dict(zip(args.checkpoints, load_models(args), strict=True))
    forward = function_from(args.forward, "--forward", default_forward)
    data = loader_from(args.data, "--data")
    table = layer_table(models, data, endpoints=args.endpoints, forward=forward)
    write_table(table, args, shown=LAYER_COLUMNS)


def measure_distances(args: argparse.Namespace) -> None:
    """Write the distance of every two checkpoints."""
    write_table(distances({path: load_state(path) for path in args.checkpoints}), args)
