"""Where a tensor's values leave torch for Python and numpy, out of the tracer's sight."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fastmatch.spec.operations import tensors_in
from fastmatch.spec.record import Record

__all__ = ["Escapes"]

NAMES = frozenset(
    ["numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "storage", "untyped_storage", "__reduce_ex__"]
)

SPLIT = "tensor_split"
"""Reads the places to split at, if they are a tensor, from its memory."""


class Escapes(TorchFunctionMode):
    """Pins what is read by ``tolist``, ``numpy`` and their like: what happens to the values then is unknown."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in NAMES or name == SPLIT:
            with torch._C.DisableTorchFunction():
                for tensor in tensors_in(list(args[name == SPLIT :][:1])):
                    self.record.need_values(tensor, f"Tensor.{name}")
                    self.record.labels(tensor)
                    self.record.mark_read(tensor)
                    self.record.pin_memory(tensor, f"Tensor.{name}")
        return func(*args, **(kwargs or {}))
