"""What tests print, log or raise reaches the report of the run, whatever is in it."""

from __future__ import annotations

import logging

import execnet
import pytest

from helpers.plain_text import encodable

LONE = "\ud800"


def test_a_lone_surrogate_is_escaped_wherever_it_is():
    data = {"sections": [("log", f"a {LONE} b")], LONE: None, "duration": 0.5}
    escaped = encodable(data)
    assert escaped == {"sections": [("log", "a \\ud800 b")], "\\ud800": None, "duration": 0.5}
    execnet.dumps(escaped)
    with pytest.raises(execnet.DumpError):
        execnet.dumps(data)


def test_a_log_with_a_lone_surrogate_does_not_end_the_run(caplog):
    logging.getLogger(__name__).warning("a %s b", LONE)  # reported by a process to another, in a parallel run
    assert LONE in caplog.text
