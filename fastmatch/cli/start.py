"""Where the command begins: a signal that comes while it is still being loaded ends it in one line too."""

from __future__ import annotations

import signal
import sys

from fastmatch._internal.huge_pages import ask_for_huge_pages
from fastmatch.cli.signals import EARLY, ended_by_signals, finished, tell_interrupted

__all__ = ["start"]


def start() -> int:
    """Run the command that was typed and return the exit status."""
    ask_for_huge_pages()
    what = EARLY
    try:
        with ended_by_signals(lambda _: EARLY, is_own=True):
            from fastmatch.cli.main import command

            what = "fastmatch: {} at its end"
            try:
                status, script = command(sys.argv[1:])
            except SystemExit as done:  # --help, or an error of options
                if not isinstance(done.code, int):
                    raise
                status, script = done.code, None
            if script is None:
                finished(status)
    except KeyboardInterrupt as interrupt:
        return tell_interrupted(interrupt, what)
    if script is not None:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # as python begins a script
        script()  # the user's own script: its errors are not ours, and its traceback is wanted
    return status
