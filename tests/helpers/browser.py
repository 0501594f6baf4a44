"""A headless Chromium, where the machine has one: does a page fit its width, and do its images load?"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

SCRIPT = """
const faults = frame => {
  const inner = frame.contentDocument, found = [];
  const width = inner.documentElement.clientWidth;
  const scrolls = e => { for (; e; e = e.parentElement)
    if (["auto", "scroll", "hidden", "clip"].includes(inner.defaultView.getComputedStyle(e).overflowX)
        && e !== inner.body && e !== inner.documentElement) return true; return false; };
  for (const e of inner.body.querySelectorAll("*")) {
    const box = e.getBoundingClientRect();
    if (box.width && (box.right > width + 1 || (box.left < -1 && box.right > 0)) && !scrolls(e))
      found.push(e.tagName + "." + e.getAttribute("class") + " to " + Math.round(box.right) + " of " + width);
  }
  for (const e of inner.images) if (!e.complete || !e.naturalWidth) found.push("image " + e.alt);
  return found;
};
addEventListener("load", () => setTimeout(() => {
  document.body.dataset.found = JSON.stringify([...document.querySelectorAll("iframe")].map(faults));
}, 50));
"""


def browser() -> str:
    """Return the browser's path; skip the test where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no headless Chromium on this machine")
    return found


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [
            browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}", *arguments,
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if done.returncode != 0:
        pytest.skip(f"the browser does not run here: {done.stderr[-300:]}")
    return done.stdout


def faults(pages: Sequence[Path], width: int, folder: Path, *, dark: bool = False) -> dict[str, list[str]]:
    """Return page -> the elements that reach outside a window of ``width`` pixels, and the images that do not load.

    Pages without a fault are left out. All are opened at once, because a browser takes longer to start than a page to load.
    """
    frame = folder / f"frame-{width}.html"
    frames = "".join(
        f'<iframe src="{html.escape(page.resolve().as_uri(), quote=True)}" style="width:{width}px;height:900px;border:0">'
        "</iframe>"
        for page in pages
    )
    frame.write_text(f'<!doctype html><body style="margin:0">{frames}<script>{SCRIPT}</script></body>')
    palette = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    text = run(folder, palette, "--virtual-time-budget=4000", "--dump-dom", frame.resolve().as_uri())
    found = re.search(r'data-found="([^"]*)"', text)
    assert found, text[:500]
    texts = json.loads(html.unescape(found[1]))
    return {str(page): text for page, text in zip(pages, texts, strict=True) if text}


def picture(
    page: Path, out: Path, folder: Path, *, width: int = 1200, height: int = 900, dark: bool = False
) -> None:
    """Write a PNG of the page's first ``height`` pixels."""
    palette = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    run(folder, palette, f"--window-size={width},{height}", f"--screenshot={out}", page.resolve().as_uri())
