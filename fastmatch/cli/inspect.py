"""``fastmatch inspect`` and ``verify``: what can be permuted in a network, and whether two checkpoints are one function."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmatch._internal.checks import check_limit
from fastmatch.cli.options import Commands, add, add_command, dtype_from
from fastmatch.cli.outputs import check_inputs, say

if TYPE_CHECKING:
    from fastmatch.spec import PermutationSpec

__all__ = ["add_commands"]


def add_commands(commands: Commands) -> None:
    """Add the commands to the grammar."""
    command = add_command(
        commands, "inspect", inspect_command,
        examples=("inspect --model net.py:build --input-shape 2,3,32,32", "inspect llama-b"),
    )  # fmt: skip
    command.add_argument(
        "checkpoint", nargs="?", help="a Hugging Face directory, or a diffusion model; instead of --model"
    )
    add(command, "--model")
    add(command, "--input-shape")

    command = add_command(
        commands, "verify", verify_command,
        examples=(
            "verify llama-b llama-b-aligned",
            "verify sd_b.safetensors b_aligned.safetensors",
            "verify b.pt b_aligned.pt --model net.py:build --input-shape 2,3,32,32",
        ),
    )  # fmt: skip
    command.add_argument(
        "a", help="a Hugging Face directory, a diffusion model, or another file with --model"
    )
    command.add_argument("b", help="the other directory or file")
    add(
        command,
        "--model",
        help="callable that returns the network; by default it is built from A's config.json, or the names in a diffusion model",
    )
    add(command, "--input-shape")
    command.add_argument(
        "--dtype", default="float64", metavar="TYPE", help="floating point type of the forward passes"
    )
    command.add_argument(
        "--tolerance",
        type=float,
        default=1e-9,
        help="largest difference allowed, relative to the largest output",
    )


def inspect_command(args: argparse.Namespace) -> None:
    """Print the traced groups of a model, and which operation pins which axis."""
    if (args.checkpoint is None) == (args.model is None):
        raise ValueError(
            "--model: give a network, or a directory with a config.json in its place"
            if args.model is None
            else f"--model: gives the network, whose groups are the same for all of its files; leave out {args.checkpoint}"
        )
    if args.model is None and args.input_shape is not None:
        raise ValueError("--input-shape: needs --model; without it the inputs follow the config.json")
    check_inputs(args)
    from fastmatch.cli.groups import described
    from fastmatch.cli.loading import build_network
    from fastmatch.spec import PermutationSpec

    spec = _spec_of(args.checkpoint) if args.model is None else PermutationSpec.trace(*build_network(args))
    if args.json:
        print(spec.to_json())
    else:
        say(args, described(spec))


def _spec_of(path: str) -> PermutationSpec:
    """Return the groups of a checkpoint whose structure its folder or its names tell."""
    from fastmatch.checkpoint import Checkpoint
    from fastmatch.checkpoint.tracing import is_diffusion, trace_checkpoint
    from fastmatch.cli.loading import in_a_folder

    checkpoint = Checkpoint(path)
    if not Path(path).is_dir() and not is_diffusion(path, checkpoint):
        raise ValueError(
            f"--model: needed in the place of {path}, which is not a directory with a config.json{in_a_folder(path)}; such as: fastmatch inspect "
            "--model net.py:build --input-shape 2,3,32,32"
        )
    return trace_checkpoint(path, checkpoint)


def verify_command(args: argparse.Namespace) -> None:
    """Run two checkpoints on the same random inputs and compare their outputs."""
    if args.model is None and args.input_shape is not None:
        raise ValueError("--input-shape: needs --model; without it the inputs follow A's config.json")
    check_limit("tolerance", args.tolerance)
    check_inputs(args)
    import torch

    from fastmatch.checkpoint.verify import DifferentFunction, verify_checkpoints
    from fastmatch.cli.loading import build_network

    dtype = dtype_from(args.dtype) or torch.float64
    model: Any = None
    example: Any = None
    if args.model is not None:
        model, example = build_network(args)
    try:
        found = verify_checkpoints(
            args.a, args.b, model=model, example_inputs=example,
            dtype=dtype, tolerance=args.tolerance,
        )  # fmt: skip
    except DifferentFunction as different:
        if args.json:
            say(args, "", same=False, error=different.error, reason=str(different))
        raise
    agree = "1 output agrees" if found.outputs == 1 else f"{found.outputs} outputs agree"
    text = f"the same function: {agree} within {found.error:.2g} relative"
    say(args, text, same=True, outputs=found.outputs, error=found.error)
