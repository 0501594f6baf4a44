"""Hooks that see what a layer takes and gives, also where a model passes the input by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["on_call", "on_input"]


def on_input(layer: nn.Module, see: Callable[[torch.Tensor], Any]) -> RemovableHandle:
    """Call ``see(input)`` before every call of a layer."""

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        see(_first(layer, args, kwargs))

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def on_call(layer: nn.Module, see: Callable[[torch.Tensor, Any], Any]) -> RemovableHandle:
    """Call ``see(input, output)`` after every call of a layer."""

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        see(_first(layer, args, kwargs), output)

    return layer.register_forward_hook(hook, with_kwargs=True)


def _first(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return what a layer reads: its first argument, by whatever name that has.

    Raises:
        ValueError: the layer is called by names of which none is its first parameter's, and several could be meant.
    """
    if args:
        return args[0]
    for name in (*list(inspect.signature(layer.forward).parameters)[:1], "input"):
        if isinstance(kwargs.get(name), torch.Tensor):
            return kwargs[name]
    tensors = [value for value in kwargs.values() if isinstance(value, torch.Tensor)]
    if len(tensors) == 1:
        return tensors[0]
    raise ValueError(
        f"model: a {type(layer).__name__} is called with the names {', '.join(map(repr, kwargs)) or 'of nothing'}, of which none is "
        "that of its input: the first parameter of its forward, or 'input'"
    )
