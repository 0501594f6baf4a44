"""Turn the values of options into objects: networks, example inputs, data, functions, checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fastmatch._internal.callables import function_of, network_from
from fastmatch._internal.model_files import load_state_for
from fastmatch._internal.modules import copy_module
from fastmatch._internal.states import check_finite, check_same_architecture, state_of

__all__ = [
    "build_model",
    "build_network",
    "example_from",
    "function_from",
    "in_a_folder",
    "load_into",
    "load_models",
]

T = TypeVar("T")


def in_a_folder(path: str | Path) -> str:
    """Return what an error can add about a file that no structure is known of: the folder that it is in may tell it."""
    folder = Path(path).parent
    known = not Path(path).is_dir() and (folder / "config.json").is_file()
    return f"; give the folder {folder}, which has one" if known else ""


def function_from(argument: str | None, option: str, default: T) -> T | Callable[..., Any]:
    """Return the function that an option names, such as ``torch.nn.functional:mse_loss``; ``default`` for None."""
    return default if argument is None else function_of(argument, option)


def build_model(argument: str) -> tuple[nn.Module, Any]:
    """Call the ``module:callable`` of ``--model`` and return (model, example inputs or None); see :func:`network_from`."""
    return network_from(argument, "--model")


def example_from(shape: str | None, built: Any) -> Any:
    """Return the example inputs: a random tensor of the shape ``--input-shape``, else those of the builder.

    Raises:
        ValueError: there are neither, or the shape is not a list of whole numbers.
    """
    if shape is None:
        if built is None:
            raise ValueError(
                "--input-shape: needed (such as 2,3,32,32) unless the callable returns (model, inputs)"
            )
        return built
    try:
        sizes = [int(part) for part in shape.replace("x", ",").split(",")]
    except ValueError as error:
        raise ValueError(f"--input-shape: expected whole numbers such as 2,3,32,32, got {shape!r}") from error
    if min(sizes) < 1:
        raise ValueError(f"--input-shape: expected numbers of at least 1, got {shape!r}")
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0), device="cpu")


def build_network(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Return the network of ``--model`` and its example inputs, with ``--input-shape`` if given."""
    model, built = build_model(args.model)
    return model, example_from(args.input_shape, built)


def load_into(model: nn.Module, path: str) -> nn.Module:
    """Return a copy of ``model`` in eval mode with the weights of the checkpoint at ``path``.

    Raises:
        ValueError: the checkpoint does not fit the model, or holds NaN or infinity. The tensor is named.
    """
    state = load_state_for(model, path)
    check_same_architecture(state_of(model, "--model"), state, "--model", path)
    check_finite(state, path)
    new = copy_module(model)
    new.load_state_dict(state)
    return new.eval()


def load_models(args: argparse.Namespace) -> list[nn.Module]:
    """Return the network of ``--model`` once per positional checkpoint, with the checkpoint's weights."""
    model, _ = build_model(args.model)
    return [load_into(model, path) for path in args.checkpoints]
