"""``--report`` of several commands: write the page of a result, and print its summary."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastmatch._internal.callables import loader_from
from fastmatch._internal.words import printable

if TYPE_CHECKING:
    from fastmatch.report.report import Report

__all__ = ["report_data", "write_report"]


def report_data(args: argparse.Namespace) -> Iterable[Any] | None:
    """Return the loader of ``--report-data``; None if it is not given."""
    return None if args.report_data is None else loader_from(args.report_data, "--report-data")


def write_report(report: Report, args: argparse.Namespace) -> None:
    """Write the page with the command that repeats the run, and print the summary, except with --json or --quiet."""
    command = shlex.join(["fastmatch", *args.arguments])
    replace(report, command=command).save(args.report, force=args.force)
    if not (args.json or args.quiet):
        print(printable(f"\n{report}\n\nthe report is {args.report}"))
