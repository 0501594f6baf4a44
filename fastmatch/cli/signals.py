"""Signals that end a command as Ctrl-C does: temporary files are removed, and journals are kept."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

__all__ = ["Ended", "ended_by_signals", "tell_interrupted"]

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Ended(KeyboardInterrupt):
    """A signal asked this process to end.

    Attributes:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise :class:`Ended` at SIGTERM and SIGHUP inside; signals that are ignored, as under nohup, stay ignored.

    Only the main thread can receive signals; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    taken = [number for number, handler in before.items() if handler == signal.SIG_DFL]

    def end(number: int, _frame: FrameType | None) -> None:
        # A closing terminal or a stopping system often sends both. The second one must not stop the removal of files.
        for other in taken:
            signal.signal(other, signal.SIG_IGN)
        raise Ended(number)

    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


def tell_interrupted(interrupt: KeyboardInterrupt, what: str | None) -> int:
    """Print one line about an interruption and return the exit status: 128 and the signal's number.

    Args:
        interrupt: Ctrl-C, or :class:`Ended`.
        what: the line, with ``{}`` for "interrupted" or what the signal was; None for ranks that leave it to the first.
    """
    number = interrupt.number if isinstance(interrupt, Ended) else signal.SIGINT
    how = f"ended by {signal.Signals(number).name}" if isinstance(interrupt, Ended) else "interrupted"
    with suppress(OSError):  # at SIGHUP the terminal may have gone
        if what is not None:
            print(what.format(how), file=sys.stderr, flush=True)
    return 128 + number
