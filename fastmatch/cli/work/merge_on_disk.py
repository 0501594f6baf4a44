"""Merges of files and folders without a network, and the weights by block that they take."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from fastmatch.checkpoint import Checkpoint, MergeOptions, merge_checkpoints, unet_blocks
from fastmatch.checkpoint.blocks import Blocks
from fastmatch.cli.options import dtype_from
from fastmatch.cli.outputs import say

__all__ = ["blocks_from", "merge_on_disk", "merge_options"]


def blocks_from(given: list[str] | None, names: Iterable[str]) -> Blocks | None:
    """Return the weights by block that ``--block-weights`` says.

    Raises:
        ValueError: it is neither patterns with numbers nor one list of numbers.
    """
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


def merge_options(args: argparse.Namespace) -> MergeOptions:
    """Return what the options say. Weights by block depend on the names in the first checkpoint."""
    blocks = blocks_from(args.block_weights, Checkpoint(args.checkpoints[0]))
    return MergeOptions(args.weights, blocks, args.add_difference)


def merge_on_disk(args: argparse.Namespace) -> None:
    """Merge files or folders, tensor by tensor."""
    merge_checkpoints(
        args.checkpoints, args.out, merge_options(args), dtype=dtype_from(args.dtype), force=args.force
    )
    text = f"{len(args.checkpoints)} checkpoints merged; wrote {args.out}"
    say(args, text, checkpoints=len(args.checkpoints), out=args.out)
