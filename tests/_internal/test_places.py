"""A function of the user that is misspelt is told without importing its file, and one that may be there is left to the import."""

from __future__ import annotations

import pytest

from fastmatch._internal.places import check_place

PLAIN = """
import torch as t
from collections import OrderedDict

def build():
    inner = 1

class Net:
    def forward(self):
        pass

if t:
    def loader(): ...
    other = build
for made in (build, loader):
    pass
"""
MADE = [
    "from torch import *", "from torch import (*)", "def __getattr__(name):\n    return print", "globals()['build'] = print",
    "exec('build = print')", "import sys\nsetattr(sys.modules[__name__], 'build', print)", "vars()['build'] = print",
    "def make():\n    global build\n    build = print\nmake()", "def build(:",  # the import says where
    "from math import \\\n*", "from sys import modules as m\nm['net'].build = print", "import net as me\nme.build = print",
    "match 1:\n    case build: pass", "match [1]:\n    case [*build]: pass", "match {}:\n    case {**build}: pass",
    "build = " + "+".join("1" * 5000),  # too deep for recursion
]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("place", ["net.py", "net", "pkg/net.py", "pkg.net"])
def test_names_at_the_top_of_a_file(here, place):
    file = here / ("pkg/net.py" if "pkg" in place else "net.py")
    file.parent.mkdir(exist_ok=True)
    (here / "pkg").mkdir(exist_ok=True)
    (here / "pkg" / "__init__.py").touch()
    file.write_text(PLAIN)
    for name in ("build", "Net", "Net.forward", "loader", "other", "made", "OrderedDict", "t.zeros"):
        assert check_place(f"{place}:{name}", "--model") == (place, name)
    with pytest.raises(
        ValueError, match=rf"^--model: '{place}' has no callable 'bild'; did you mean 'build'\?$"
    ):
        check_place(f"{place}:bild", "--model")
    with pytest.raises(ValueError, match="has no callable 'forward'"):
        check_place(f"{place}:forward", "--model")  # a method has to be named with its class


@pytest.mark.parametrize("code", MADE)
def test_names_that_are_made_as_the_code_runs(here, code):
    (here / "net.py").write_text(code)
    assert check_place("net.py:build", "--model") == ("net.py", "build")


def test_modules_that_are_not_in_this_folder(here):
    (here / "both").mkdir()
    (here / "both.py").write_text("")  # the package comes first
    (here / "latin.py").write_bytes(
        "# -*- coding: latin-1 -*-\nname = 'ü'\ndef build(): ...\n".encode("latin-1")
    )
    (here / "time.py").write_text("")  # what is built in comes first
    (here / "numpy").mkdir()
    (here / "numpy" / "linalg.py").write_text("")  # and so does an installed package
    for argument in (
        "both:build",
        "time:sleep",
        "numpy.linalg:norm",
        "json:dump",
        "torch.nn.functional:mse_lss",
        "gone:f",
        "latin.py:build",
    ):
        check_place(argument, "--model")
