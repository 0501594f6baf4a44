"""Ranks: the processes of one run. No other module exchanges anything with other processes.

Work is shared in three ways: every rank gives a value and gets those of all (:meth:`Ranks.exchange`), tasks are dealt out
and every rank gets all results (:meth:`Ranks.share`), one rank sends to another (:meth:`Ranks.send`). The results do not
depend on the number of ranks, because no sum is made here: callers add up in an order of their own.

Values travel through host memory by gloo, also beside nccl: permutations are on the host, and moments travel once. An
error travels in place of a value, so all ranks end with it. If a rank is gone, those that are left find out by torch's
store which one it is.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from fastmatch._internal.checks import check_number
from fastmatch._internal.launching import LAUNCHER, RanksError, initialized, is_first, is_launched

__all__ = [
    "ALONE",
    "Ranks",
    "RanksError",
    "alone",
    "current",
    "deal",
    "in_group",
    "is_divided",
    "is_first",
    "is_launched",
    "is_of_ranks",
    "joined",
    "on_all_ranks",
]

T = TypeVar("T")
P = ParamSpec("P")

TIMEOUT = "FASTMATCH_TIMEOUT"
"""Environment variable: the seconds that a rank waits for the others."""

DEFAULT_TIMEOUT = 1800.0
"""Seconds; longer than the longest solve of one group, for which the others wait."""

PATIENCE = 5.0
"""Seconds in which a rank that lives answers, once a connection is broken."""

HOLDER_GONE = "rank 0, which holds the store of the run, does not answer"


class Ranks:
    """The processes of one run as one of them sees them. This class is one process alone.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
        is_group: whether there is a process group, be it of one process.
        is_nested: whether this is within two blocks of :meth:`together` or more, so that an outer call has checked what the
            ranks were given.
    """

    rank = 0
    size = 1
    is_group = False
    is_nested = False

    def exchange(self, value: T, what: str) -> list[T]:
        """Return the values that all ranks gave, by rank.

        Args:
            value: anything that can be pickled.
            what: where in the run this is; it must be the same on all ranks.

        Raises:
            RanksError: a rank failed, is elsewhere, or does not answer.
        """
        return [value]

    def broadcast(self, compute: Callable[[], T], what: str, source: int = 0) -> T:
        """Return on all ranks what ``compute`` returns on the rank ``source``; it is called there only."""
        return compute()

    def send(self, value: object, to: int) -> None:
        """Send a value to a rank, which calls :meth:`receive`."""
        raise NotImplementedError("one process has nobody to send to")

    def receive(self, source: int) -> Any:
        """Return the value that the rank ``source`` sends."""
        raise NotImplementedError("one process has nobody to receive from")

    def whole(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """Return the whole of a tensor that is divided among ranks, all of which must make the call."""
        raise NotImplementedError("one process has whole tensors")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block that all ranks run: an error in it on one rank ends it on all of them.

        An error that rank 0 raises as well has the attribute ``said_by_first`` on the others.
        """
        yield

    def share(self, tasks: Sequence[Callable[[], T]], owners: Sequence[int], what: str) -> list[T]:
        """Run every task on its rank, and return the results of all tasks on all ranks.

        Args:
            tasks: functions without arguments, the same ones on all ranks.
            owners: the rank of each task.
            what: see :meth:`exchange`.
        """
        if self.size == 1:
            return [task() for task in tasks]
        mine = {i: task() for i, task in enumerate(tasks) if owners[i] == self.rank}
        found = {i: value for table in self.exchange(mine, what) for i, value in table.items()}
        return [found[i] for i in range(len(tasks))]


ALONE = Ranks()
"""One process, which asks nobody."""


