"""Run docs/notebooks/merge.ipynb and write it as a page: ``python docs/render_notebook.py``.

The notebook is committed without outputs. This script writes docs/notebooks/merge.md, with outputs, and its pictures.
A test checks that the page has the notebook's text and code.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parent / "notebooks/merge.ipynb"


def render(notebook: Any, pictures: dict[str, bytes] | None = None) -> str:
    """Return the notebook as Markdown; put the PNG outputs into ``pictures``, by file name."""
    parts = ["<!-- Written by docs/render_notebook.py from merge.ipynb. -->"]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        parts += [shown for output in cell.get("outputs", []) if (shown := _shown(output, pictures))]
    parts.append("Download: [merge.ipynb](merge.ipynb).")
    return "\n\n".join(parts) + "\n"


def _shown(output: Any, pictures: dict[str, bytes] | None) -> str:
    if output.get("name") == "stderr":
        return ""
    data = output.get("data", {})
    if pictures is not None and "image/png" in data:
        name = f"merge_{len(pictures)}.png"
        pictures[name] = base64.b64decode(data["image/png"])
        return f"![Output of the cell above]({name})"
    text = output.get("text") or data.get("text/plain", "")
    return f"```text\n{text.rstrip()}\n```" if text else ""


def main() -> None:
    """Run the notebook and write the page and its pictures."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120).execute()
    pictures: dict[str, bytes] = {}
    NOTEBOOK.with_suffix(".md").write_text(render(notebook, pictures))
    for name, data in pictures.items():
        (NOTEBOOK.parent / name).write_bytes(data)


if __name__ == "__main__":
    main()
