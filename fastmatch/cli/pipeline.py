"""``fastmatch pipeline``: a whole merge from one recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastmatch.cli.options import Commands, add, add_command
from fastmatch.cli.outputs import say

__all__ = ["add_commands"]


def add_commands(commands: Commands) -> None:
    """Add the command to the grammar."""
    command = add_command(
        commands, "pipeline", pipeline_command,
        examples=("pipeline recipe.yaml", "pipeline recipe.yaml --out merged.safetensors --force"),
    )  # fmt: skip
    command.add_argument("recipe", help="a .yaml, .yml or .json file; mergekit's linear recipes are read too")
    add(command, "--out", required=False, help="file or directory to write, in place of the recipe's 'out'")
    add(command, "--force")


def pipeline_command(args: argparse.Namespace) -> None:
    """Run the recipe, print the summary, and list what was written."""
    if not Path(args.recipe).is_file():
        raise FileNotFoundError(f"{args.recipe}: no such file")
    from fastmatch.recipes.pipeline import pipeline

    outcome = pipeline(args.recipe, args.out, force=args.force)
    written = "\n".join(f"  {key:<7} {path}" for key, path in outcome.files.items())
    say(args, f"{outcome.report}\n\nwrote\n{written}", summary=str(outcome.report), files=outcome.files)
