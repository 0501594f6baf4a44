"""Where in a forward pass an operation runs, told by modules and parameters instead of by its running number.

A pass over other data may run other operations in between: masks of ones are skipped, loaders convert what they yield,
and models branch on values. What an operation belongs to does not change with them.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fastmatch.spec.operations import tensors_in

__all__ = ["Spot", "Spots"]

PRODUCTS = frozenset(["addbmm", "addmm", "addmv", "baddbmm", "bmm", "dot", "mm", "mv", "vdot"])
"""Operations that torch chooses among for one product, by the strides and the rank of the operands."""


class Spot(NamedTuple):
    """What an operation belongs to.

    Attributes:
        kind: ``"relu"`` for ``aten.relu_`` too, ``"product"`` for all products of matrices.
        module: path of the innermost module whose forward pass runs the operation; empty for the model itself.
        weight: the parameter that the operation reads, or, if it reads none, the last one on the way of its operand.
        call: how many operations with the same three came before it in the pass.
    """

    kind: str
    module: str
    weight: str
    call: int


class Spots:
    """Tells the spot of each operation of one forward pass of ``model``.

    Every operation has to be shown, in order: :meth:`at` before it runs, :meth:`after` when it has run.
    """

    def __init__(self, model: nn.Module) -> None:
        self._paths: dict[int, str] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self._paths.setdefault(id(module), path)
        self._state: dict[int, tuple[str, int]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if isinstance(tensor, torch.Tensor):
                self._state.setdefault(_memory(tensor), (name, tensor.ndim))
        # By memory: views share it, and whatever is computed into memory that was freed is shown here first.
        self._computed: dict[int, tuple[str, int]] = {}
        """Memory that was computed from parameters alone, such as their copies in another type."""
        self._behind: dict[int, str] = {}
        """Memory that depends on data -> the last parameter on its way."""
        self._modules: list[str] = []
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._here: set[str] = set()
        self._elsewhere: list[str] = []

    @property
    def module(self) -> str:
        """The path of the innermost module that runs."""
        return self._modules[-1] if self._modules else ""

    @property
    def elsewhere(self) -> list[str]:
        """Paths of modules that only another thread ran. What this one ran too, another caller runs at the same time."""
        return [path for path in self._elsewhere if path not in self._here]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Follow which module runs. Hooks see the modules of all threads; those of other threads are left out."""
        thread = threading.get_ident()

        def enter(module: nn.Module, _inputs: Any) -> None:
            if id(module) in self._paths:
                path = self._paths[id(module)]
                if threading.get_ident() == thread:
                    self._modules.append(path)
                    self._here.add(path)
                else:
                    self._elsewhere.append(path)

        def leave(module: nn.Module, _inputs: Any, _output: Any) -> None:
            if id(module) in self._paths and threading.get_ident() == thread and self._modules:
                self._modules.pop()

        handles = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def kind_of(name: str) -> str:
        """Return the kind of an operation such as ``aten.relu_``."""
        base = name.partition(".")[2].rstrip("_")
        return "product" if base in PRODUCTS else base

    def at(self, name: str, args: Any, kwargs: Any) -> Spot:
        """Return the spot of an operation that is about to run.

        Args:
            name: ``aten.addmm``.
            args, kwargs: its arguments.
        """
        self._inputs = tensors_in((args, kwargs))
        read = [found for tensor in self._inputs if (found := self.state_behind(tensor)) is not None]
        largest = max((ndim for _, ndim in read), default=0)
        self._read = next(((weight, ndim) for weight, ndim in read if ndim == largest), None)
        behind = (self._behind.get(_memory(tensor)) for tensor in self._inputs)
        self._weight = self._read[0] if self._read else next((weight for weight in behind if weight), "")
        self._only_state = len(read) == len(self._inputs)
        place = (self.kind_of(name), self.module, self._weight)
        self._counts[place] += 1
        return Spot(*place, self._counts[place] - 1)

    def after(self, out: Any, *, is_view: bool) -> None:
        """Take the result of the operation of the last call of :meth:`at`."""
        for tensor in () if is_view else tensors_in(out):
            memory = _memory(tensor)
            if memory in self._state:
                continue
            self._computed.pop(memory, None)
            self._behind.pop(memory, None)
            if self._read is not None and self._only_state:
                self._computed[memory] = self._read
            else:
                self._behind[memory] = self._weight

    def state_behind(self, tensor: torch.Tensor) -> tuple[str, int] | None:
        """Return (name, rank) of the parameter or buffer that a tensor is, or was computed from; None for data."""
        memory = _memory(tensor)
        return self._state.get(memory) or self._computed.get(memory)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
