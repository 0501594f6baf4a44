"""A report: what there is to say, as data; and the page, the notebook's view and the text that show it."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

from fastmatch._internal.allowed import PAGES
from fastmatch._internal.checks import check_format
from fastmatch._internal.outputs import check_target, writing
from fastmatch.report.content import Content
from fastmatch.report.page import render
from fastmatch.report.text import screen

__all__ = ["Report"]


@dataclass(frozen=True, eq=False)
class Report(Content):
    """What an alignment, a merge or a renormalization did. A notebook shows it as a page.

    Example:
        >>> report = fm.align(model_a, model_b, x).report(model_a, model_b, test_loader, points=3)
        >>> report.save("report.html")
        >>> print(report)

    Attributes:
        title, subtitle: what was done, and to what.
        sentences: the result in words.
        tiles: the numbers to see first.
        charts: curves on the line between the models.
        tables: numbers layer by layer.
        matrices: similarities of units, before and after.
        structure: which tensors move together.
        seconds: part of the run -> seconds.
        recipe: option -> value, from which the run can be repeated.
        command: a command line or Python that repeats it.
    """

    def html(self) -> str:
        """Return one self-contained page, in the reader's light or dark palette."""
        return render(self)

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the page.

        Args:
            path: a .html file.
            force: replace an existing file.

        Raises:
            ValueError: ``path`` has another suffix.
            FileExistsError, FileNotFoundError: the file exists, or its folder does not.
        """
        check_format(path, "path", PAGES)
        check_target(path, force=force)
        page = self.html()
        with writing(path, force=force) as temporary:
            temporary.write_text(page, encoding="utf-8")

    def _repr_html_(self) -> str:
        """The page in a frame, so that its style and the notebook's do not meet."""
        page = html.escape(self.html(), quote=True)
        style = "width:100%;height:44rem;border:1px solid #8884;border-radius:8px"
        return f'<iframe title="{html.escape(self.title)}" style="{style}" srcdoc="{page}"></iframe>'

    def __str__(self) -> str:
        """The report on one screen of a terminal."""
        return screen(self)

    def __repr__(self) -> str:
        return f"Report({self.title!r}, {self.subtitle!r})"
