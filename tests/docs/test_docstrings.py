"""Every example in a docstring runs, and prints what it shows."""

from __future__ import annotations

import pytest

from helpers.examples import docstrings, run_docstring

TESTS = list(docstrings())

PENDING = (
)
"""Docstrings whose examples use names that they do not define. To be emptied."""


def test_examples_are_found():
    assert len(TESTS) > 20
    assert {test.name.split(".")[0] for test in TESTS} == {"fastmatch", "fastmatch_kernels"}


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.name)
def test_the_examples_of_a_docstring_run(test, tmp_path, monkeypatch, request):
    if test.name in PENDING:
        request.applymarker(pytest.mark.xfail(reason="pending", strict=False))
    monkeypatch.chdir(tmp_path)
    report = run_docstring(test, tmp_path)
    assert not report, f"\n{report}"
