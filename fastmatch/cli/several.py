"""Commands on several checkpoints: ``align-many``, ``merge``, ``triangle``, ``layers``, ``distances``.

Each is the library call of that name with files for models; a table goes to a CSV file and is printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from torch import nn

from fastmatch._internal.files import (
    TORCH_SUFFIXES,
    check_format,
    check_target,
    load_state,
    save_state,
)
from fastmatch.cli.renormalize import load_into, loader_of
from fastmatch.evaluation.table import Table

__all__ = ["add_arguments"]

PICTURES = {".png", ".svg", ".pdf"}


def add_arguments(commands: Any) -> None:
    """Adds the sub-commands to those of an argument parser."""
    command = commands.add_parser("align-many", help="bring several checkpoints into one order")
    command.add_argument("checkpoints", nargs="+", help="two or more; the first stays as it is")
    command.add_argument("--model", required=True, help="module:callable that builds the network")
    command.add_argument("--input-shape", help="shape of an example input, such as 2,3,32,32")
    command.add_argument("--how", default="mean", choices=("reference", "chain", "mean", "universe"))
    command.add_argument("--data", help="of reference and chain: module:callable that returns a loader")
    command.add_argument("--out", required=True, nargs="+", help="a file for each checkpoint but the first")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--force", action="store_true", help="replace output files that exist")
    command.set_defaults(run=align_many_command)

    command = commands.add_parser("merge", help="average aligned checkpoints; no data is read")
    command.add_argument("checkpoints", nargs="+", help="one or more")
    command.add_argument("--model", required=True, help="module:callable that builds the network")
    command.add_argument(
        "--weights", nargs="+", type=float, help="one a checkpoint; equal ones where left out"
    )
    command.add_argument(
        "--biases", choices=("average", "normalize", "remove"), default="average",
        help="normalize: keep pace with shrinking activations; remove: set them to zero",
    )  # fmt: skip
    command.add_argument("--out", required=True, help="file to write: .safetensors, .pt, .pth or .bin")
    command.add_argument("--force", action="store_true", help="replace output files that exist")
    command.set_defaults(run=merge_command)

    command = commands.add_parser("triangle", help="loss and accuracy over the triangle of three checkpoints")
    command.add_argument("checkpoints", nargs=3, help="three, aligned")
    _data_arguments(command)
    command.add_argument("--points", type=int, default=5, help="on each side")
    command.add_argument("--plot", help="also draw it: .png, .svg or .pdf")
    command.set_defaults(run=triangle_command)

    command = commands.add_parser("layers", help="per layer: variances, dead inputs, vanishing features")
    command.add_argument("checkpoints", nargs="+")
    _data_arguments(command)
    command.add_argument(
        "--endpoints", nargs="*", default=[], help="of these checkpoints, what ratios are over"
    )
    command.set_defaults(run=layers_command)

    command = commands.add_parser("distances", help="L2 distances between checkpoints")
    command.add_argument("checkpoints", nargs="+", help="two or more")
    command.add_argument("--out", required=True, help="CSV file to write")
    command.add_argument("--force", action="store_true", help="replace output files that exist")
    command.set_defaults(run=distances_command)


def _data_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help="module:callable that builds the network")
    command.add_argument("--data", required=True, help="module:callable that returns a loader")
    command.add_argument("--out", required=True, help="CSV file to write")
    command.add_argument("--force", action="store_true", help="replace output files that exist")


def _models(args: argparse.Namespace) -> tuple[list[nn.Module], Any]:
    from fastmatch.cli.main import build_model

    model, built = build_model(args.model)
    return [load_into(model, path) for path in args.checkpoints], built


def _data(args: argparse.Namespace) -> Any:
    from fastmatch.cli.main import callable_from

    return loader_of(callable_from(args.data, "--data"), "--data")


def _check_targets(
    args: argparse.Namespace, paths: list[str], suffixes: AbstractSet[str], option: str
) -> None:
    if len({Path(p).resolve() for p in paths}) < len(paths):
        raise ValueError(f"{option}: expected a file of its own for each output, got {paths}")
    for path in paths:
        check_format(path, option, suffixes)
        check_target(path, force=args.force)


def _write(table: Table, args: argparse.Namespace) -> None:
    table.to_csv(args.out, force=args.force)
    print(f"{table}\nwrote {args.out}")


def align_many_command(args: argparse.Namespace) -> None:
    """Aligns all checkpoints to the first one's order and writes the others."""
    from fastmatch.cli.main import example_from
    from fastmatch.matching.activations import ActivationMatching
    from fastmatch.matching.align_many import align_many
    from fastmatch.matching.frank_wolfe import FrankWolfe
    from fastmatch.matching.merge_many import MergeMany
    from fastmatch.matching.pairwise import Chain, ToReference
    from fastmatch.matching.weights import WeightMatching

    if len(args.out) != len(args.checkpoints) - 1:
        raise ValueError(
            f"--out: expected {len(args.checkpoints) - 1} files, one a checkpoint but the first, got {len(args.out)}"
        )
    _check_targets(args, args.out, TORCH_SUFFIXES | {".safetensors"}, "--out")
    models, built = _models(args)
    if args.how in ("mean", "universe"):
        if args.data:
            raise ValueError(f"--data: --how {args.how} matches weights; give it with reference or chain")
        strategy = (MergeMany if args.how == "mean" else FrankWolfe)(
            WeightMatching("identity", seed=args.seed)
        )
    else:
        matcher = ActivationMatching(_data(args)) if args.data else WeightMatching(seed=args.seed)
        strategy = (ToReference if args.how == "reference" else Chain)(matcher)
    found = align_many(models, example_from(args.input_shape, built), strategy)
    for alignment, path, out in zip(found[1:], args.checkpoints[1:], args.out, strict=True):
        save_state(alignment.apply(load_state(path)), out, force=args.force)  # in the file's own dtypes
        print(f"{path}: {alignment!r}; wrote {out}")


def merge_command(args: argparse.Namespace) -> None:
    """Averages checkpoints that are aligned already."""
    from fastmatch.merging.average import merge

    _check_targets(args, [args.out], TORCH_SUFFIXES | {".safetensors"}, "--out")
    models, _ = _models(args)
    merged = merge(models, args.weights, biases=args.biases)
    save_state(merged.state_dict(), args.out, force=args.force)
    print(f"{len(models)} checkpoints, biases: {args.biases}; wrote {args.out}")


def triangle_command(args: argparse.Namespace) -> None:
    """Evaluates the triangle, writes its table (and a picture); says the barrier."""
    from fastmatch.evaluation.triangle import triangle

    _check_targets(args, [args.out], {".csv"}, "--out")
    if args.plot:
        _check_targets(args, [args.plot], PICTURES, "--plot")
    models, _ = _models(args)
    found = triangle(models, _data(args), points=args.points)
    if args.plot:
        found.plot(args.plot)
    _write(found.table(), args)
    print(f"loss barrier {found.barrier:.4f}")


def layers_command(args: argparse.Namespace) -> None:
    """Writes what every layer does on the data, a row a checkpoint and layer."""
    from fastmatch.evaluation.layers import layer_table

    _check_targets(args, [args.out], {".csv"}, "--out")
    models, _ = _models(args)
    named = dict(zip(args.checkpoints, models, strict=True))
    _write(layer_table(named, _data(args), endpoints=args.endpoints), args)


def distances_command(args: argparse.Namespace) -> None:
    """Writes the distances between every two checkpoints."""
    from fastmatch.evaluation.distances import distances

    _check_targets(args, [args.out], {".csv"}, "--out")
    _write(distances({path: load_state(path) for path in args.checkpoints}), args)
