"""The README's figures are those of the committed results."""

from __future__ import annotations

import json
import re
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


def test_the_barriers_of_the_first_screen_are_the_committed_runs():
    """The row not aligned and the row that is aligned by activations and repaired, of the convolutional networks."""
    rows = [Row(**row) for row in json.loads((ROOT / "bench/results/demo.json").read_text())["rows"]]
    conv = {(r.matched, r.renormalized): r for r in rows if r.network == "conv 32, BN"}
    text = (ROOT / "README.md").read_text()
    first, last = conv["-", "-"], conv["activations", "repair"]
    assert f"from {first.loss_barrier:.3f} to {last.loss_barrier:.3f}" in text
    assert f"from {first.midpoint_accuracy:.1%} to {last.midpoint_accuracy:.1%}" in text


def test_pictures_of_html_exist():
    for page in (ROOT / "README.md", ROOT / "docs/index.md"):
        found = re.findall(r'(?:src|srcset)="([^"]+)"', page.read_text())
        assert len(found) == 2
        assert all((page.parent / path).is_file() for path in found)


def test_it_is_short():
    """Under 1,000 words; the bars of a table are not words."""
    words = [word for word in (ROOT / "README.md").read_text().split() if any(map(str.isalnum, word))]
    assert len(words) < 1000


def test_the_ratios_are_the_committed_runs():
    text = (ROOT / "README.md").read_text()
    rows = (ROOT / "bench/results/bench.md").read_text().splitlines()
    for network, size in (("MLP 3 x width, weights", 2048), ("VGG16, weights", 2048)):
        row = next(r for r in rows if f"| {network} | {size} |" in r)
        ratio = float(row.split("torch float32 ")[1].split(",")[0].split()[0])
        assert f"{ratio:.1f} times" in text.replace("\n", " ")
