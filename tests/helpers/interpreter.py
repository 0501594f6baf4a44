"""Triton's interpreter without what it repeats: a fifth of the time of the tests of kernels."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def _builtins_of(package: Any) -> list[str]:
    """The names of Triton's own functions in a module or class, seen before the interpreter replaces any."""
    import inspect

    from triton.language.core import is_builtin

    return [name for name, member in inspect.getmembers(package) if is_builtin(member)]


def list_builtins_once() -> None:
    """Make the interpreter list Triton's functions once; it does so at every call of a function of a kernel."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    def patch(package: Any, builder: Any, *scope: Any) -> None:
        for name in _builtins_of(package):
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, *scope)

    interpreter._patch_builtin = patch
