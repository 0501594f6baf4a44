"""``fastmatch plan``: what aligning two checkpoints will cost, without doing it."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from fastmatch._internal.allowed import DeviceName
from fastmatch._internal.checks import check_integer
from fastmatch.cli.options import Commands, add_command
from fastmatch.cli.outputs import check_inputs, say

__all__ = ["add_commands"]


def add_commands(commands: Commands) -> None:
    """Add the command to the grammar."""
    command = add_command(
        commands,
        "plan",
        plan_command,
        examples=("plan llama-a llama-b --ranks 8 --device h100",),
    )
    command.add_argument("a", help="the reference: a Hugging Face directory; no tensor is read")
    command.add_argument("b", help="the checkpoint to align")
    command.add_argument("--ranks", type=int, default=1, metavar="N", help="number of processes")
    command.add_argument(
        "--device", choices=get_args(DeviceName), default="cpu", help="what a process computes on"
    )
    command.add_argument(
        "--sweeps", type=int, default=2, metavar="N", help="how many times each group is solved"
    )
    command.add_argument(
        "--no-residual", dest="residual", action="store_false", help="keep the order of residual streams"
    )


def plan_command(args: argparse.Namespace) -> None:
    """Print the predicted cost of an alignment."""
    for option in ("ranks", "sweeps"):
        check_integer(option, getattr(args, option), least=1)
    check_inputs(args)
    from fastmatch._internal.states import check_same_architecture
    from fastmatch.checkpoint import Checkpoint
    from fastmatch.checkpoint.names import RenamedCheckpoint
    from fastmatch.checkpoint.pairs import layout_for
    from fastmatch.checkpoint.prediction import DEVICES, predict, work_of
    from fastmatch.checkpoint.same_model import check_same_sizes
    from fastmatch.checkpoint.structure import bind
    from fastmatch.checkpoint.tracing import is_diffusion, take_names, trace_checkpoint

    a, b = Checkpoint(args.a), Checkpoint(args.b)
    for path, checkpoint in ((args.a, a), (args.b, b)):
        if not Path(path).is_dir() and not is_diffusion(path, checkpoint):
            raise ValueError(
                f"{path}: expected a folder with a config.json, or a file of a diffusion model, which tell the structure"
            )
    check_same_sizes(a, b)
    take_names(a, b)
    check_same_architecture(a.headers, b.headers, args.a, args.b)
    traced = trace_checkpoint(args.b, b)
    state = RenamedCheckpoint(b, layout_for(args.b, b, traced))
    spec = bind(traced, state.headers, args.b)
    spec = spec if args.residual else spec.without_residual()
    if not spec.groups:
        raise ValueError(f"{args.b}: no group of units is free to move")
    files = [float(sum(b.headers[name].nbytes for name in b.names_in(file))) for file in b.files]
    found = predict(work_of(state, spec, files), DEVICES[args.device], args.ranks, args.sweeps)
    parts = ", ".join(f"{part} {_time(seconds)}" for part, seconds in found.seconds.items())
    text = (
        f"predicted, not measured: {_time(found.total)} on {args.ranks} x {args.device}, {args.sweeps} solves of each of "
        f"{len(spec.top_level())} groups in {found.levels} levels\n"
        f"time    {parts}\n"
        f"bound   by {found.bound}\n"
        f"memory  {_bytes(found.memory)} a rank\n"
        f"read    {_bytes(found.read)} by all ranks\n"
        f"moved   {_bytes(found.moved)} to each rank"
    )
    say(
        args,
        text,
        ranks=args.ranks,
        device=args.device,
        predicted=found.total,
        **asdict(found),
        bound=found.bound,
    )


def _time(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
