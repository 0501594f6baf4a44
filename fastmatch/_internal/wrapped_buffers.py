"""Passes of models in DistributedDataParallel, which copies the buffers of rank 0 to all ranks before each of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["buffers_sent_once"]


@contextmanager
def buffers_sent_once(model: nn.Module | None) -> Iterator[None]:
    """Copy the buffers of rank 0 to all ranks now, and not before every pass inside.

    A copy inside a pass writes to all buffers through one memory: a trace could not tell them apart, and torch.func has no
    gradient of it.
    """
    wrappers = [
        module
        for module in (model.modules() if model is not None else ())
        if isinstance(module, DistributedDataParallel) and module.broadcast_buffers
    ]
    try:
        for wrapper in wrappers:
            if (
                wrapper.will_sync_module_buffers()
            ):  # not after a pass without gradients, as in DDP's own passes
                wrapper._sync_buffers()
            wrapper.broadcast_buffers = False
        yield
    finally:
        for wrapper in wrappers:
            wrapper.broadcast_buffers = True