class _Group(Ranks):
    """The processes of torch's default group."""

    is_group = True

    def __init__(self, timeout: float) -> None:
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        self._dist, self.timeout = dist, timeout
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._store = PrefixStore("fastmatch", _get_default_store())
        self._count = self._depth = 0

    @property
    def is_nested(self) -> bool:  # type: ignore[override]
        return self._depth > 1

    def exchange(self, value: T, what: str) -> list[T]:
        found = self._gather(("value", what, value))
        elsewhere = next((r for r, (_, place, _) in enumerate(found) if place != what), None)
        if elsewhere is not None:
            raise RanksError(
                f"rank {elsewhere} is at {found[elsewhere][1]}, rank {self.rank} at {what}: all ranks must make the same "
                "calls with the same arguments; fm.alone() keeps a call to one rank"
            )
        return [value for _, _, value in found]

    def broadcast(self, compute: Callable[[], T], what: str, source: int = 0) -> T:
        data = _packed(compute()) if self.rank == source else None
        size = self.exchange(None if data is None else len(data), what)[source]
        assert size is not None
        if data is None:
            data = torch.empty(size, dtype=torch.uint8, device="cpu")
        self._wait(
            lambda: self._dist.broadcast(data, group_src=source, group=self._group, async_op=True), what
        )
        return _unpacked(data)

    def send(self, value: object, to: int) -> None:
        data, what = _packed(value), f"rank {self.rank} sends to rank {to}"
        size = torch.tensor([len(data)], device="cpu")
        for part in (size, data):
            self._wait(
                lambda part=part: self._dist.isend(part, group=self._group, group_dst=to), what, polled=False
            )

    def receive(self, source: int) -> Any:
        what = f"rank {source} sends to rank {self.rank}"
        size = torch.zeros(1, dtype=torch.int64, device="cpu")
        self._wait(lambda: self._dist.irecv(size, group=self._group, group_src=source), what, polled=False)
        data = torch.empty(int(size), dtype=torch.uint8, device="cpu")
        self._wait(lambda: self._dist.irecv(data, group=self._group, group_src=source), what, polled=False)
        return _unpacked(data)

    def whole(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        divided: Any = tensor
        self._count += 1
        try:
            return divided.full_tensor()
        except RuntimeError as error:
            raise self._failed(what, error) from error

    @contextmanager
    def together(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
            if self._depth == 1:
                self.exchange(None, "the end")
        except RanksError:
            raise
        except Exception as error:
            if self._depth == 1:
                with suppress(RanksError):  # this rank's own error says why
                    first = self._collect(("error", _text(error), None))[0]
                    error.said_by_first = self.rank > 0 and first[:2] == ("error", _text(error))  # type: ignore[attr-defined]
            raise
        finally:
            self._depth -= 1

    def _gather(self, message: tuple[str, str, Any]) -> list[tuple[str, str, Any]]:
        """Return the messages of all ranks; RanksError if one of them is an error."""
        found = self._collect(message)
        failed = {r: text for r, (kind, text, _) in enumerate(found) if kind == "error"}
        if failed:
            raise RanksError("; ".join(f"rank {r} failed: {text}" for r, text in failed.items()))
        return found

    def _collect(self, message: tuple[str, str, Any]) -> list[tuple[str, str, Any]]:
        """Return the messages of all ranks."""
        data, what = _packed(message), message[1]
        sizes = [torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(self.size)]
        size = torch.tensor([len(data)], device="cpu")
        self._wait(lambda: self._dist.all_gather(sizes, size, group=self._group, async_op=True), what)
        longest = max(map(int, sizes))
        padded = torch.zeros(longest, dtype=torch.uint8, device="cpu")
        padded[: len(data)] = data
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        self._wait(lambda: self._dist.all_gather(parts, padded, group=self._group, async_op=True), what)
        return [_unpacked(part[: int(n)]) for part, n in zip(parts, sizes, strict=True)]

    def _wait(self, start: Callable[[], Any], what: str, *, polled: bool = True) -> None:
        """Start an operation and wait until it is done here.

        While it is polled, ranks that are not next to a broken connection hear of it too. Gloo completes a message
        from one rank to another only where it is waited for.

        Raises:
            RanksError: a connection broke, here or on another rank, or the time is over.
        """
        self._count += polled  # equal on all ranks: messages between two of them do not count
        begun = time.monotonic()
        pause, asked = 1e-5, begun
        try:
            work = start()
            if not polled:
                work.wait(timedelta(seconds=self.timeout))
                return
            while not work.is_completed():
                time.sleep(pause)
                pause = min(2 * pause, 0.005)
                now = time.monotonic()
                if now - begun > self.timeout:
                    raise RuntimeError(f"no answer in {self.timeout:g} seconds")
                if now - asked > 1.0:
                    asked = now
                    if self._store.check([self._broken()]):
                        raise RuntimeError("another rank found a connection broken")
            work.wait()
        except RuntimeError as error:
            raise self._failed(what, error) from error

    def _failed(self, what: str, error: Exception) -> RanksError:
        missing = _missing(self._store, self._broken(), self.rank, self.size)
        return RanksError(f"{missing}, at {what} ({_line(error)})")

    def _broken(self) -> str:
        """The key in the store of what is going on now."""
        return f"broken/{self._count}"


def _missing(store: Any, broken: str, rank: int, size: int) -> str:
    """Say which ranks do not answer: those that live see the mark ``broken`` in the store, and set one of their own."""
    others = set(range(size)) - {rank}
    try:
        store.set(broken, "")
        store.set(f"{broken}/{rank}", "")
        silent, until = others, time.monotonic() + PATIENCE
        while silent and time.monotonic() < until:
            time.sleep(0.05)
            silent = {r for r in silent if not store.check([f"{broken}/{r}"])}
        _leave(store, broken, rank, others - silent)
    except RuntimeError:
        return HOLDER_GONE
    if not silent:
        return "the connection between the ranks broke"
    return f"{_named(silent)} does not answer: it was killed, hangs, or is much slower than the others"


def _leave(store: Any, mark: str, rank: int, others: Collection[int]) -> None:
    """Say that this rank has read a mark. Rank 0 waits for the others, because its process may hold the store."""
    store.set(f"{mark}/{rank}/left", "")
    until = time.monotonic() + PATIENCE
    awaited = [f"{mark}/{r}/left" for r in others if r != rank]
    while rank == 0 and awaited and not store.check(awaited) and time.monotonic() < until:
        time.sleep(0.05)


def _named(ranks: Collection[int]) -> str:
    return f"rank {', '.join(map(str, sorted(ranks)))}"


def _packed(value: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value, pickle.HIGHEST_PROTOCOL)), dtype=torch.uint8)


