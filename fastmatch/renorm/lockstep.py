"""Forward passes over many batches side by side; each waits at every layer until all have reached it.

Statistics of the whole data at each layer would take one read of the data per layer. Here the forward pass of every
batch is a thread that stops at a layer until all batches are there. The data is read once and every layer is computed
once, for the memory of all batches' activations at one layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

__all__ = ["Lockstep", "TakesOtherPaths"]


class TakesOtherPaths(ValueError):
    """Passes take different paths through a model, so they never meet."""


class _Stopped(BaseException):
    """Ends a pass that will get no answer."""


class _Pass(threading.Thread):
    """The pass of one batch. At each meeting it hands over a value and waits for the answer."""

    def __init__(self, run: Callable[[], None], slots: threading.Semaphore) -> None:
        super().__init__(daemon=True)
        self._run, self._slots = run, slots
        self.waiting = threading.Event()
        self._answered = threading.Event()
        self.key: Any = None
        self.value: Any = None
        self.done = self.stopped = False
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with self._slots:
                if not self.stopped:
                    self._run()
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.done = True
        self.waiting.set()

    def meet(self, key: Any, value: Any) -> Any:
        self.key, self.value = key, value
        self._slots.release()
        try:
            self.waiting.set()
            self._answered.wait()
            self._answered.clear()
        finally:
            self._slots.acquire()
        if self.stopped:
            raise _Stopped
        answer, self.value = self.value, None
        return answer

    def answer(self, value: Any) -> None:
        self.waiting.clear()
        self.value = value
        self._answered.set()

    def stop(self) -> None:
        self.stopped = True
        self._answered.set()


class Lockstep:
    """Runs passes so that all of them meet at every key, where their values are answered together.

    Args:
        answer: ``answer(key, values) -> values``, one value per pass, in the order of the passes.
    """

    def __init__(self, answer: Callable[[Any, list[Any]], list[Any]]) -> None:
        self._answer = answer

    def meet(self, key: Any, value: Any) -> Any:
        """Wait inside a pass until all passes have reached ``key``, and return this pass's answer."""
        current = threading.current_thread()
        assert isinstance(current, _Pass), "meet() outside a pass"
        return current.meet(key, value)

    def run(self, passes: Sequence[Callable[[], None]], device: torch.device) -> Iterator[Any]:
        """Run the passes and yield the key of each meeting after it was answered.

        Raises:
            ValueError: the passes take different paths through the model, so they never meet.
        """
        with _single_threaded_operations() as workers:
            slots = threading.Semaphore(workers)
            threads = [_Pass(_as_this_thread(run, device), slots) for run in passes]
            try:
                for thread in threads:
                    thread.start()
                yield from self._meetings(threads)
            finally:
                for thread in threads:
                    thread.stop()
                for thread in threads:
                    thread.join()

    def _meetings(self, threads: list[_Pass]) -> Iterator[Any]:
        while True:
            for thread in threads:
                thread.waiting.wait()
                if thread.error is not None:
                    raise thread.error
            places = {None if t.done else t.key for t in threads}
            if len(places) > 1:
                names = ", ".join(sorted("the end" if p is None else str(p) for p in places))
                raise TakesOtherPaths(
                    f"data: batches take different paths through the model and wait for each other at {names}; "
                    'use mode="joint"'
                )
            if threads[0].done:
                return
            key = threads[0].key
            for thread, value in zip(threads, self._answer(key, [t.value for t in threads]), strict=True):
                thread.answer(value)
            yield key


class _Borrowed:
    """torch's number of threads, while passes use these threads. Renormalizations may run side by side."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.borrowers = 0
        self.threads = 1


_borrowed = _Borrowed()


@contextmanager
def _single_threaded_operations() -> Iterator[int]:
    """Give torch's number of threads to the passes: each operation inside runs on one thread.

    Otherwise every pass would start a pool of threads of its own.
    """
    with _borrowed.lock:
        if _borrowed.borrowers == 0:
            _borrowed.threads = torch.get_num_threads()
        _borrowed.borrowers += 1
        workers = _borrowed.threads
        torch.set_num_threads(1)
    try:
        yield workers
    finally:
        with _borrowed.lock:
            _borrowed.borrowers -= 1
            torch.set_num_threads(workers)  # also of this thread, for which torch keeps a number of its own


def _as_this_thread(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return ``run`` without gradients and under this thread's autocast, device and stream, which are local to a thread."""
    enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def wrapped() -> None:
        on_stream = nullcontext() if stream is None else torch.cuda.stream(stream)
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=enabled), on_stream:
            run()

    return wrapped
