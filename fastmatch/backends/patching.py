"""Putting the replacements in place, everywhere a loaded module holds the original, and taking them out again."""

from __future__ import annotations

import importlib.abc
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from fastmatch.backends import lap, lapjv, pot, rebasin, scipy
from fastmatch.backends.patch_target import Seam

__all__ = ["LIBRARIES", "Installed", "installed"]

SEAMS: tuple[Seam, ...] = (*scipy.SEAMS, *lapjv.SEAMS, *lap.SEAMS, *pot.SEAMS, *rebasin.SEAMS)

LIBRARIES = tuple(dict.fromkeys(seam.library for seam in SEAMS))
"""Names ``installed`` takes: ``scipy``, ``lapjv``, ``lap`` (lap and lapx), ``ot`` (POT) and ``rebasin``."""

_lock = threading.RLock()
_users: Counter[Seam] = Counter()
_placed: dict[Seam, tuple[Callable[..., Any], Callable[..., Any]]] = {}


class Installed(ContextDecorator):
    """The context of :func:`installed`; it may be entered again while it is open, and after it has closed."""

    def __init__(self, libraries: tuple[str, ...]) -> None:
        self.seams = [seam for seam in SEAMS if seam.library in libraries]

    def __enter__(self) -> Installed:
        with _lock:
            if _finder not in sys.meta_path:
                sys.meta_path.insert(0, _finder)
            for seam in self.seams:
                _users[seam] += 1
                _place(seam)
        return self

    def __exit__(self, *error: object) -> None:
        with _lock:
            for seam in self.seams:
                _users[seam] -= 1
                if _users[seam] == 0:
                    del _users[seam]
                    _take_out(seam)
            if not _users:
                sys.meta_path.remove(_finder)


def installed(*libraries: str) -> Installed:
    """A context in which other libraries' assignment solvers are this package's.

    Example:
        >>> with fastmatch.backends.installed():
        ...     published_matching(model_a, model_b)

    Replaced are scipy.optimize.linear_sum_assignment, lapjv.lapjv, lap.lapjv, ot.emd with uniform marginals and
    rebasin's PermutationCoordinateDescent.calculate_permutations, also under the names other modules
    have imported them by, or import them by while the context is open. Leaving the context, by an exception too,
    puts the originals back everywhere. Contexts may be nested; it is the process that is patched,
    all threads of it, and not the processes it starts. References held elsewhere than in a module's
    namespace (a default argument, a closure, an attribute of an object) keep the original.

    Args:
        libraries: some of :data:`LIBRARIES`; all where left out. One that is not installed does no harm.

    Raises:
        ValueError: an unknown library.
    """
    unknown = [name for name in libraries if name not in LIBRARIES]
    if unknown:
        raise ValueError(f"libraries: expected some of {LIBRARIES}, got {unknown[0]!r}")
    return Installed(libraries or LIBRARIES)


def _place(seam: Seam) -> None:
    """Replaces a seam where its module is loaded; else the finder does so when it is."""
    if seam in _placed or seam.module not in sys.modules:
        return
    owner_name, _, name = seam.name.rpartition(".")
    module = sys.modules[seam.module]
    owner = getattr(module, owner_name, None) if owner_name else module
    original = getattr(owner, name, None)
    if owner is None or original is None:  # another package of that name, or one still being imported
        return
    replacement = seam.build(original)
    _placed[seam] = (original, replacement)
    if owner_name:
        setattr(owner, name, replacement)
    else:
        _swap(original, replacement)


def _take_out(seam: Seam) -> None:
    if seam not in _placed:
        return
    original, replacement = _placed.pop(seam)
    owner_name, _, name = seam.name.rpartition(".")
    if owner_name:
        setattr(getattr(sys.modules[seam.module], owner_name), name, original)
    else:
        _swap(replacement, original)


def _swap(old: object, new: object) -> None:
    """Binds ``new`` to every name of a loaded module that is bound to ``old``."""
    for module in list(sys.modules.values()):
        namespace = getattr(module, "__dict__", None)
        if isinstance(namespace, dict):
            for name, value in list(namespace.items()):
                if value is old:
                    namespace[name] = new


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the others find a seam's module, and places the seam once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        seams = [seam for seam in _users if seam.module == fullname]
        if not seams:
            return None
        others = (f for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        spec = next((s for s in (f.find_spec(fullname, path, target) for f in others) if s), None)
        if spec is None or spec.loader is None:
            return spec
        loader = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # type: ignore[misc]
            run(module)
            with _lock:
                for seam in seams:
                    if seam in _users:
                        _place(seam)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_finder = _Finder()
