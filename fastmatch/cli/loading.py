"""Turn the values of options into objects: networks, example inputs, data, checkpoints; and check and write outputs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmatch._internal.files import check_format, check_target, load_state
from fastmatch._internal.locks import locked
from fastmatch._internal.modules import copy_module
from fastmatch._internal.ranks import is_first
from fastmatch._internal.states import check_finite, check_same_architecture, state_of
from fastmatch.evaluation.table import Table

__all__ = [
    "CSV_SUFFIXES",
    "build_model",
    "build_network",
    "callable_from",
    "check_outputs",
    "example_from",
    "load_into",
    "load_models",
    "loader_from",
    "write_table",
]

CSV_SUFFIXES = frozenset({".csv"})


def callable_from(argument: str, option: str) -> Callable[[], Any]:
    """Import the function that ``module:callable`` names. The current folder is searched first.

    Raises:
        ValueError: the argument has another form, or there is no such module or callable.
    """
    module_name, colon, name = argument.partition(":")
    if not colon or not module_name or not name:
        raise ValueError(f"{option}: expected module:callable, got {argument!r}")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and module_name.startswith(error.name):
            raise ValueError(
                f"{option}: no module {module_name!r} in this folder or installed; expected module:callable"
            ) from error
        raise
    finally:
        sys.path.remove(os.getcwd())
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"{option}: {module_name!r} has no callable {name!r}")
    return found


def build_model(argument: str) -> tuple[nn.Module, Any]:
    """Call ``module:callable`` and return (model, example inputs or None).

    The callable takes no arguments. It returns a module, or a pair of a module and its example inputs.

    Raises:
        ValueError: it returns anything else.
    """
    built = callable_from(argument, "--model")()
    model, example = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model: {argument} returned {type(model).__name__}, expected a torch module")
    return model, example


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
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0), device="cpu")


def build_network(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Return the network of ``--model`` and its example inputs, with ``--input-shape`` if given."""
    model, built = build_model(args.model)
    return model, example_from(args.input_shape, built)


def loader_from(argument: str, option: str) -> Iterable[Any]:
    """Call ``module:callable`` and return the loader that it returns.

    Raises:
        ValueError: it returns something else, or an iterator, which could be read only once.
    """
    data = callable_from(argument, option)()
    if not isinstance(data, Iterable) or iter(data) is data:
        raise ValueError(
            f"{option}: expected a callable that returns a loader or a list of batches, got {data!r}"
        )
    return data


def load_into(model: nn.Module, path: str) -> nn.Module:
    """Return a copy of ``model`` in eval mode with the weights of the checkpoint at ``path``.

    Raises:
        ValueError: the checkpoint does not fit the model, or holds NaN or infinity. The tensor is named.
    """
    state = load_state(path)
    check_same_architecture(state_of(model, "--model"), state, "--model", path)
    check_finite(state, path)
    new = copy_module(model)
    new.load_state_dict(state)
    return new.eval()


def load_models(args: argparse.Namespace) -> list[nn.Module]:
    """Return the network of ``--model`` once per positional checkpoint, with the checkpoint's weights."""
    model, _ = build_model(args.model)
    return [load_into(model, path) for path in args.checkpoints]


def check_outputs(args: argparse.Namespace, **suffixes: Collection[str] | None) -> None:
    """Check outputs before any work: each has its own file, a suffix that says the format, and may be written.

    Args:
        args: the parsed arguments, with ``force``, and ``outputs``, which releases the locks of the outputs.
        suffixes: name of an option -> the suffixes allowed, None for any. The option holds a path, several or None.

    Raises:
        ValueError: two outputs are the same file, or a suffix is not allowed.
        FileExistsError, FileNotFoundError: an output exists and ``--force`` is not given, or its folder is missing.
    """
    owners: dict[Path, str] = {}
    folders: set[Path] = set()
    for name, allowed in suffixes.items():
        option = f"--{name.replace('_', '-')}"
        value = getattr(args, name)
        for path in [] if value is None else [value] if isinstance(value, str) else value:
            if Path(path).resolve() in owners:
                other = owners[Path(path).resolve()]
                raise ValueError(
                    f"{option}: {path} is the same file as {other}; each output needs a file of its own"
                )
            owners[Path(path).resolve()] = option
            if allowed is None:
                folders.add(Path(path).resolve())
            else:
                check_format(path, option, allowed)
    for path in owners:
        check_target(path, force=args.force, folder=path in folders)
        if is_first():
            args.outputs.enter_context(locked(path))


def write_table(table: Table, args: argparse.Namespace) -> None:
    """Write a table to ``--out`` as CSV and print it."""
    table.to_csv(args.out, force=args.force)
    print(f"{table}\nwrote {args.out}")
