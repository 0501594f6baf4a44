"""Functions of the user, named by text: ``module:callable``, or ``path/to/file.py:callable``."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fastmatch._internal.batches import described_call
from fastmatch._internal.checks import nearest
from fastmatch._internal.places import check_place
from fastmatch._internal.ranks import is_of_ranks
from fastmatch._internal.words import error_line

__all__ = ["called", "function_of", "loader_from", "network_from"]


def callable_from(argument: str, option: str) -> Callable[..., Any]:
    """Import the function that ``module:callable`` or ``path/to/file.py:callable`` names.

    Modules are looked for in the current folder first, and those that a file imports beside it.

    Raises:
        ValueError: the argument has another form, there is no such module, file or callable, or importing it fails.
    """
    place, name = check_place(argument, option)
    module = _imported(place, option)
    try:
        found = operator.attrgetter(name)(module)
    except AttributeError as error:
        names = [key for key, value in vars(module).items() if callable(value)]
        raise ValueError(f"{option}: {place!r} has no callable {name!r}{nearest(name, names)}") from error
    if not callable(found):
        raise ValueError(f"{option}: {name!r} of {place!r} is {type(found).__name__}, expected a callable")
    return found


def _imported(place: str, option: str) -> ModuleType:
    """Import a module by its name or its file; whatever goes wrong is a ValueError that names the option."""
    path = Path(place)
    is_file = path.suffix == ".py"
    folder = str(path.resolve().parent) if is_file else os.getcwd()
    sys.path.insert(0, folder)
    try:
        return _from_file(path.resolve()) if is_file else importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and place.startswith(error.name):
            raise ValueError(
                f"{option}: no module {place!r} in this folder or installed; expected module:callable or file.py:callable"
            ) from error
        raise ValueError(f"{option}: {place} imports {error.name!r}, which is not installed") from error
    except Exception as error:  # whatever the user's module does when it is imported
        raise ValueError(f"{option}: importing {place} failed with {_text_of(error)}") from error
    finally:
        sys.path.remove(folder)


def _from_file(path: Path) -> ModuleType:
    """Import a file whose folder is the first of ``sys.path``, under its own name unless another module has it."""
    module = importlib.import_module(path.stem)
    if Path(getattr(module, "__file__", None) or "").resolve() == path:
        return module
    spec = importlib.util.spec_from_file_location(f"{path.stem}_of_{path.parent.name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def called(argument: str, option: str) -> Any:
    """Call ``module:callable`` without arguments and return what it returns.

    Raises:
        ValueError: there is no such callable, or it fails. The message has its error and where that was raised.
    """
    function = callable_from(argument, option)
    try:
        return function()
    except Exception as error:  # whatever the user's code does
        raise ValueError(f"{option}: {argument} failed with {_text_of(error)}") from error


def function_of(argument: str, option: str) -> Callable[..., Any]:
    """Import the function that ``module:callable`` names. An error inside of it names the function, and what it was given.

    Raises:
        ValueError: see :func:`callable_from`; or, where it is called, the function fails.
    """
    function = callable_from(argument, option)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the user's code does
            if is_of_ranks(error):
                raise
            given = described_call(args, kwargs)
            raise ValueError(f"{option}: {argument} failed on ({given}) with {_text_of(error)}") from error

    return run


def _text_of(error: Exception) -> str:
    """Return an error on one line, with the innermost place that is not in an installed package if there is one."""
    places = traceback.extract_tb(error.__traceback__)[1:]
    own = [
        place for place in places if not {"site-packages", "dist-packages"} & {*Path(place.filename).parts}
    ]
    where = (own or places or traceback.extract_tb(error.__traceback__))[-1]
    return f"{error_line(error)} ({Path(where.filename).name}, line {where.lineno})"


def network_from(argument: str, option: str) -> tuple[nn.Module, Any]:
    """Call ``module:callable`` without arguments and return (model, example inputs or None).

    The callable returns a module, or a pair of a module and its example inputs.

    Raises:
        ValueError: it returns anything else, or fails.
    """
    built = called(argument, option)
    model, example = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{option}: {argument} returned {type(model).__name__}, expected a torch module")
    return model, example


def loader_from(argument: str, option: str) -> Iterable[Any]:
    """Call ``module:callable`` and return the loader that it returns.

    Raises:
        ValueError: it returns something else, or an iterator, which could be read only once.
    """
    data = called(argument, option)
    if not isinstance(data, Iterable):
        raise ValueError(
            f"{option}: expected a callable that returns a loader or a list of batches, got {data!r}"
        )
    if iter(data) is data:
        raise ValueError(
            f"{option}: expected a callable that returns a loader or a list of batches, which are read several times; {argument} "
            f"returns an iterator ({type(data).__name__}), which can be read only once"
        )
    return data
