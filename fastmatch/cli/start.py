"""Where the command begins: a signal that comes while it is still being loaded ends it in one line too."""

from __future__ import annotations

from fastmatch._internal.huge_pages import ask_for_huge_pages
from fastmatch.cli.signals import ended_by_signals, tell_interrupted

__all__ = ["start"]


def start() -> int:
    """Run the command that was typed and return the exit status."""
    ask_for_huge_pages()
    try:
        with ended_by_signals():
            from fastmatch.cli.main import main
    except KeyboardInterrupt as interrupt:
        return tell_interrupted(interrupt, "fastmatch: {} before it began")
    return main()
