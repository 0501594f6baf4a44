"""Replace functions of other libraries under every name that a loaded module has for them, and restore the originals."""

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

from fastmatch.backends import lap, lapjv, pot, rebasin, scipy, stable_diffusion
from fastmatch.backends.patch_target import PatchTarget

__all__ = ["LIBRARIES", "Installed", "installed"]

TARGETS: tuple[PatchTarget, ...] = (
    *scipy.TARGETS,
    *lapjv.TARGETS,
    *lap.TARGETS,
    *pot.TARGETS,
    *rebasin.TARGETS,
    *stable_diffusion.TARGETS,
)

LIBRARIES = tuple(dict.fromkeys(target.library for target in TARGETS))
"""The names that ``installed`` takes: ``scipy``, ``lapjv``, ``lap`` (lap and lapx), ``ot`` (POT), ``rebasin``, and for scripts that
merge Stable Diffusion checkpoints ``ogkalu2``, ``sdnext`` and ``sd-meh``."""

_lock = threading.RLock()
_users: Counter[PatchTarget] = Counter()
"""Number of open contexts that use each target."""
_patched: dict[PatchTarget, tuple[Callable[..., Any], Callable[..., Any]]] = {}
"""Target -> (original, replacement), for targets that are replaced now."""


class Installed(ContextDecorator):
    """The context that :func:`installed` returns. It can be entered again, also while it is open."""

    def __init__(self, libraries: tuple[str, ...]) -> None:
        self.targets = [target for target in TARGETS if target.library in libraries]

    def __enter__(self) -> Installed:
        with _lock:
            if _finder not in sys.meta_path:
                sys.meta_path.insert(0, _finder)
            for target in self.targets:
                _users[target] += 1
                _patch(target)
        return self

    def __exit__(self, *error: object) -> None:
        with _lock:
            for target in self.targets:
                _users[target] -= 1
                if _users[target] == 0:
                    del _users[target]
                    _restore(target)
            if not _users:
                sys.meta_path.remove(_finder)


def installed(*libraries: str) -> Installed:
    """Return a context in which other libraries' assignment solvers are fastmatch's.

    The context replaces scipy.optimize.linear_sum_assignment, lapjv.lapjv, lap.lapjv, ot.emd with uniform marginals,
    rebasin's PermutationCoordinateDescent.calculate_permutations, and ``weight_matching`` of three scripts that merge Stable
    Diffusion checkpoints. It also replaces them under the names by which other
    modules have imported them, or import them while the context is open. Leaving the context restores the originals
    everywhere, also after an exception.

    Contexts can be nested. The patch applies to all threads of this process and not to the processes it starts. A
    reference outside a module's namespace (a default argument, a closure, an attribute of an object) keeps the original.

    Example:
        >>> import fastmatch.backends
        >>> from scipy.optimize import linear_sum_assignment
        >>> with fastmatch.backends.installed("scipy"):
        ...     rows, columns = linear_sum_assignment(np.eye(300))

    Args:
        libraries: some of :data:`LIBRARIES`; all of them if none is given. A library that is not installed is skipped.

    Raises:
        ValueError: a library is unknown.
    """
    unknown = [name for name in libraries if name not in LIBRARIES]
    if unknown:
        raise ValueError(f"libraries: expected some of {LIBRARIES}, got {unknown[0]!r}")
    return Installed(libraries or LIBRARIES)


def _patch(target: PatchTarget) -> None:
    """Replace a target if its module is loaded. Otherwise the finder does so when the module is imported."""
    if target in _patched or target.module not in sys.modules:
        return
    owner_name, _, name = target.name.rpartition(".")
    module = sys.modules[target.module]
    owner = getattr(module, owner_name, None) if owner_name else module
    original = getattr(owner, name, None)
    if owner is None or original is None:  # another package of that name, or one that is still being imported
        return
    replacement = target.build(original)
    _patched[target] = (original, replacement)
    if owner_name:
        setattr(owner, name, replacement)
    else:
        _rebind(original, replacement)


def _restore(target: PatchTarget) -> None:
    """Put the original back, if the target is replaced."""
    if target not in _patched:
        return
    original, replacement = _patched.pop(target)
    owner_name, _, name = target.name.rpartition(".")
    if owner_name:
        setattr(getattr(sys.modules[target.module], owner_name), name, original)
    else:
        _rebind(replacement, original)


def _rebind(old: object, new: object) -> None:
    """Bind ``new`` to every name in a loaded module that is bound to ``old``."""
    for module in list(sys.modules.values()):
        namespace = getattr(module, "__dict__", None)
        if isinstance(namespace, dict):
            for name, value in list(namespace.items()):
                if value is old:
                    namespace[name] = new


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the other finders find a target's module, and replaces the target once the module has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        wanted = [patch for patch in _users if patch.module == fullname]
        if not wanted:
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
                for patch in wanted:
                    if patch in _users:
                        _patch(patch)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_finder = _Finder()
