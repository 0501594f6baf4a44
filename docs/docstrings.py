"""Griffe extension: docstrings as the reference pages need them.

The docstrings use Sphinx' roles, which other tools and editors understand, and ``Example:`` for a single example. This
extension turns roles into code, ``Example:`` into the section that renders code, an entry for several arguments
(``model_a, model_b: ...``) into one entry each, and a table of equality signs into a block that keeps its columns.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|data|attr|mod|exc):`~?([\w.]+)`")
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
TABLE = re.compile(r"^(=+ +=+\n(?:.*\n)*?=+ +=+\n(?:.*\n)*?=+ +=+)$", re.MULTILINE)
SHARED = re.compile(r"^( {4})(\w+(?:, \w+)+): (.*(?:\n {8}.*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrite every docstring after it is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(text: str) -> str:
    """Return a docstring with sections and names that mkdocstrings renders."""
    text = ROLE.sub(lambda role: f"`{role[1]}`", text)
    text = EXAMPLE.sub("Examples:", text)
    text = TABLE.sub(r"```text\n\1\n```", text)
    return SHARED.sub(
        lambda entry: "\n".join(f"{entry[1]}{name}: {entry[3]}" for name in entry[2].split(", ")), text
    )
