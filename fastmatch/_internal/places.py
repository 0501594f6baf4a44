"""Where a function of the user is: ``module:callable`` or ``file.py:callable``, looked at without importing it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from fastmatch._internal.checks import nearest

__all__ = ["check_place"]

MADE_AS_IT_RUNS = re.compile(
    rb"import\s*\(?\s*\*|__getattr__|__dict__|\bglobal\b|\b(globals|locals|vars|exec|setattr)\s*\(|sys\.modules"
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
    path = Path(place) if Path(place).suffix == ".py" else Path(f"{place.replace('.', '/')}.py")
    if path.with_suffix("").is_dir():  # a package comes before a file of its name
        return None
    try:
        code = path.read_bytes()
        tree = ast.parse(code)
    except (OSError, SyntaxError, ValueError):  # the import says what is wrong
        return None
    if MADE_AS_IT_RUNS.search(code):
        return None
    return list(dict.fromkeys(_names(tree)))


def _names(node: ast.AST) -> Iterator[str]:
    """Yield what a node defines, imports or assigns in its own scope: branches and loops count, bodies of functions do not."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield child.name
            continue
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        elif isinstance(child, ast.alias):
            yield child.asname or child.name.partition(".")[0]
        yield from _names(child)
