"""Signals that end a command: temporary files are removed, journals are kept, and no library is left half-loaded.

An exception from a signal's handler harms a library that is being loaded: its handlers of errors swallow the exception, or tell of
another error, and what was loaded by half breaks whatever uses it later. So no exception is raised while an import runs. A process
that is the command's own ends at once if it has nothing to undo; otherwise the exception is raised when the import has ended.
"""

from __future__ import annotations

import _thread
import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

__all__ = ["EARLY", "Ended", "ended_by_signals", "finished", "tell_interrupted"]

ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]

DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
"""The handlers of a process that nobody has set. Signals that are ignored, as under nohup, stay ignored."""

EARLY = "fastmatch: {} before it began"
"""What is said before the command is known."""

LOADING = ("<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>")
"""Where the frames of an import are. A library's code, also its initialisation in C++, runs below them."""

PAUSE = 0.01
"""Seconds between two looks at whether an import has ended."""

Line = Callable[[bool], "str | None"]
"""Called where a process is about to end inside an import: it releases what outlives the process and returns the line to print,
with ``{}`` as in :func:`tell_interrupted`, "" for none. None if there is something to undo first, unless its argument is true:
the user has asked twice."""


class Ended(KeyboardInterrupt):
    """A signal asked this process to end.

    Attributes:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Signals:
    """What has come to this process, and what is done about it.

    Attributes:
        came: numbers of the signals that ask it to end, in their order.
        told: whether the user has been told.
        status: the command's own, when nothing is left but the end of Python.
        line: see :data:`Line`.
        own: the process that is the command's own. Those that are forked from it, and others' programs, are not ended.
        outermost: where the outermost block is; what called it may be an import.
    """

    def __init__(self) -> None:
        self.came: list[int] = []
        self.told = False
        self.status: int | None = None
        self.line: Line | None = None
        self.own: int | None = None
        self.outermost: FrameType | None = None
        self._waits = self._looks = False
        self._calls = threading.RLock()

    def forget(self) -> None:
        """Be as in a new process."""
        self.__init__()

    def end(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        looks, self._looks = self._looks, False
        if not looks:
            # A closing terminal or a stopping system often sends both. The second one must not stop the removal of files.
            if number in ENDING and any(other in ENDING for other in self.came):
                return
            self.came.append(number)
        number = self.came[-1]
        is_own = self.own == os.getpid()
        if self.status is not None and is_own:
            with suppress(Exception):
                sys.stdout.flush()
            os._exit(self.status)
        if self.told and is_own:
            os._exit(128 + number)
        if self._is_loading(frame):
            twice = len(self.came) > 1
            line = self.line(twice) if self.line is not None and is_own else None
            if line is not None:
                _leave(number, line)
            if not twice:
                self._wait(number)
                return
        self._waits = False
        raise interrupt_of(number)

    def _is_loading(self, frame: FrameType | None) -> bool:
        while frame is not None and frame is not self.outermost:
            if frame.f_code.co_filename in LOADING:
                return True
            frame = frame.f_back
        return False

    def _wait(self, number: int) -> None:
        """Call the handler again when the import has ended."""
        if self._waits:
            return
        self._waits = True
        main = threading.main_thread().ident
        assert main is not None

        def look() -> None:
            while self._waits:
                time.sleep(PAUSE)
                if not self._is_loading(sys._current_frames().get(main)):
                    self._call(number, main)

        # Not a threading.Thread: the lock that its start takes may be held by what the signal interrupted.
        _thread.start_new_thread(look, ())

    def _call(self, number: int, main: int) -> None:
        with self._calls:  # so that no signal comes after the block
            if not self._waits:
                return
            self._looks = True
            if hasattr(signal, "pthread_kill"):
                signal.pthread_kill(main, number)  # it ends a wait of the system
            else:
                _thread.interrupt_main(signal.Signals(number))

    def stop(self) -> None:
        """Call the handler no more."""
        with self._calls:
            self._waits = False

    def check(self, error: BaseException | None) -> None:
        """Raise the exception of a signal that has come, where something has swallowed it or made another error of it."""
        if self.came and not self.told and self.status is None and not isinstance(error, KeyboardInterrupt):
            raise interrupt_of(self.came[0]) from error


_signals = _Signals()


@contextmanager
def ended_by_signals(line: Line | None = None, *, is_own: bool = False) -> Iterator[None]:
    """Raise KeyboardInterrupt at Ctrl-C, and :class:`Ended` at SIGTERM and SIGHUP, inside; blocks may be nested.

    Whatever becomes of the exception inside, the block ends with it. Only the main thread can receive signals; elsewhere nothing
    changes.

    Args:
        line: what is said and done where the process ends inside an import.
        is_own: the process is the command's own, from here to its end, and may be ended. After the block Ctrl-C ends it without a word,
            and after :func:`finished` every signal does, with the command's status.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDING)}
    is_nested, outer = _signals.outermost is not None, _signals.line
    taken: dict[int, Any] = {
        n: handler for n, handler in before.items() if handler in DEFAULTS and not is_nested
    }
    if not is_nested:
        _signals.forget()
        _signals.own, _signals.outermost = os.getpid() if is_own else None, sys._getframe(2)
    if is_own:
        atexit.register(_ignore)  # what is registered first runs last
    _signals.line = line
    for number in taken:
        signal.signal(number, _signals.end)
    error: BaseException | None = None
    try:
        try:
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            _signals.check(error)
    finally:
        _signals.line = outer
        if not is_nested:
            _signals.stop()
            if (
                _signals.status is None
            ):  # else the handler remains, so that a finished command ends with its own status
                _give_back(taken, is_own)


def _give_back(taken: dict[int, Any], is_own: bool) -> None:
    """Give the signals the handlers that they had."""
    if is_own and signal.SIGINT in taken:
        taken[signal.SIGINT] = signal.SIG_DFL
    for number, handler in taken.items():
        signal.signal(number, handler)
    _signals.forget()


def finished(status: int) -> None:
    """Say that the command is done and has this status: a signal only hurries the end of Python."""
    _signals.status = status


def _ignore() -> None:
    """Ignore signals while Python unloads modules: it would give them the system's handlers, which change the status."""
    if _signals.status is not None:
        for number in (signal.SIGINT, *ENDING):
            if signal.getsignal(number) == _signals.end:
                signal.signal(number, signal.SIG_IGN)


def interrupt_of(number: int) -> KeyboardInterrupt:
    """Return the exception of a signal."""
    return KeyboardInterrupt() if number == signal.SIGINT else Ended(number)


def _words(number: int) -> str:
    return "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"


def _leave(number: int, line: str) -> NoReturn:
    """Print what was printed before, and the line, and end the process. Nothing else of it runs, in no thread."""
    with suppress(Exception):
        sys.stdout.flush()
    with suppress(OSError):
        if line:
            # Not by print, which fails where the signal has interrupted another one.
            os.write(2, f"{line.format(_words(number))}\n".encode(errors="backslashreplace"))
    os._exit(128 + number)


def tell_interrupted(interrupt: KeyboardInterrupt, what: str | None) -> int:
    """Print one line about an interruption and return the exit status: 128 and the signal's number.

    Args:
        interrupt: Ctrl-C, or :class:`Ended`.
        what: the line, with ``{}`` for "interrupted" or what the signal was; None for ranks that leave it to the first.
    """
    _signals.told = True
    number = interrupt.number if isinstance(interrupt, Ended) else signal.SIGINT
    with suppress(OSError):  # at SIGHUP the terminal may have gone
        if what is not None:
            print(what.format(_words(number)), file=sys.stderr, flush=True)
    return 128 + number
