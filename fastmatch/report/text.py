"""A report as plain text that fits one screen of a terminal."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from fastmatch._internal.words import short

if TYPE_CHECKING:
    from fastmatch.report.content import Content, LayerTable
    from fastmatch.report.measures import Layer

__all__ = ["screen"]

WIDTH = 80
MOST_ROWS = 10
"""Rows of a table on the screen; of a longer table the worst ones."""

NUMBERS = 14
"""Columns of a row's numbers, such as ``-0.01 -> 10.00``."""
BAR = 16
EIGHTHS = " ▏▎▍▌▋▊▉█"


def screen(report: Content) -> str:
    """Return the summary: the result in words, the numbers, the layers, and where the time went."""
    lines = [report.title, report.subtitle, ""]
    lines += textwrap.wrap(" ".join(report.sentences), WIDTH)
    lines.append("")
    label = max((len(tile.label) for tile in report.tiles), default=0)
    for tile in report.tiles:
        value = f"{tile.before} -> {tile.value}" if tile.before else tile.value
        note = f"  ({tile.note})" if tile.note else ""
        lines.append(
            f"  {tile.label:<{label}}  {value}{note if len(value) + len(note) + label < WIDTH else ''}"
        )
    for table in report.tables[:1]:
        lines += ["", *_table(table)]
    if report.seconds:
        parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report.seconds.items())
        lines += ["", *textwrap.wrap(f"time: {parts}", WIDTH)]
    return "\n".join(lines)


def _table(table: LayerTable) -> list[str]:
    """Return the rows with a bar each; of a long table the worst rows."""
    rows, title = list(table.rows), table.title
    if len(rows) > MOST_ROWS:
        rows = table.worst[:MOST_ROWS]
        title += f": the {len(rows)} weakest of {len(table.rows)} rows"
    if not rows:
        return []
    name = min(max(len(row.name) for row in rows), 36)
    low, high = short(table.low), short(table.high)
    scale = f"{low}{high:>{BAR - len(low)}}"
    return [
        f"{title}, {' -> '.join(filter(None, table.words))}",
        f"  {'':<{name}}  {'':>6}  {'':>{NUMBERS}}  {scale}",
        *(f"  {_row(row, name, table)}" for row in rows),
    ]


def _row(row: Layer, width: int, table: LayerTable) -> str:
    name = row.name if len(row.name) <= width else "…" + row.name[1 - width :]
    units = f"{row.units or '':>6}"
    if row.after is None:
        return f"{name:<{width}}  {units}  not measured"
    before = "" if row.before is None else f"{short(row.before)} -> "
    filled = round(table.place(row.after) / 100 * BAR * 8)
    bar = "█" * (filled // 8) + (EIGHTHS[filled % 8] if filled % 8 else "")
    return f"{name:<{width}}  {units}  {before + short(row.after):>{NUMBERS}}  {bar}"
