"""The structure of the code: imports point downward, and no module is loose."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent

LAYERS = (
    "_internal",
    "spec",
    "permutations",
    "assignment",
    "statistics",
    "matching",
    "renorm",
    "merging",
    "evaluation",
    "checkpoint",
    "backends",
    "studies",
    "cli",
)
"""From the bottom up: a package imports itself and those before it."""


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in the file, ``if TYPE_CHECKING`` included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_imports_point_downward():
    wrong = []
    for path in (ROOT / "fastmatch").rglob("*.py"):
        layer = path.relative_to(ROOT / "fastmatch").parts[0]
        if layer not in LAYERS:
            continue  # fastmatch/__init__.py and __main__.py see all
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "fastmatch" and (len(parts) == 1 or LAYERS.index(parts[1]) > LAYERS.index(layer)):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_kernels_import_nothing_of_fastmatch():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not any(name.split(".")[0] in ("fastmatch", "bench") for name in imported(path)), path


def test_no_module_is_loose():
    loose = {path.name for path in (ROOT / "fastmatch").iterdir() if path.is_file()}
    assert loose == {"__init__.py", "__main__.py", "py.typed"}
    folders = {path.name for path in (ROOT / "fastmatch").iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == set(LAYERS)
