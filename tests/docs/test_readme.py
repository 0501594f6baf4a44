"""The README's figures are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

from fastmatch.studies.demo import Row, table

ROOT = Path(__file__).parents[2]


def test_the_demo_table_is_the_committed_runs():
    rows = json.loads((ROOT / "bench/results/demo.json").read_text())["rows"]
    text = (ROOT / "README.md").read_text()
    assert table([Row(**row) for row in rows]) in text


def test_the_weight_matching_figures_are_the_committed_runs():
    record = json.loads((ROOT / "bench/results/weight_matching.json").read_text())
    text = (ROOT / "README.md").read_text()
    assert {row["algorithm"] for row in record["rows"]} == {"published", "fastmatch"}
    for row in record["rows"]:
        assert f"{row['objective']:.4f}" in text


def test_the_table_of_greedy_initialization_is_the_committed_runs():
    assert (ROOT / "bench/results/greedy_initialization.md").read_text() in (
        ROOT / "docs/matching.md"
    ).read_text()