def _unpacked(data: torch.Tensor) -> Any:
    return pickle.loads(data.numpy().data)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _line(error: Exception) -> str:
    """The first sentence of an error, without the line of gloo's source that it begins with."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return text.rpartition("] ")[2].split(". ")[0][:200]


_apart: ContextVar[bool] = ContextVar("fastmatch_alone", default=False)
_known: dict[str, Any] = {}
"""``default``: torch's default group; ``ranks``: what was made of it."""


@contextmanager
def alone() -> Iterator[None]:
    """Keep the calls in a block to this process, although a torch.distributed process group is initialized.

    Without it the ranks share the work of an alignment, and all of them must make the call.

    Example:
        >>> with fm.alone():
        ...     alignment = fm.align(model_a, model_b, x)
    """
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def current() -> Ranks:
    """Return the ranks of this process: torch's default group if one is initialized, else the process alone.

    The first call with a group is made by all of its ranks.
    """
    dist = initialized()
    if dist is None or _apart.get():
        return ALONE
    if _known.get("default") is not dist.group.WORLD:
        _known.update(ranks=_Group(_timeout()), default=dist.group.WORLD)
    return _known["ranks"]


def on_all_ranks(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function that all ranks call within :meth:`Ranks.together`: an error of one ends the call on all."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with current().together():
            return function(*args, **kwargs)

    return call


def is_divided(tensor: object) -> bool:
    """Return whether a tensor is a DTensor, of which each rank has a part."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_of_ranks(error: BaseException) -> bool:
    """Return whether an error says that ranks failed or do not reach each other, whatever this one was computing."""
    kind = getattr(sys.modules.get("torch.distributed"), "DistError", RanksError)
    # Gloo raises a plain RuntimeError, with the line of its source.
    return isinstance(error, (RanksError, kind)) or "/gloo/" in str(error)


def in_group() -> bool:
    """Return whether this process shares its work with a process group; unlike :func:`current` it asks nobody."""
    return initialized() is not None and not _apart.get()


def _timeout() -> float:
    text = os.environ.get(TIMEOUT)
    if text is None:
        return DEFAULT_TIMEOUT
    try:
        seconds = float(text)
    except ValueError:
        raise ValueError(f"{TIMEOUT}: expected a number of seconds, got {text!r}") from None
    check_number(TIMEOUT, seconds, exclusive=True)
    return seconds


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the process group that a launcher such as torchrun has prepared, and leave it at the end.

    Without a launcher, and in a process that has joined one already, this does nothing.
    """
    if initialized() is not None or not all(os.environ.get(name) for name in LAUNCHER):
        yield current()
        return
    import torch.distributed as dist

    timeout, rank, size = _timeout(), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _met(rank, size, timeout)
    try:
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
        )
        ranks = current()
    except RuntimeError as error:
        _known.clear()
        raise RanksError(
            f"{_missing(store, 'broken/start', rank, size)}, at the start ({_line(error)})"
        ) from error
    try:
        yield ranks
    finally:
        _known.clear()
        dist.destroy_process_group()


