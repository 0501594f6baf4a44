"""The errors of ``fastmatch demo`` and ``study``; tests/studies run them."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(("arguments", "message"), [
    (["demo", "--width", "100000"], "--width: expected 128 to 8192"),
    (["study", "--data", "cli_module:broken"], "--data: cli_module:broken returned int, expected (train, test)"),
])  # fmt: skip
def test_bad_input_is_one_line(folder, refused, arguments, message):
    refused(arguments, message)
