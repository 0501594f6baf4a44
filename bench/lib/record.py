"""The JSON of a report, and the pages written from it.

Every report keeps one record in ``bench/results/NAME.json``::

    {
     "machine": {"cpu": ..., "cores": ..., "threads": ..., "load": ...},
     "versions": {"python": ..., "torch": ..., ...},
     "settings": {...},
     "rows": [{...}, ...]
    }

``settings`` holds what is the same for all rows. A row is one measurement. The page ``NAME.md`` is made from the
record alone, so that ``--page`` writes it again without measuring.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.lib.machine import machine, versions

RESULTS = Path(__file__).parents[1] / "results"

Row = dict[str, Any]
Record = dict[str, Any]


def record(
    rows: Iterable[Row], *, packages: Iterable[str] = (), show: bool = True, **settings: Any
) -> Record:
    """Return the record of ``rows``. The machine's load is taken before the first row is measured.

    Args:
        rows: measured one by one as they are taken, and printed if ``show``.
        packages: more packages whose versions are kept.
        settings: what is the same for all rows.
    """
    found: Record = {"machine": machine(), "versions": versions(packages), "settings": settings, "rows": []}
    for row in rows:
        found["rows"].append(row)
        if show:
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return found


def with_earlier(name: str, found: Record, *keys: str) -> Record:
    """Return a record with the committed rows that ``found`` does not measure again: those with other values of ``keys``."""
    if not exists(name):
        return found
    measured = [[row[key] for key in keys] for row in found["rows"]]
    earlier = [row for row in read(name)["rows"] if [row[key] for key in keys] not in measured]
    return {**found, "rows": [*earlier, *found["rows"]]}


def read(name: str) -> Record:
    """Return the committed record of the report ``name``."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def exists(name: str) -> bool:
    """Return whether the report ``name`` has a committed record."""
    return (RESULTS / f"{name}.json").exists()


def write(name: str, found: Record) -> None:
    """Write ``found`` to ``bench/results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def machine_line(found: Record) -> str:
    """Return the machine and the versions of a record as one sentence."""
    words = {
        "cores": "{} cores",
        "threads": "{} torch threads",
        "load": "load average {:.1f} at the start",
        "note": "{}",
    }
    told = found["machine"]
    parts = [told["cpu"], *(form.format(told[key]) for key, form in words.items() if key in told)]
    return f"{', '.join(parts)}; {', '.join(f'{k} {v}' for k, v in found['versions'].items())}."


def cell(value: Any, form: str = ".2f") -> str:
    """Return a value as a table shows it. Only floats are rounded."""
    return format(value, form) if isinstance(value, float) else str(value)


def table(rows: list[Row], keys: Iterable[str] | None = None, form: str = ".2f") -> str:
    """Return a Markdown table of ``rows`` with the columns ``keys``, those of the first row by default."""
    columns = list(rows[0] if keys is None else keys)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row[key], form) for key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def sections(rows: list[Row], by: str) -> str:
    """Return one headed table for each value of the column ``by``, in the order of the rows."""
    parts = []
    for value in dict.fromkeys(row[by] for row in rows):
        chosen = [row for row in rows if row[by] == value]
        parts.append(f"## {value}\n\n" + table(chosen, [key for key in chosen[0] if key != by]))
    return "\n".join(parts)


def page(title: str, name: str, found: Record, *parts: str) -> str:
    """Return a page: its title, the report that wrote it, the machine, then ``parts``."""
    source = f"Written by `python -m bench.reports.{name}`. {machine_line(found)}"
    return "\n\n".join([f"# {title}", source, *(part.rstrip("\n") for part in parts)]) + "\n"


def run(
    name: str,
    measure: Callable[[argparse.Namespace], Record],
    page: Callable[[Record], str],
    parser: argparse.ArgumentParser,
    arguments: list[str] | None = None,
) -> int:
    """Measure, write the record, write its page.

    Args:
        name: the report, and the stem of its files in ``bench/results``.
        measure: takes the parsed options, returns the record.
        page: takes the record, returns the text of ``NAME.md``.
        parser: the report's own options. ``--tiny`` and ``--page`` are added here.
        arguments: the command line, ``sys.argv`` by default.
    """
    given = options(parser, arguments)
    if not given.page:
        found = measure(given)
        if given.tiny:
            return 0
        write(name, found)
    write_page(name, page)
    return 0


def options(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line, with ``--tiny`` and ``--page``."""
    parser.add_argument("--tiny", action="store_true", help="measure small sizes and write nothing")
    parser.add_argument("--page", action="store_true", help="write only the page, from the committed record")
    return parser.parse_args(arguments)


def write_page(name: str, page: Callable[[Record], str]) -> None:
    """Write the page of the committed record."""
    (RESULTS / f"{name}.md").write_text(page(read(name)))


def script(
    name: str,
    doc: str,
    measure: Callable[[argparse.Namespace], Record],
    page: Callable[[Record], str],
    **options: tuple[int, str],
) -> Callable[..., int]:
    """Return the ``main`` of a report whose own options are whole numbers: ``seeds=(3, "pairs of networks")``."""

    def main(arguments: list[str] | None = None) -> int:
        parser = argparse.ArgumentParser(description=doc.splitlines()[0])
        for option, (default, text) in options.items():
            parser.add_argument(f"--{option}", type=int, default=default, help=text)
        return run(name, measure, page, parser, arguments)

    return main
