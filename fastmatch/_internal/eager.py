"""Compiled models, run as they were written: hooks and modes see no layer and no operation inside compiled code."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from threading import Lock

import torch
from torch import nn

__all__ = ["eagerly", "uncompiled"]


class _Stance:
    """What torch.compile does in this process while any pass runs eagerly: passes may begin and end in any order."""

    def __init__(self) -> None:
        self._lock, self._passes, self._inside = Lock(), 0, ExitStack()

    def enter(self) -> None:
        with self._lock:
            self._passes += 1
            if self._passes == 1:
                self._inside.enter_context(warnings.catch_warnings())
                # Hooks that see every module also see the one that torch.compile has made.
                warnings.filterwarnings(
                    "ignore", r"Using `torch.compile\(module\)` when there are global hooks"
                )
                with suppress(RuntimeError):  # called by compiled code: it runs as that does
                    self._inside.enter_context(torch.compiler.set_stance("force_eager"))

    def leave(self) -> None:
        with self._lock:
            self._passes -= 1
            if not self._passes:
                self._inside.close()


_STANCE = _Stance()


@contextmanager
def eagerly() -> Iterator[None]:
    """Run what ``torch.compile`` has wrapped, modules and functions, without compiling it."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and loading the compiler takes a second
        yield
        return
    _STANCE.enter()
    try:
        yield
    finally:
        _STANCE.leave()


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` has wrapped, or the module itself."""
    return getattr(model, "_orig_mod", model)