def _met(rank: int, size: int, timeout: float) -> Any:
    """Return the store of the run once all ranks have come to it. A launcher's own process may hold it, else rank 0 does.

    Raises:
        RanksError: a rank does not come in time.
    """
    is_holder = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    until = time.monotonic() + timeout
    try:
        store = _store(size, timeout, is_holder=is_holder)
        store.set(f"here/{rank}", "")
        absent = set(range(size))
        while absent:
            absent = {r for r in absent if not store.check([f"here/{r}"])}
            if absent and (time.monotonic() > until or store.check(["late"])):
                store.set("late", "")  # the others have later deadlines, and would find the store gone
                _leave(store, "late", rank, set(range(size)) - absent)
                raise RanksError(
                    f"{_named(absent)} did not come to the start of the run in {timeout:g} seconds"
                )
            time.sleep(0.02 if absent else 0.0)
        return store
    except RuntimeError as error:
        if isinstance(error, RanksError):
            raise
        gone = "rank 0 cannot hold the store of the run" if is_holder else HOLDER_GONE
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RanksError(f"{gone} at {where} ({_line(error)})") from error


def _store(size: int, timeout: float, *, is_holder: bool) -> Any:
    """Return the store of the run, held by this process or by another. One attempt to reach it may take twice its timeout."""
    import torch.distributed

    dist: Any = torch.distributed  # its stores are documented, but not in the types of the package
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    until = time.monotonic() + timeout
    while True:
        attempt = timedelta(seconds=min(PATIENCE, timeout))
        try:
            held = dist.TCPStore(host, port, size, is_holder, attempt, wait_for_workers=False)
            break
        except RuntimeError:
            if is_holder or time.monotonic() > until:
                raise
    held.set_timeout(timedelta(seconds=timeout))
    return dist.PrefixStore(f"fastmatch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", held)


def deal(costs: Sequence[float], ranks: int) -> list[int]:
    """Return the rank of each task: the largest first, each to the rank that has the least to do so far."""
    loads = [0.0] * ranks
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = min(range(ranks), key=loads.__getitem__)
        loads[owners[i]] += costs[i]
    return owners
