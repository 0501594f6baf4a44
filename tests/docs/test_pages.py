"""The code of the README and of every page runs, commands have the options shown, and the notebook runs."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import fastmatch as fm
from fastmatch.cli.main import parser
from helpers.examples import namespace, prepare, python_blocks

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs/notebooks/merge.ipynb"
PAGES = [p for p in sorted((ROOT / "docs").rglob("*.md")) if p != NOTEBOOK.with_suffix(".md")]
PAGES += [ROOT / "README.md"]
WITH_CODE = [page for page in PAGES if python_blocks(page)]
SLOW = {"several-processes", "pruning", "cnn"}


def names_of_a_page() -> dict[str, Any]:
    """Return the names that a page may use without defining them: those of docstrings, and what aligning makes."""
    names = namespace()
    models = [names["model_a"], names["model_b"], names["model_c"]]
    alignment = fm.align(models[0], models[1], names["x"])
    aligned = alignment.apply(models[1])
    merged = fm.merge([models[0], aligned])
    return {
        **names,
        "models": models,
        "model": models[0],
        "alignment": alignment,
        "aligned": aligned,
        "merged": merged,
    }


def is_ready_to_copy(page: Path) -> bool:
    """Whether a reader may copy all code of a page into a file that runs: guides, but for parts of a script for ranks."""
    return page.parent.name in ("guides", "start") and page.stem != "several-processes"


@pytest.mark.parametrize("page", [
    pytest.param(page, marks=pytest.mark.slow) if page.stem in SLOW else page for page in WITH_CODE
], ids=lambda p: str(p.relative_to(ROOT)))  # fmt: skip
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its Python blocks run one after the other, those of guides from nothing. A traceback names the page and its line."""
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(page)
    prepare(tmp_path, "".join(code for _, code in blocks))
    names = {} if is_ready_to_copy(page) else names_of_a_page()
    for line, code in blocks:
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


def test_guides_have_code_that_runs():
    for page in (ROOT / "docs/guides").glob("*.md"):
        assert page in WITH_CODE or page.stem in ("benchmark", "command-line"), page
    assert not [page for page in PAGES if "<!-- not run:" in page.read_text()]


def lines() -> list[str]:
    """Every ``fastmatch`` command in the shell blocks of the README and of the pages."""
    return sorted({
        " ".join(line.split("#")[0].split())
        for page in PAGES
        for code in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
        for line in code.replace("\\\n", " ").splitlines()
        if line.startswith("fastmatch ")
    })  # fmt: skip


@pytest.mark.parametrize("line", lines())
def test_a_command_that_is_shown_can_be_parsed(line: str):
    name, *arguments = shlex.split(line)[1:]
    if name == "run":  # the rest belongs to the script
        arguments = arguments[:1]
    parser().parse_args([name, *arguments])


def test_the_page_of_commands_lists_them_all():
    (commands,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    page = (ROOT / "docs/guides/command-line.md").read_text()
    assert not [name for name in commands.choices if f"`{name}`" not in page]


@pytest.mark.slow
def test_the_notebook_runs_and_its_page_is_current():
    """Cells hold no outputs in the tree. The page has the notebook's cells, and the outputs of the run that wrote it."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    page = NOTEBOOK.with_suffix(".md").read_text()
    at = 0
    for cell in notebook.cells:
        found = page.find(cell.source, at)
        assert found >= 0, f"run python docs/render_notebook.py: not on the page: {cell.source}"
        at = found
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    printed = "".join(str(out.get("text", "")) for cell in notebook.cells for out in cell.get("outputs", []))
    assert "barrier" in printed
