"""Reading activations during a forward pass, at the operations a trace has named."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastmatch.spec.spec import Tap
from fastmatch.spec.trace import counts, op_name, plain_operations

__all__ = ["TapReader"]


class TapReader(TorchDispatchMode):
    """Hands the tensors at ``taps`` to ``receive`` while a model runs inside it.

    Args:
        taps: where to read, as traced.
        receive: called as ``receive(tap, tensor)`` the moment the tensor is there; it must copy what it
            keeps, since the model may write into the tensor afterwards.
        read: ``"before"`` or ``"after"`` the nonlinearity, for taps at one.
        model: the one that will run; it takes the operations that it was traced with.

    Raises:
        RuntimeError: the model ran another operation where a tap expects one, or ended before a tap.
    """

    def __init__(
        self,
        taps: Iterable[Tap],
        receive: Callable[[Tap, torch.Tensor], None],
        *,
        read: str = "after",
        model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self._taps: dict[int, list[Tap]] = {}
        for tap in taps:
            self._taps.setdefault(tap.op, []).append(tap)
        self._receive, self._read = receive, read
        self._op = -1
        self._plain = plain_operations(model)

    def __enter__(self) -> TapReader:
        self._plain.__enter__()
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        self._plain.__exit__(exc_type, exc_value, traceback)
        if exc_type is None and self._taps and self._op < max(self._taps):
            last = max(self._taps)
            raise RuntimeError(
                f"the forward pass ended after {self._op + 1} operations, the traced one read "
                f"{self._taps[last][0].op_name} as operation {last}; trace the model on inputs like the data"
            )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not counts(func):
            return func(*args, **(kwargs or {}))
        self._op += 1
        taps = self._taps.get(self._op, ())
        for tap in taps:
            if op_name(func) != tap.op_name:
                raise RuntimeError(
                    f"operation {self._op} of the forward pass is {op_name(func)}, the traced one was "
                    f"{tap.op_name}; trace the model on inputs like the data"
                )
            if tap.role == "consumed" or (tap.role == "activation" and self._read == "before"):
                self._receive(tap, args[tap.operand])
        out = func(*args, **(kwargs or {}))
        for tap in taps:
            if tap.role == "produced" or (tap.role == "activation" and self._read == "after"):
                self._receive(tap, out[0] if isinstance(out, (tuple, list)) else out)
        return out
