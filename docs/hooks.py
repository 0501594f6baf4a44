"""Hooks of the site's build: formulas become MathML, and pages outside docs/ become pages of the site."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
RESULTS, SITE_RESULTS = "bench/results", "measured/results"
OUTSIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
"""Files of the repository's root -> their pages."""

FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>([,.;:)]*)', re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages outside docs/: ``bench/results/x.md`` becomes ``measured/results/x``, and so on."""
    for name, uri in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    for path in sorted((ROOT / RESULTS).glob("*.md")) + sorted((ROOT / RESULTS).glob("*.json")):
        uri = f"{SITE_RESULTS}/{path.name}"
        if path.suffix == ".json":
            files.append(File.generated(config, uri, abs_src_path=str(path)))
            continue
        text = path.read_text()
        # Some reports are a bare table: a page needs a title.
        title = "" if text.startswith("# ") else f"# {path.stem.replace('_', ' ').capitalize()}\n\n"
        files.append(File.generated(config, uri, content=title + text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links to files outside docs/ to the pages that :func:`on_files` adds.

    Pages link to the file in the repository, so that the links also work where the Markdown is read unbuilt.
    """
    up = "../" * page.file.src_uri.count("/")
    if page.file.src_uri in OUTSIDE.values():
        markdown = markdown.replace("](docs/", "](")
    for name, uri in {RESULTS + "/": SITE_RESULTS + "/", **OUTSIDE}.items():
        markdown = re.sub(rf"\]\((?:\.\./)+{re.escape(name)}", f"]({up}{uri}", markdown)
    return markdown


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Render formulas as MathML, which browsers display without a script or a font from another site."""
    return FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    block = match[1] == "div"
    latex = html.unescape(match[2]).strip()[2:-2].strip()  # without \( \) or \[ \]
    formula = convert(latex, display="block" if block else "inline")
    if block:
        return f'<div class="formula-block">{formula}</div>'
    return f'<span class="formula">{formula}{match[3]}</span>'
