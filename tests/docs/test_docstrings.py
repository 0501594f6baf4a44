"""Every example in a docstring runs, and prints what it shows."""

from __future__ import annotations

import pytest

from helpers.examples import docstrings, run_docstring

TESTS = list(docstrings())


def test_examples_are_found():
    assert len(TESTS) > 20
    assert {test.name.split(".")[0] for test in TESTS} == {"fastmatch", "fastmatch_kernels"}


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.name)
def test_the_examples_of_a_docstring_run(test, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = run_docstring(test, tmp_path)
    assert not report, f"\n{report}"
