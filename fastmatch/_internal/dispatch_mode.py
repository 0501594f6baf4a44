"""torch's dispatch mode without its compiler, and without casts that autocast has kept."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["DispatchMode"]


class DispatchMode(TorchDispatchMode):
    """The base of modes that see every operation of a run.

    torch hides ``__torch_dispatch__`` from its compiler, and imports the compiler to do so: a second of a process's first
    alignment, and some time of every operation. Modes are never compiled here, so there is nothing to hide.

    Under ``torch.autocast`` a parameter that an earlier pass has cast is not cast again, so that no operation would read the
    parameter itself. Inside a mode every pass casts anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept_casts: list[bool] = []

    def __enter__(self) -> Any:
        self._kept_casts.append(torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        return super().__enter__()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            super().__exit__(kind, error, traceback)
        finally:
            torch.set_autocast_cache_enabled(self._kept_casts.pop())

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
