"""Every public name is on a reference page, and every entry of a reference page is public."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

PUBLIC = (
    "fastmatch",
    "fastmatch.assignment",
    "fastmatch.checkpoint",
    "fastmatch.backends",
    "fastmatch_kernels.ops",
)
"""The modules whose ``__all__`` is the public surface."""

WHOLE_MODULES = {
    "fastmatch.backends.c2m3",
    "fastmatch.backends.git_rebasin",
    "fastmatch.backends.mergekit",
    "fastmatch.backends.pleas",
    "fastmatch.backends.zipit",
    "fastmatch.spec.formats",
}
"""Modules that are documented as a whole."""


def documented() -> list[str]:
    return [
        name
        for page in sorted((ROOT / "docs/reference").glob("*.md"))
        for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)
    ]


def resolve(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_every_entry_is_public():
    public = {f"{module}.{name}" for module in PUBLIC for name in importlib.import_module(module).__all__}
    assert set(documented()) - WHOLE_MODULES <= public
    assert set(documented()) >= WHOLE_MODULES


def test_every_public_name_has_one_entry():
    """A name that two modules export (``fastmatch.solve``, ``fastmatch.assignment.solve``) needs one of the two."""
    entries = documented()
    assert len(entries) == len(set(entries))
    objects = [resolve(name) for name in entries if name not in WHOLE_MODULES]
    missing = [
        f"{module}.{name}"
        for module in PUBLIC
        for name in importlib.import_module(module).__all__
        if f"{module}.{name}" not in PUBLIC
        and not any(resolve(f"{module}.{name}") is found for found in objects)
    ]
    assert not missing


def test_public_names_have_docstrings():
    for name in documented():
        found = importlib.import_module(name) if name in WHOLE_MODULES else resolve(name)
        if callable(found) or name in WHOLE_MODULES:
            assert found.__doc__, name
