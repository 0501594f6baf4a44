"""torch's dispatch mode without its compiler."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["DispatchMode"]


class DispatchMode(TorchDispatchMode):
    """The base of modes that see every operation of a run.

    torch hides ``__torch_dispatch__`` from its compiler, and imports the compiler to do so: a second of a process's first
    alignment, and some time of every operation. Modes are never compiled here, so there is nothing to hide.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
