"""The built site in a browser: nothing reaches outside the window, and every image loads. Skipped without Chromium."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.browser import browser, faults

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


@pytest.fixture(scope="session", autouse=True)
def _chromium() -> None:
    """Skip these tests before the site is built for them."""
    browser()


@pytest.mark.parametrize(("width", "dark"), [(360, True), (1280, False)])
def test_every_page_fits_its_window(site: Path, tmp_path: Path, width: int, dark: bool):
    assert faults([site / page for page in PAGES], width, tmp_path, dark=dark) == {}


def test_what_does_not_fit_is_found(tmp_path: Path):
    page, good = tmp_path / "page.html", tmp_path / "good.html"
    good.write_text("<!doctype html><body><p>fits</p></body>")
    page.write_text(
        "<!doctype html><body><p>fits</p><div class='wide' style='width:900px'>x</div><img alt='gone' src='none.png'>"
        "<div style='overflow:auto'><div style='width:900px'>scrolls</div></div></body>"
    )

    def found(width: int) -> list[str]:
        (texts,) = faults([good, page], width, tmp_path).values()
        return [text.split(" to ")[0] for text in texts]

    assert found(360) == ["DIV.wide", "image gone"]
    assert found(1280) == ["image gone"]
