"""``fastmatch bench``: the suites under bench/ of a checkout, run by pytest-benchmark, and the page made of them."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastmatch._internal.files import check_target, writing

__all__ = ["SUITES", "add_arguments", "bench_command", "combined"]

SUITES = ("assignment", "gains", "moments", "matching", "renorm", "apply", "end-to-end", "growth")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What ``fastmatch bench`` takes."""
    command.add_argument(
        "suites", nargs="*", metavar="suite", help=f"some of: {', '.join(SUITES)}; all if left out"
    )
    command.add_argument("--quick", action="store_true", help="small sizes: under three minutes on two cores")
    command.add_argument(
        "--out", default="out/bench.json", help="the run's JSON; its page goes beside it as .html"
    )
    command.add_argument("--compare", metavar="JSON", help="an earlier run to compare with")
    command.add_argument("--pictures", metavar="FOLDER", help="also write the README's plots here")
    exists = command.add_mutually_exclusive_group()
    exists.add_argument("--force", action="store_true", help="replace the run's JSON if it exists")
    exists.add_argument(
        "--add",
        action="store_true",
        help="keep what it has of other rows: suites of hours, one after the other",
    )
    command.set_defaults(run=bench_command)


def folder() -> Path:
    """bench/ of the checkout in the current folder, or of the one this package is installed from.

    Raises:
        ValueError: neither is there: wheels do not carry the suites.
    """
    for root in (Path.cwd(), Path(__file__).parents[2]):
        if (root / "bench" / "suites").is_dir():
            return root / "bench"
    raise ValueError(
        "bench: no checkout here; clone the repository and run it there, the wheel has no suites"
    )


def combined(run: dict[str, Any], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """``run`` as pytest-benchmark wrote it, and the rows of ``earlier`` that it does not measure anew; ``runs`` says where
    and when each was measured.
    """
    run["runs"] = {run["datetime"]: run["machine_info"]["fastmatch"]}
    for row in run["benchmarks"]:
        row["stats"].pop("data", None)  # medians and ratios are in extra_info
        row["extra_info"]["run"] = run["datetime"]
    if earlier is not None:
        earlier = earlier if "runs" in earlier else combined(earlier, None)
        measured = {row["fullname"] for row in run["benchmarks"]}
        kept = [row for row in earlier["benchmarks"] if row["fullname"] not in measured]
        run["benchmarks"] = kept + run["benchmarks"]
        names = {row["extra_info"]["run"] for row in kept}
        run["runs"] = {k: v for k, v in earlier["runs"].items() if k in names} | run["runs"]
    return run


def bench_command(args: argparse.Namespace) -> None:
    """Runs the suites, keeps the JSON without the rounds' raw times, and writes the page.

    Raises:
        ValueError: an unknown suite, no checkout, or a suite that failed (its output is above).
        ImportError: pytest-benchmark is not installed (``pip install fastmatch[bench]``).
    """
    unknown = [name for name in args.suites if name not in SUITES]
    if unknown:
        raise ValueError(f"suite: expected some of {', '.join(SUITES)}, got {unknown[0]!r}")
    if find_spec("pytest_benchmark") is None:
        raise ImportError("the suites run under pytest-benchmark: pip install 'fastmatch[bench]'")
    bench, out = folder(), Path(args.out).resolve()
    replace = args.force or args.add
    check_target(out, force=replace)
    earlier = json.loads(out.read_text()) if args.add and out.is_file() else None
    if args.compare and not Path(args.compare).is_file():
        raise ValueError(f"--compare: no file {args.compare}")
    out.parent.mkdir(parents=True, exist_ok=True)
    raw = out.with_suffix(".raw.json").resolve()
    files = [f"test_{name.replace('-', '_')}.py" for name in args.suites or SUITES]
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--benchmark-columns=median",
        f"--benchmark-json={raw}", "--rootdir", str(bench.parent), *(["--quick"] if args.quick else []),
        *(str(bench / "suites" / name) for name in files),
    ]  # fmt: skip
    # Run from within another pytest (this project's tests), the suites are still a run of their own.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    try:
        if subprocess.run(command, cwd=bench.parent, env=environment, check=False).returncode:
            raise ValueError("bench: a suite failed; nothing was kept")
        run = json.loads(raw.read_text())
    finally:
        raw.unlink(missing_ok=True)
    run = combined(run, earlier)
    with writing(out, force=replace) as temporary:
        temporary.write_text(json.dumps(run, indent=1) + "\n")
    report = [sys.executable, "-m", "bench.reports.suites", str(out), "--html", str(out.with_suffix(".html"))]
    report += ["--markdown", str(out.with_suffix(".md"))]
    report += ["--compare", args.compare] if args.compare else []
    report += ["--pictures", args.pictures] if args.pictures else []
    subprocess.run(report, cwd=bench.parent, check=True)
