"""What the registry shows: the README, with links that work outside of the repository, and the repository's address.

The environment variable ``FASTMATCH_REPOSITORY`` has the address, such as https://example.org/owner/fastmatch. Without it, what
only works inside of the repository is left out.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)]+)\)")
PICTURE = re.compile(r"<picture>.*?</picture>\n*", re.DOTALL)
SOURCE = re.compile(r'(src|srcset)="(?!https?://)([^"]+)"')


class ReadmeHook(MetadataHookInterface):
    """Sets the fields ``readme`` and ``urls`` of the package."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the fields."""
        address = os.environ.get("FASTMATCH_REPOSITORY", "").rstrip("/")
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = described(text, f"{address}/{{}}/v{metadata['version']}/" if address else "")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        changelog = {"Source": address, "Changelog": f"{address}/blob/main/CHANGELOG.md"}
        metadata["urls"] = changelog if address else {}


def described(text: str, base: str) -> str:
    """Return the README for readers elsewhere.

    Args:
        text: the README.
        base: what comes before paths, with ``{}`` for ``blob`` (a page) or ``raw`` (a file); empty if there is no address. Links are then
            text, and pictures are left out.
    """
    text = text.replace("`pip install .` in a checkout", "`pip install fastmatch`")
    if not base:
        return LINK.sub(lambda m: "" if m[1] else m[2], PICTURE.sub("", text))
    text = SOURCE.sub(lambda m: f'{m[1]}="{base.format("raw")}{m[2]}"', text)
    return LINK.sub(lambda m: f"{m[1]}[{m[2]}]({base.format('raw' if m[1] else 'blob')}{m[3]})", text)
