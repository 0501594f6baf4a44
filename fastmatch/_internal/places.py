"""Where a function of the user is: ``module:callable`` or ``file.py:callable``, looked at without importing it."""

from __future__ import annotations

import ast
import re
import sys
import warnings
from pathlib import Path

from fastmatch._internal.checks import nearest

__all__ = ["check_place"]

MADE_AS_IT_RUNS = re.compile(
    rb"import[\s\\(]*\*|from\s+sys\s+import|sys\.modules|__getattr__|__dict__|\bglobal\b"
    rb"|\b(globals|locals|vars|exec|setattr)\s*\("
)
"""Code that may define names which its text does not show."""


def check_place(argument: str, option: str) -> tuple[str, str]:
    """Return the module or file, and the callable, that an argument names; nothing is imported.

    Raises:
        ValueError: the argument has another form, or there is no such file, or it has no such callable.
    """
    place, colon, name = argument.rpartition(":")
    if not (colon and place and name):
        raise ValueError(f"{option}: expected module:callable or file.py:callable, got {argument!r}")
    if Path(place).suffix == ".py" and not Path(place).is_file():
        raise ValueError(f"{option}: no file {place}")
    names = defined_in(place)
    if names is not None and name.partition(".")[0] not in names:
        raise ValueError(f"{option}: {place!r} has no callable {name!r}{nearest(name, names)}")
    return place, name


def defined_in(place: str) -> list[str] | None:
    """Return the names that a file, or a module's file in the current folder, defines at its top; None if they are not plain."""
    path = _file_of(place)
    try:
        code = b"" if path is None else path.read_bytes()
        if path is None or MADE_AS_IT_RUNS.search(code):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the import tells them
            tree = ast.parse(code, str(path))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):  # the import says what is wrong
        return None
    return _names(tree)


def _file_of(place: str) -> Path | None:
    """Return the file that is imported; None if it may be another one than what the current folder has."""
    if Path(place).suffix == ".py":
        return Path(place)
    first, *_ = parts = place.split(".")
    if first in sys.builtin_module_names or first in sys.modules:
        return None
    parents = [Path(*parts[:k]) for k in range(1, len(parts))]
    if not all((folder / "__init__.py").is_file() for folder in parents):
        return None  # installed packages come before folders without it
    if Path(*parts).is_dir():  # a package comes before a file of its name
        return None
    return Path(*parts).with_suffix(".py")


def _names(tree: ast.Module) -> list[str] | None:
    """Return what a module defines, imports or assigns: branches and loops count, bodies of functions do not.

    None if it assigns attributes: of a module, perhaps its own.
    """
    names: list[str] = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        for child in ast.iter_child_nodes(waiting.pop()):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.append(child.name)
                continue
            if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
                return None
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                names.append(child.id)
            elif isinstance(child, ast.alias):
                names.append(child.asname or child.name.partition(".")[0])
            elif isinstance(child, (ast.MatchAs, ast.MatchStar)) and child.name:
                names.append(child.name)
            elif isinstance(child, ast.MatchMapping) and child.rest:
                names.append(child.rest)
            waiting.append(child)
    return list(dict.fromkeys(names))
