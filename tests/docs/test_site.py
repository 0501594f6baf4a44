"""The built site: every page is there, every link leads somewhere, and nothing is loaded from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
RESULTS = sorted((ROOT / "bench/results").glob("*.md"))


class _Page(HTMLParser):
    """The links, the anchors and the loaded resources of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.loaded: set[str] = set()
        self.formulas = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := found.get(key))}
        self.formulas += tag == "math"
        if tag == "a" and (href := found.get("href")):
            self.links.add(href)
        if tag in ("img", "script", "iframe", "source") and (src := found.get("src")):
            self.loaded.add(src)
        if (
            tag == "link"
            and found.get("rel") in ("stylesheet", "icon", "preload")
            and (href := found.get("href"))
        ):
            self.loaded.add(href)


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, _Page]:
    return {path: _Page(path.read_text()) for path in site.rglob("*.html")}


def test_every_page_is_built(site: Path):
    for page in PAGES:
        name = page.relative_to(ROOT / "docs").with_suffix("")
        folder = name.parent if name.name == "index" else name
        assert (site / folder / "index.html").exists(), page
    for page in RESULTS:
        assert (site / "measured/results" / page.stem / "index.html").exists(), page


def test_links_and_anchors_lead_somewhere(site: Path, pages: dict[Path, _Page]):
    dead = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # its links are absolute, for a site at the root of a host
        for link in page.links | page.loaded:
            if re.match(r"[a-z]+:", link):
                continue
            file, anchor = urldefrag(unquote(link))
            target = (path.parent / file).resolve() if file else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                dead.append(f"{path.relative_to(site)}: {link}")
    assert not dead


def test_nothing_is_loaded_from_another_site(pages: dict[Path, _Page]):
    assert not [(str(path), url) for path, page in pages.items() for url in page.loaded if "//" in url]


def test_formulas_are_rendered(site: Path, pages: dict[Path, _Page]):
    assert pages[(site / "concepts/renormalization/index.html")].formulas > 5
    for path in pages:
        assert 'class="arithmatex"' not in path.read_text(), path


def test_every_public_object_has_its_entry(site: Path):
    text = "".join(path.read_text() for path in (site / "reference").rglob("*.html"))
    for name in ("align", "WeightMatching", "linear_sum_assignment", "installed", "match_tensors_zipit"):
        assert name in text


def test_the_table_of_placement_is_the_committed_runs(site: Path):
    cells = re.findall(
        r"[^|\n]+", (ROOT / "bench/results/greedy_initialization.md").read_text().split("\n", 2)[2]
    )
    text = (site / "design/matching/index.html").read_text().replace("&gt;", ">")
    for cell in cells:
        assert f">{cell.strip()}<" in text


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page: Path):
    """In the repository too, where Markdown is read unbuilt."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
