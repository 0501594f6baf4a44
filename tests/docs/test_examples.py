"""The machinery that runs examples: it tells what failed, and where."""

from __future__ import annotations

import doctest
import textwrap

import pytest

from helpers.examples import python_blocks, run_docstring, run_page


def docstring(text: str) -> doctest.DocTest:
    return doctest.DocTestParser().get_doctest(textwrap.dedent(text), {}, "module.name", "module.py", 6)


def test_an_example_without_output_may_print(tmp_path):
    text = """
    >>> x.shape
    >>> fm.align(model_a, model_b, x).apply(model_b)
    >>> float(torch.ones(3).sum())
    3.0
    """
    assert run_docstring(docstring(text), tmp_path) == ""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("\n>>> 1 + 1\n3\n", ["line 8, in module.name", "Expected:\n    3", "Got:\n    2"]),
        ("\n>>> unknown\n", ["line 8, in module.name", "NameError: name 'unknown' is not defined"]),
    ],
)
def test_a_failure_names_file_line_and_error(text, told, tmp_path):
    report = run_docstring(docstring(text), tmp_path)
    assert all(part in report for part in ['File "module.py"', *told]), report


def test_examples_do_not_share_names(tmp_path):
    assert run_docstring(docstring("\n>>> model_a = 1\n"), tmp_path) == ""
    assert run_docstring(docstring("\n>>> model_a = model_a.eval()\n"), tmp_path) == ""


def test_blocks_of_a_page_run_in_order_unless_they_are_marked(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\n```python\none = 1\n```\n\n<!-- not run: needs a network -->\n```python\nmissing\n```\n\n"
        "```python\nassert one == 1\n```\n"
    )
    assert python_blocks(page) == [(4, "one = 1\n"), (13, "assert one == 1\n")]
    run_page(page, tmp_path)
    page.write_text(page.read_text() + "\n```python\nraise ValueError('here')\n```\n")
    with pytest.raises(ValueError, match="here") as caught:
        run_page(page, tmp_path)
    assert (str(caught.traceback[-1].path), caught.traceback[-1].lineno + 1) == (str(page), 17)
