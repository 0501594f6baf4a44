"""Fill the templates: one page with its style, charts and images inside."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from fastmatch._internal.words import count_of, short
from fastmatch.report.pictures import ARCS_WIDTH, ROW, arcs_of

if TYPE_CHECKING:
    from jinja2 import Environment

    from fastmatch.report.content import Content

__all__ = ["environment", "render"]


@cache
def environment() -> Environment:
    """Return the templates, which escape what they are given."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=PackageLoader("fastmatch.report", "templates"),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    found.filters |= {"number": lambda value: f"{value:,}", "short": short, "count_of": count_of}
    return found


def render(report: Content) -> str:
    """Return a report as one self-contained page."""
    total = sum(report.seconds.values())
    return (
        environment()
        .get_template("page.html")
        .render(
            report=report,
            arcs=[] if report.structure is None else arcs_of(report.structure),
            row=ROW,
            arcs_width=ARCS_WIDTH,
            total=total,
            longest=max(report.seconds.values(), default=0.0),
        )
    )
