"""Hooks that see what a layer takes and gives, also where a model passes the input by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["on_call", "on_input"]


def on_input(layer: nn.Module, see: Callable[[torch.Tensor], Any]) -> RemovableHandle:
    """Call ``see(input)`` before every call of a layer."""

    def hook(_layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        see(_first(args, kwargs))

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def on_call(layer: nn.Module, see: Callable[[torch.Tensor, Any], Any]) -> RemovableHandle:
    """Call ``see(input, output)`` after every call of a layer."""

    def hook(_layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        see(_first(args, kwargs), output)

    return layer.register_forward_hook(hook, with_kwargs=True)


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    return args[0] if args else next(iter(kwargs.values()))
