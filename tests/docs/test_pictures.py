"""The pictures that are drawn from what the library finds are those of this version."""

from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def drawings():
    found = spec_from_file_location("drawings", DOCS / "drawings.py")
    module = module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["tracing", "assignment"])
def test_a_picture_is_what_is_found_now(drawings, name):
    text = (DOCS / f"pictures/{name}.svg").read_text()
    assert getattr(drawings, name)() == text, "draw it again: python docs/draw_pictures.py"


@pytest.mark.parametrize("path", sorted((DOCS / "pictures").glob("*.svg")), ids=lambda path: path.stem)
def test_a_drawing_has_both_palettes(path):
    """Every class that has a colour has one for dark pages as well, and nothing is coloured as paper or ink outside of them."""
    text = path.read_text()
    ElementTree.fromstring(text)
    light, dark = re.search(
        r"<style>(.*)@media \(prefers-color-scheme:dark\)(.*)</style>", text, re.DOTALL
    ).groups()
    assert set(re.findall(r"\.?\w+(?={)", light)) == set(re.findall(r"\.?\w+(?={)", dark))
    assert not re.findall(r'(?:fill|stroke)="#(?:fff|444|000)', text)
