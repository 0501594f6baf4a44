"""Where a tensor's values leave torch for Python and numpy, out of the tracer's sight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fastmatch.spec.choices import Choices
from fastmatch.spec.guards import PathLeft
from fastmatch.spec.operations import tensors_in
from fastmatch.spec.record import Record, fresh
from fastmatch.spec.spots import Spots

__all__ = ["Escapes"]

NAMES = frozenset(
    [
        "numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "storage", "untyped_storage", "__reduce_ex__",
        "__deepcopy__", "apply_", "map_", "map2_",
    ]
)  # fmt: skip
"""Methods that read or write values without an operation of torch."""

VALUES = frozenset(["numpy", "tolist", "__array__"])
"""Those that return the values."""

MOST_VALUES = 1 << 16
"""More values than these choose no path."""

SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
"""``h.data = other``: from now on ``h`` has other values."""

SPLIT = "tensor_split"
"""Reads the places to split at, if they are a tensor, from its memory."""


class Escapes(TorchFunctionMode):
    """Pins what is read by ``tolist``, ``numpy`` and their like: what happens to the values then is unknown."""

    def __init__(self, record: Record, choices: Choices | None = None, spots: Spots | None = None) -> None:
        super().__init__()
        self.record, self.choices, self.spots = record, choices or Choices(), spots or Spots(nn.Module())

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in NAMES or name == SPLIT:
            with torch._C.DisableTorchFunction():
                self._pin(list(args[name == SPLIT :][:1] if name == SPLIT else args), f"Tensor.{name}")
        if name == SPLIT:
            args = self._told_places(*args)
        if func != SET_DATA:
            result = func(*args, **(kwargs or {}))
            if name == "item":  # torch turns what its operation returns into a plain number
                return self.choices.noted(result)
            return self._told(result, args[0]) if name in VALUES else result
        with torch._C.DisableTorchFunction():
            if not self.choices.is_first and self.record.is_state(args[0]):
                raise PathLeft  # the model would keep it
            self._pin(list(args), "Tensor.data")
        result = func(*args)
        self.record.set(args[0], fresh(args[0].shape, "Tensor.data"))
        return result

    def _told_places(self, tensor: torch.Tensor, places: Any, *rest: Any) -> tuple[Any, ...]:
        """Return the arguments of a split, with a list of the places if they are a tensor."""
        if isinstance(places, torch.Tensor):
            places = self._told(places.tolist(), places)
        return (tensor, places, *rest)

    def _told(self, result: Any, tensor: torch.Tensor) -> Any:
        """Return the values of a tensor that depends on weights or inputs, or others that they could have been."""
        depends = self.record.is_state(tensor) or self.record.is_data(tensor)
        return (
            self.choices.told(result, self.spots.module)
            if depends and tensor.numel() <= MOST_VALUES
            else result
        )

    def _pin(self, values: list[Any], reason: str) -> None:
        for tensor in tensors_in(values):
            self.record.need_values(tensor, reason)
            self.record.labels(tensor)
            self.record.mark_read(tensor)
            self.record.pin_memory(tensor, reason)
