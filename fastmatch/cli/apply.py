"""``fastmatch apply``: move a checkpoint, or a LoRA of it, by permutations that were found before."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastmatch._internal.allowed import STATE_SUFFIXES
from fastmatch.cli.options import Commands, add, add_command
from fastmatch.cli.outputs import check_outputs, say

__all__ = ["add_commands"]


def add_commands(commands: Commands) -> None:
    """Add the command to the grammar."""
    command = add_command(
        commands, "apply", apply_command,
        examples=(
            "apply permutations.safetensors lora_of_b.safetensors --out lora_aligned.safetensors",
            "apply permutations.safetensors b.safetensors --out b_aligned.safetensors",
        ),
    )  # fmt: skip
    command.add_argument(
        "alignment", metavar="permutations", help="the .safetensors file of permutations of checkpoint B"
    )
    command.add_argument(
        "checkpoint", help="B itself, or a LoRA of B: kohya, LyCORIS, diffusers or peft names"
    )
    add(command, "--out", "--force")


def apply_command(args: argparse.Namespace) -> None:
    """Read both files, permute, and write."""
    if Path(args.alignment).is_dir() or Path(args.alignment).suffix != ".safetensors":
        raise ValueError(
            "permutations: expected the .safetensors file that `fastmatch align --permutations` wrote, as the first argument; "
            f"got {args.alignment}"
        )
    check_outputs(args, out=None if Path(args.checkpoint).is_dir() else STATE_SUFFIXES)
    from fastmatch.checkpoint import apply_to_checkpoint
    from fastmatch.permutations.alignment import Alignment

    alignment = Alignment.load(args.alignment)
    kind = apply_to_checkpoint(alignment, args.checkpoint, args.out, force=args.force)
    text = f"permuted the {kind} {args.checkpoint}: {alignment.moved} units moved; wrote {args.out}"
    say(args, text, kind=kind, moved=alignment.moved, out=args.out)
