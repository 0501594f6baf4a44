"""Whether files tell the structure of their networks, so that no ``--model`` is needed."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastmatch.checkpoint import Checkpoint
from fastmatch.checkpoint.same_model import check_is_model
from fastmatch.checkpoint.tracing import is_diffusion
from fastmatch.cli.loading import in_a_folder

__all__ = ["check_structure"]


def check_structure(args: argparse.Namespace) -> None:
    """Raise ValueError unless the two inputs of ``align`` are files of diffusion models. Headers alone are read."""
    mixed = Path(args.a).is_dir() or Path(args.b).is_dir()
    for path in (args.a, args.b):
        check_is_model(Checkpoint(path))
    if mixed or not is_diffusion(args.b, Checkpoint(args.b)):
        raise ValueError(
            f"--model: needed unless both {args.a} and {args.b} are directories with a config.json, or files of a "
            f"diffusion model{in_a_folder(args.a)}"
        )
