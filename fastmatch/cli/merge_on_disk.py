"""Merges of files and folders without a network: the options of weights by block, and the command without ``--model``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fastmatch._internal.coefficients import check_weights
from fastmatch._internal.files import STATE_SUFFIXES
from fastmatch.cli.options import dtype_from
from fastmatch.cli.outputs import check_inputs, check_outputs, say

if TYPE_CHECKING:
    from fastmatch.checkpoint.blocks import Blocks

__all__ = ["add_merge_options", "blocks_from", "merge_on_disk"]


def add_merge_options(command: argparse.ArgumentParser) -> None:
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


def blocks_from(given: list[str] | None, names: Iterable[str]) -> Blocks | None:
    """Return the weights by block that ``--block-weights`` says.

    Raises:
        ValueError: it is neither patterns with numbers nor one list of numbers.
    """
    from fastmatch.checkpoint import unet_blocks

    if given is None:
        return None
    if len(given) == 1 and "=" not in given[0]:
        return unet_blocks(
            _numbers(given[0], "--block-weights: expected numbers with commas or PATTERN=W"), names
        )
    blocks: dict[str, list[float]] = {}
    for item in given:
        pattern, equals, text = item.rpartition("=")
        if not equals or not pattern:
            raise ValueError(f"--block-weights: expected PATTERN=W, got {item!r}")
        if pattern in blocks:
            raise ValueError(f"--block-weights: the pattern {pattern!r} is there twice")
        blocks[pattern] = _numbers(text, f"--block-weights: expected numbers after '{pattern}='")
    return blocks


def _numbers(text: str, expected: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{expected}, got {text!r}") from error


def merge_on_disk(args: argparse.Namespace) -> None:
    """Merge files or folders, tensor by tensor."""
    from fastmatch.checkpoint import Checkpoint, MergeOptions, merge_checkpoints

    for option, default in (("biases", "average"), ("report", None), ("report_data", None)):
        if getattr(args, option) != default:
            raise ValueError(f"--{option.replace('_', '-')}: needs --model")
    if len(args.checkpoints) < 2:
        raise ValueError("checkpoints: expected two or more to merge, got one")
    dtype = dtype_from(args.dtype)
    is_folder = Path(args.checkpoints[0]).is_dir()
    check_weights(args.weights, len(args.checkpoints) - (args.add_difference is not None))
    check_inputs(args)
    blocks = blocks_from(args.block_weights, Checkpoint(args.checkpoints[0]))
    options = MergeOptions(args.weights, blocks, args.add_difference)
    check_outputs(args, out=None if is_folder else STATE_SUFFIXES)
    merge_checkpoints(args.checkpoints, args.out, options, dtype=dtype, force=args.force)
    text = f"{len(args.checkpoints)} checkpoints merged; wrote {args.out}"
    say(args, text, checkpoints=len(args.checkpoints), out=args.out)
