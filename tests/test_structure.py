"""The structure of the code: imports point downward, and no module is loose."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

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
    "report",
    "checkpoint",
    "backends",
    "recipes",
    "studies",
    "cli",
)
"""From the bottom up: a package imports itself and those before it."""

UPWARD = {("permutations/alignment.py", "fastmatch.report")}
"""The imports that point upward, when a method is called: users look for it on the object that they hold."""


def is_upward(path: Path, name: str) -> bool:
    """Whether an import is one of the exceptions."""
    return any(path.as_posix().endswith(f"fastmatch/{file}") and name.startswith(to) for file, to in UPWARD)


@cache
def nodes(path: Path) -> list[ast.AST]:
    """The imports and functions in a file, which most of these tests look at."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in the file, ``if TYPE_CHECKING`` included."""
    found = set()
    for node in nodes(path):
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
            if is_upward(path, name):
                continue
            if parts[0] == "fastmatch" and (len(parts) == 1 or LAYERS.index(parts[1]) > LAYERS.index(layer)):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_kernels_import_nothing_of_fastmatch():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not any(name.split(".")[0] in ("fastmatch", "bench") for name in imported(path)), path


def modules_of(package: Path) -> dict[str, Path]:
    """Module name -> file, for every file of a package."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def needed(path: Path, modules: dict[str, Path]) -> set[str]:
    """The files that a file's imports name: a submodule, or the ``__init__`` that offers another name."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in names}
    return {name for name in found & modules.keys() if not is_upward(path, name)}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The circles that a search from every node runs into."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> None:
        if node in path:
            found.append([*path[path.index(node) :], node])
        elif node not in done:
            for other in sorted(edges[node]):
                visit(other, [*path, node])
            done.add(node)

    for node in edges:
        visit(node, [])
    return found


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]
    assert circles({"a": {"a"}}) == [["a", "a"]]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


@pytest.mark.parametrize("package", ["fastmatch", "kernels/fastmatch_kernels"])
def test_no_import_circle(package):
    """Every import counts: at the top, in a function, under ``TYPE_CHECKING``."""
    modules = modules_of(ROOT / package)
    assert not circles({module: needed(path, modules) for module, path in modules.items()})


def test_no_module_is_loose():
    loose = {path.name for path in (ROOT / "fastmatch").iterdir() if path.is_file()}
    assert loose == {"__init__.py", "__init__.pyi", "__main__.py", "py.typed"}
    folders = {path.name for path in (ROOT / "fastmatch").iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == set(LAYERS)


def test_only_the_command_line_parses_arguments():
    found = {
        path.relative_to(ROOT / "fastmatch").parts[0]
        for path in (ROOT / "fastmatch").rglob("*.py")
        if "argparse" in imported(path)
    }
    assert found == {"cli"}


def test_no_function_has_more_than_eight_parameters():
    """Outside the kernels, one that has more says why on the line above: ``# parameters: <reason>``."""
    wrong = []
    for path in (ROOT / "fastmatch").rglob("*.py"):
        lines = path.read_text().splitlines()
        for node in nodes(path):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([a for a in given if a.arg not in ("self", "cls")])
            count += sum(a is not None for a in (node.args.vararg, node.args.kwarg))
            reason = lines[node.lineno - 2].strip().startswith("# parameters: ")
            if count > 8 and not reason:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {count}")
    assert not wrong
