"""Every public name is on a reference page, and every entry of a reference page is public."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import griffe

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
    "fastmatch.backends.sd_mecha",
    "fastmatch.backends.stable_diffusion",
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


def public() -> dict[str, object]:
    """Every public name and its object. ``fastmatch.assignment`` is public itself; its names are listed apart."""
    names = [f"{module}.{name}" for module in PUBLIC for name in importlib.import_module(module).__all__]
    return {name: resolve(name) for name in names if name not in PUBLIC}


def test_every_entry_is_public():
    objects = list(public().values())
    entries = set(documented())
    assert entries >= WHOLE_MODULES
    assert not [
        name for name in entries - WHOLE_MODULES if not any(resolve(name) is found for found in objects)
    ]


def test_every_public_name_has_one_entry():
    """A name that two modules export (``fastmatch.solve``, ``fastmatch.assignment.solve``) has one entry."""
    entries = documented()
    objects = [resolve(name) for name in entries if name not in WHOLE_MODULES]
    assert len({id(found) for found in objects}) == len(entries) - len(WHOLE_MODULES)
    assert not [name for name, found in public().items() if not any(found is entry for entry in objects)]


def test_entries_are_what_the_site_shows():
    """A function and its module may share a name; the site must show the function."""
    loader = griffe.GriffeLoader(search_paths=[ROOT, ROOT / "kernels"])
    for package in ("fastmatch_kernels", "fastmatch"):
        loader.load(package)
    for name in documented():
        found = loader.modules_collection[name]
        assert found.is_module == (name in WHOLE_MODULES), name


def test_public_names_have_docstrings():
    for name in documented():
        found = importlib.import_module(name) if name in WHOLE_MODULES else resolve(name)
        if callable(found) or name in WHOLE_MODULES:
            assert found.__doc__, name
