"""Draw the pictures of the documentation from committed results: ``python docs/draw_pictures.py`` (from the root)."""

from __future__ import annotations

import json
from pathlib import Path

from drawings import assignment, tracing  # beside this file

from bench.reports import partial_merging, suites
from fastmatch.studies.demo import Row, draw

ROOT = Path(__file__).parents[1]
RESULTS, PICTURES = ROOT / "bench/results", ROOT / "docs/pictures"


def main() -> None:
    """Draw tracing and the assignment; the demo, light and dark, the benchmark suites and partial merging."""
    for draw_one in (tracing, assignment):
        (PICTURES / f"{draw_one.__name__}.svg").write_text(draw_one())
    rows = [Row(**row) for row in json.loads((RESULTS / "demo.json").read_text())["rows"]]
    draw(rows, PICTURES / "demo.png")
    draw(rows, PICTURES / "demo_dark.png", dark=True)
    run = suites.rows_of(suites.read_run(RESULTS / "bench.json"))
    for (suite, field), name in suites.README.items():
        suites.figure(run, suite, field).savefig(PICTURES / name, dpi=110)
    partial_merging.draw(json.loads((RESULTS / "partial_merging.json").read_text()))


if __name__ == "__main__":
    main()
