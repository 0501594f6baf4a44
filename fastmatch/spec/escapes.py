"""Where a tensor's values leave torch for Python and numpy, out of the tracer's sight."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fastmatch.spec.record import Record

__all__ = ["Escapes"]

NAMES = frozenset(
    ["numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "storage", "untyped_storage", "__reduce_ex__"]
)


class Escapes(TorchFunctionMode):
    """Pins what is read by ``tolist``, ``numpy`` and their like: what happens to the values then is unknown."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in NAMES and args and isinstance(args[0], torch.Tensor):
            with torch._C.DisableTorchFunction():
                self.record.labels(args[0])
                self.record.mark_read(args[0])
                self.record.pin_memory(args[0], f"Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))
