"""``fastmatch completion``: a script that lets a shell complete commands, options and file names."""

from __future__ import annotations

import argparse

from fastmatch.cli.options import Commands, add_command

__all__ = ["add_commands"]

SHELLS = ("bash", "zsh", "tcsh")


def add_commands(commands: Commands) -> None:
    """Add the command to the grammar."""
    command = add_command(
        commands, "completion", completion_command,
        examples=("completion bash > ~/.local/share/bash-completion/completions/fastmatch", "completion zsh > ~/.zfunc/_fastmatch"),
        outcome=False,
    )  # fmt: skip
    command.add_argument("shell", choices=SHELLS, help="the shell")


def completion_command(args: argparse.Namespace) -> None:
    """Print the script that shtab makes of the grammar, ``args.grammar``.

    Raises:
        ImportError: shtab is not installed (the extra ``shell``).
    """
    try:
        import shtab  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise ImportError("completion needs shtab: pip install 'fastmatch[shell]'") from error
    print(shtab.complete(args.grammar, shell=args.shell))
