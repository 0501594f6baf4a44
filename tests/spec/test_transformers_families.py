"""Every family of transformers that a small config builds keeps its function when all its groups are permuted."""

from __future__ import annotations

import random

import pytest

from helpers.networks import fresh_seed

pytest.importorskip("transformers")

from bench.lib import record
from bench.lib.transformers_models import families
from bench.reports.transformers_families import NAME, judge, judged_apart

ROWS = {row["family"]: row for row in record.read(NAME)["rows"]}
"""The committed run."""


def test_the_committed_run_found_no_family_whose_function_changes():
    assert [row for row in ROWS.values() if row["outcome"] == "changed"] == []


@pytest.mark.filterwarnings("ignore")
def test_some_families_are_verified_again():
    small = sorted(
        k for k, row in ROWS.items() if row["outcome"] == "verified" and row["parameters"] < 100_000
    )
    for name in random.Random(fresh_seed()).sample(small, 3):
        row = judge(name)
        assert row["outcome"] == "verified", row
        assert row["groups"] == ROWS[name]["groups"], row


@pytest.mark.slow
@pytest.mark.parametrize("name", families())
def test_every_family_that_can_be_small_keeps_its_function(name):
    row = judged_apart(name)
    assert row["outcome"] != "changed", row
    if ROWS.get(name, {}).get("outcome") == "verified":
        assert row["outcome"] == "verified", row
