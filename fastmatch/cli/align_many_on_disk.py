"""``fastmatch align-many`` without a network: folders and files of diffusion models, one after the other."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastmatch._internal.files import STATE_SUFFIXES, check_format
from fastmatch.cli.loading import in_a_folder
from fastmatch.cli.merge_on_disk import blocks_from
from fastmatch.cli.options import device_from, dtype_from, matcher_from
from fastmatch.cli.outputs import say
from fastmatch.matching.weights import WeightMatching
from fastmatch.permutations.alignment import Alignment

__all__ = ["add_many_options", "align_many_on_disk", "check_many_options"]

ONLY_HERE = ("reference", "merge_all", "weights", "block_weights", "dtype", "device", "resume")


def add_many_options(command: argparse.ArgumentParser) -> None:
    """Add the options of a run without ``--model``."""
    group = command.add_argument_group("out of core", "without --model: one pair in memory at a time")
    group.add_argument(
        "--reference", metavar="first|PATH", help="the checkpoint that keeps its order (default: first)"
    )
    group.add_argument(
        "--merge-all", action="store_true", help="write one merge of all in place of the aligned checkpoints"
    )
    group.add_argument(
        "--weights",
        nargs="+",
        type=float,
        metavar="W",
        help="of --merge-all: one per checkpoint; equal ones by default",
    )
    group.add_argument(
        "--block-weights", nargs="+", metavar="PATTERN=W", help="of --merge-all: weights by block, as `fastmatch merge` takes them"
    )  # fmt: skip
    group.add_argument(
        "--dtype", metavar="TYPE", help="write floating point tensors in this type, such as float16; by default their own"
    )  # fmt: skip
    group.add_argument("--device", help="device that computes the gain matrices (default: cpu)")
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue a killed run with the same arguments: what is finished is kept",
    )


def check_many_options(args: argparse.Namespace) -> None:
    """Raise ValueError if an option was given that a run with ``--model`` does not take."""
    for option in ONLY_HERE:
        if getattr(args, option):
            raise ValueError(f"--{option.replace('_', '-')}: is for checkpoints out of core, without --model")


def align_many_on_disk(
    args: argparse.Namespace,
    summary: Callable[[Alignment], str],
    record: Callable[[Alignment], dict[str, Any]],
) -> None:
    """Align the checkpoints and write the others, or the merge of all.

    Args:
        summary, record: what is said of an alignment, in words and for ``--json``.
    """
    from fastmatch.checkpoint import Checkpoint, MergeOptions, WriteOptions, align_many_checkpoints
    from fastmatch.checkpoint.tracing import is_diffusion

    paths = args.checkpoints
    if len(args.out) != 1:
        raise ValueError("--out: expected one folder, or one output of --merge-all, without --model")
    if args.strategy not in (None, "to-reference"):
        raise ValueError(f"--strategy: {args.strategy} needs --model; out of core it is to-reference")
    for option, given in (
        ("input-shape", args.input_shape),
        ("max-rounds", args.max_rounds),
        ("max-steps", args.max_steps),
    ):
        if given is not None:
            raise ValueError(f"--{option}: needs --model")
    if args.matcher not in (None, "weights"):
        raise ValueError(
            f"--matcher: alignment out of core matches by weights; {args.matcher} has to run the networks"
        )
    if args.reference not in (None, "first", *paths):
        raise ValueError(f"--reference: expected 'first' or one of the checkpoints, got {args.reference!r}")
    for option in ("weights", "block_weights"):
        if getattr(args, option) is not None and not args.merge_all:
            raise ValueError(f"--{option.replace('_', '-')}: is an option of --merge-all, which is not given")
    for path in paths:
        if not Path(path).is_dir() and not is_diffusion(path, Checkpoint(path)):
            raise ValueError(
                f"--model: needed unless all are folders with a config.json, or files of a diffusion model; {path} is neither"
                f"{in_a_folder(path)}"
            )
    matcher = matcher_from(args)
    assert isinstance(matcher, WeightMatching)
    reference = 0 if args.reference in (None, "first") else paths.index(args.reference)
    merge = None
    if args.merge_all:
        if not Path(paths[reference]).is_dir():
            check_format(args.out[0], "--out", STATE_SUFFIXES)
        merge = MergeOptions(args.weights, blocks_from(args.block_weights, Checkpoint(paths[reference])))
    found = align_many_checkpoints(
        paths, args.out[0], matcher, reference=reference, merge=merge, device=device_from(args.device),
        write=WriteOptions(dtype=dtype_from(args.dtype), force=args.force), resume=args.resume,
    )  # fmt: skip
    lines, records = [], []
    for k, (path, alignment) in enumerate(zip(paths, found, strict=True)):
        if k != reference:
            lines.append(f"{path}: {summary(alignment) if alignment.matching else repr(alignment)}")
            records.append({"checkpoint": path, **record(alignment)})
    say(args, "\n".join([*lines, f"wrote {args.out[0]}"]), alignments=records, out=args.out[0])
