"""``fastmatch align`` and ``align-many``: bring checkpoints into one order of units and write them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from fastmatch._internal.allowed import Unread
from fastmatch._internal.launching import is_alone
from fastmatch._internal.locks import hidden
from fastmatch.cli.align_checks import JOINT, PAIRWISE, check_align, check_align_many
from fastmatch.cli.options import Commands, add, add_command, add_matcher_options

__all__ = ["add_commands", "kept_by"]


def add_commands(commands: Commands) -> None:
    """Add the commands to the grammar."""
    command = add_command(
        commands, "align", align_command,
        examples=(
            "align a.safetensors b.safetensors --model net.py:build --input-shape 2,3,32,32 --out b_aligned.safetensors",
            "align a.pt b.pt --model net:build --matcher activations --data net:loader --out b_aligned.pt",
            "align llama-a llama-b --out llama-b-aligned",
        ),
    )  # fmt: skip
    command.add_argument(
        "a",
        help="the reference: .safetensors, a torch file of tensors, or a directory of Hugging Face or torch.distributed.checkpoint",
    )
    command.add_argument("b", help="the checkpoint whose units are permuted")
    add(
        command, "--model",
        help="callable that returns the network, or (network, example inputs); not needed for directories with a "
        "config.json",
    )  # fmt: skip
    add(command, "--input-shape")
    add(
        command,
        "--out",
        help="what to write: .safetensors, .ckpt, .pt, .pth or .bin; a directory for directories",
    )
    command.add_argument(
        "--merge", type=float, metavar="W", help="write the merge (1 - W) A + W B instead of the aligned B"
    )
    command.add_argument(
        "--permutations",
        metavar="FILE",
        help="also write the permutations and the spec to this .safetensors file",
    )
    add(command, "--force", "--report", "--report-data")
    add_matcher_options(command)
    command.add_argument(
        "--groups",
        nargs="+",
        metavar="NAME",
        help="match only these groups, by their names in `fastmatch inspect` or what they are there; with patterns, such "
        "as 'layers.*.mlp.*'",
    )
    command.add_argument(
        "--no-residual", dest="residual", action="store_false", help="keep the order of residual streams"
    )
    command.add_argument(
        "--unread", choices=get_args(Unread), default="refuse",
        help="what to do about parameters that the traced pass does not read, such as another task's head: refuse them by "
        "name, hold the groups that they could share in place, or ignore them (default: refuse)",
    )  # fmt: skip
    command.add_argument(
        "--no-verify", action="store_true", help="do not check that the permutations preserve B's function"
    )
    out_of_core = command.add_argument_group(
        "out of core",
        "read tensors when they are needed instead of loading both checkpoints; always for directories",
    )
    out_of_core.add_argument("--out-of-core", action="store_true", help="do so for files too")
    out_of_core.add_argument(
        "--dtype",
        metavar="TYPE",
        help="write floating point tensors in this type, such as bfloat16; by default their own",
    )
    out_of_core.add_argument("--device", help="device that computes the gain matrices (default: cpu)")
    out_of_core.add_argument(
        "--resume",
        action="store_true",
        help="continue from the journal of a killed run with the same arguments",
    )

    command = add_command(
        commands,
        "align-many",
        align_many_command,
        examples=(
            "align-many a.pt b.pt c.pt --model net.py:build --input-shape 2,3,32,32 --out b_aligned.pt c_aligned.pt",
        ),
    )
    command.add_argument("checkpoints", nargs="+", help="two or more checkpoints; the first keeps its order")
    add(
        command, "--model",
        help="callable that returns the network, or (network, example inputs). Without it, folders and files of diffusion models are "
        "aligned out of core, one after the other",
    )  # fmt: skip
    add(command, "--input-shape")
    command.add_argument(
        "--strategy", choices=(*PAIRWISE, *JOINT),
        help="match each checkpoint to the first (to-reference), to its aligned predecessor (chain), to the mean of the "
        "others in rounds (merge-many), or all at once (frank-wolfe); the last two match by weights, from the identity (default: "
        "merge-many, or to-reference without --model)",
    )  # fmt: skip
    add_matcher_options(command)
    command.add_argument(
        "--max-rounds", type=int, metavar="N",
        help="maximum number of rounds; of merge-many and frank-wolfe (default: 100)",
    )  # fmt: skip
    command.add_argument(
        "--max-steps", type=int, metavar="N",
        help="maximum number of Frank-Wolfe steps; of frank-wolfe (default: 50)",
    )  # fmt: skip
    add(
        command, "--out", nargs="+",
        help="one file for each checkpoint but the first, in their order; without --model a folder for all, or with --merge-all one output",
    )  # fmt: skip
    add(command, "--force")
    _add_many_options(command)


def _add_many_options(command: argparse.ArgumentParser) -> None:
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


def align_command(args: argparse.Namespace) -> None:
    """Align two checkpoints and write the second one aligned, or the merge of both; torchrun's ranks share the work."""
    if is_alone():  # ranks check together, for which they need torch
        check_align(args)
    from fastmatch.cli.work.align import align_pair

    align_pair(args)


def align_many_command(args: argparse.Namespace) -> None:
    """Align all checkpoints to the order of the first one and write the others."""
    check_align_many(args)
    from fastmatch.cli.work.align import align_all

    align_all(args)


def kept_by(args: argparse.Namespace) -> Path | None:
    """Return where ``align`` or ``align-many`` would keep what is solved for ``--resume``; None where nothing is kept."""
    # By the names of `journal_path` and of `align_many_checkpoints`; their modules load torch, which a signal may have stopped.
    if args.command == "align":
        return hidden(Path(args.out), "journal") if args.out else None
    return hidden(Path(args.out[0]), "many") if args.out and args.model is None else None
