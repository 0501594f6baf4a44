"""The built site in a browser: nothing reaches outside the window, and every image loads. Skipped without Chromium."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.browser import faults

PAGES = (
    "index.html",
    "start/first-alignment/index.html",
    "concepts/renormalization/index.html",
    "concepts/permutation-symmetry/index.html",
    "guides/assignment/index.html",
    "guides/reports/index.html",
    "guides/recipes/index.html",
    "reference/align/index.html",
    "measured/index.html",
    "measured/results/bench/index.html",
    "measured/results/study/index.html",
    "design/tracing/index.html",
    "notebooks/merge/index.html",
)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(("width", "dark"), [(360, True), (1280, False)])
def test_a_page_fits_its_window(site: Path, tmp_path: Path, page: str, width: int, dark: bool):
    assert faults(site / page, width, tmp_path, dark=dark) == []


def test_what_does_not_fit_is_found(tmp_path: Path):
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><body><p>fits</p><div class='wide' style='width:900px'>x</div><img alt='gone' src='none.png'>"
        "<div style='overflow:auto'><div style='width:900px'>scrolls</div></div></body>"
    )
    assert [text.split(" to ")[0] for text in faults(page, 360, tmp_path)] == ["DIV.wide", "image gone"]
    assert [text.split(" to ")[0] for text in faults(page, 1280, tmp_path)] == ["image gone"]
