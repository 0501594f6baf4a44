"""``fastmatch merge`` and ``partial``: merge checkpoints completely, or from a layer on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from fastmatch._internal.allowed import PAGES, STATE_SUFFIXES, Biases, Method
from fastmatch._internal.checks import check_weights
from fastmatch.cli.options import Commands, add, add_command, dtype_from
from fastmatch.cli.outputs import check_inputs, check_outputs

__all__ = ["add_commands"]

MATCHED_RULES = ("permute", "zip", "cca")
"""The words of ``--rule`` that match units on data."""


def add_commands(commands: Commands) -> None:
    """Add the commands to the grammar."""
    command = add_command(
        commands, "merge", merge_command,
        examples=("merge a.pt b_aligned.pt --model net.py:build --weights 0.3 0.7 --out merged.pt",),
    )  # fmt: skip
    command.add_argument("checkpoints", nargs="+", help="one or more aligned checkpoints")
    add(
        command, "--model",
        help="callable that returns the network; needed for --biases and --report, and for one checkpoint. Without it, files and "
        "folders are merged tensor by tensor",
    )  # fmt: skip
    add(command, "--weights")
    _add_merge_options(command)
    command.add_argument(
        "--biases", choices=get_args(Biases), default="average",
        help="average them; scale them down like the activations of a merge (normalize); or set them to zero (remove)",
    )  # fmt: skip
    add(command, "--out", "--force", "--report", "--report-data")

    command = add_command(
        commands, "partial", partial_command,
        examples=(
            "partial a.pt b.pt --model net.py:build --input-shape 2,3,32,32 --data net.py:loader --rule zip --keep 2 "
            "--out merged.pt2",
            "partial a.pt b.pt --model net.py:ten_classes --model net.py:five_classes --input-shape 2,3,32,32 --data net.py:loader "
            "--rule zip --stop-at 6 --out shared.pt2",
        ),
    )  # fmt: skip
    command.add_argument(
        "checkpoints",
        nargs="+",
        help="two or more checkpoints of one architecture, but for their heads with --stop-at",
    )
    add(
        command, "--model", required=True, action="append",
        help="callable that returns the network, or (network, example inputs); given once, or once for each checkpoint if their heads "
        "differ (see --stop-at)",
    )  # fmt: skip
    add(command, "--input-shape")
    add(
        command, "--data",
        help="callable that returns a loader; needed by all rules but identity, and by --renormalize",
    )  # fmt: skip
    add(command, "--forward")
    command.add_argument(
        "--rule",
        default="permute",
        choices=("identity", *MATCHED_RULES),
        help="which units are merged into one",
    )
    start = command.add_mutually_exclusive_group()
    start.add_argument(
        "--start-at", metavar="GROUP", help="the first group that is merged, named by `fastmatch inspect`"
    )
    start.add_argument("--keep", type=int, default=0, metavar="N", help="or the number of groups kept apart")
    command.add_argument(
        "--stop-at", metavar="GROUP",
        help="the last group that is merged: the layers after it stay apart, and the program returns the output of every network; for "
        "networks of different tasks",
    )  # fmt: skip
    command.add_argument("--apart", nargs="+", default=[], metavar="GROUP", help="further groups kept apart")
    add(
        command,
        "--weights",
        help="merge coefficients, one per checkpoint, positive and of sum one; equal by default",
    )
    add(
        command,
        "--renormalize",
        choices=[word for word in get_args(Method) if word not in ("auto", "least-squares")],
    )
    add(command, "--out", help="file to write: .pt2, for torch.export.load")
    add(command, "--force")


def _add_merge_options(command: argparse.ArgumentParser) -> None:
    """Add the options of merges on disk to a command."""
    group = command.add_argument_group("merges on disk", "without --model")
    group.add_argument(
        "--block-weights", nargs="+", metavar="PATTERN=W",
        help="weights of the second checkpoint by patterns of names, such as '*input_blocks.3.*=0.2', or of each but the first: "
        "'*=0.2,0.3'; or the customary numbers of a UNet's blocks with commas, 25 for Stable Diffusion 1 and 2. What no pattern "
        "fits follows --weights",
    )  # fmt: skip
    group.add_argument(
        "--add-difference", metavar="BASE",
        help="add to the first checkpoint what the others have more than this one; --weights are then theirs (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--dtype", metavar="TYPE",
        help="write floating point tensors in this type, such as float16; by default the first checkpoint's",
    )  # fmt: skip


def merge_command(args: argparse.Namespace) -> None:
    """Average checkpoints that are aligned already."""
    if args.model is None:
        _check_merge_on_disk(args)
        from fastmatch.cli.work.merge_on_disk import merge_on_disk

        merge_on_disk(args)
        return
    for option in ("block_weights", "add_difference", "dtype"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')}: merges on disk, without --model")
    check_weights(args.weights, len(args.checkpoints))
    check_outputs(args, out=STATE_SUFFIXES, report=PAGES)
    from fastmatch.cli.work.merge import merge_networks

    merge_networks(args)


def _check_merge_on_disk(args: argparse.Namespace) -> None:
    for option, default in (("biases", "average"), ("report", None), ("report_data", None)):
        if getattr(args, option) != default:
            raise ValueError(f"--{option.replace('_', '-')}: needs --model")
    if len(args.checkpoints) < 2:
        raise ValueError("checkpoints: expected two or more to merge, got one")
    dtype_from(args.dtype)
    check_weights(args.weights, len(args.checkpoints) - (args.add_difference is not None))
    check_inputs(args)
    if args.block_weights is not None:  # the names in the first checkpoint tell how many there have to be
        from fastmatch.cli.work.merge_on_disk import merge_options

        merge_options(args)
    check_outputs(args, out=None if Path(args.checkpoints[0]).is_dir() else STATE_SUFFIXES)


def partial_command(args: argparse.Namespace) -> None:
    """Merge checkpoints from a layer on and write the result as an exported program."""
    if args.data is None and args.rule in MATCHED_RULES:
        raise ValueError(f"--data: needed by --rule {args.rule}")
    if args.data is None and args.renormalize is not None:
        raise ValueError(f"--data: needed by --renormalize {args.renormalize}")
    if args.data is not None and args.rule == "identity" and args.renormalize is None:
        raise ValueError("--data: --rule identity reads none; it is for another rule or --renormalize")
    if args.data is None and args.forward is not None:
        raise ValueError("--forward: runs the networks on --data, which is not given")
    if len(args.model) not in (1, len(args.checkpoints)):
        raise ValueError(
            f"--model: expected one, or one for each of the {len(args.checkpoints)} checkpoints; got {len(args.model)}"
        )
    check_weights(args.weights, len(args.checkpoints))
    check_outputs(args, out={".pt2"})
    from fastmatch.cli.work.merge import merge_partially

    merge_partially(args)
