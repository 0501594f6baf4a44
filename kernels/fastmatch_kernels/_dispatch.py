"""Which backend takes an operation, and the checks that all of them share."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "backend_of",
    "check_floating",
    "check_precision",
    "check_range",
    "is_plain",
    "module_of",
    "run",
]

BACKENDS = ("triton", "cpu", "reference")
PRECISIONS = ("ieee", "tf32", "bf16x3")


def backend_of(*tensors: Tensor, backend: str | None = None) -> str:
    """The backend that ``tensors`` go to.

    Raises:
        ValueError: an unknown backend, tensors on several devices, or a device without a backend.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise ValueError(f"tensors: expected one device, got {sorted(map(str, devices))}")
    device = next(iter(devices))
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend: 'cpu' needs CPU tensors, got {device}")
    if backend is not None:
        return backend
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device}; backend='reference' runs anywhere")
    return "cpu" if device.type == "cpu" else "triton"


def module_of(backend: str, op: str) -> ModuleType:
    """The module of an operation, imported on first use."""
    return importlib.import_module(f"fastmatch_kernels.{op}.{backend}")


def is_plain(*tensors: Tensor) -> bool:
    """Whether nothing traces or differentiates what is done with ``tensors``: no custom op is needed.

    The first call of a custom op imports all of torch's compiler, most of a second, and each costs a little.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    return all(type(x) is Tensor and not x.requires_grad for x in tensors)


def run(op: Any, function: Any, a: Sequence[Tensor], b: Sequence[Tensor], *args: Any) -> Any:
    """An operation that writes to no argument, by its custom op only where it must be."""
    return (function if is_plain(*a, *b) else op)(a, b, *args)


def check_precision(precision: str, allowed: tuple[str, ...] = PRECISIONS) -> None:
    """ValueError for a precision that is not one of ``allowed``."""
    if precision not in allowed:
        raise ValueError(f"precision: expected one of {allowed}, got {precision!r}")


def check_floating(name: str, tensor: Tensor) -> None:
    """TypeError for what is no floating point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating point tensor, got {tensor.dtype}")


def check_range(name: str, index: Tensor, size: int) -> None:
    """ValueError for an index that leaves 0 to ``size - 1``."""
    # Kernels do not check bounds. Reading two numbers back costs a GPU far less than a wild read.
    if index.numel() and not torch.compiler.is_compiling():
        low, high = (int(x) for x in index.aminmax())
        if low < 0 or high >= size:
            raise ValueError(f"{name}: expected entries of 0..{size - 1}, got {low}..{high}")
