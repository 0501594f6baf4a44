"""``fastmatch bench``: run the suites in a checkout's bench/ folder with pytest-benchmark and report the results."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastmatch._internal.outputs import check_target, writing
from fastmatch.cli.options import Commands, add, add_command

__all__ = ["SUITES", "add_commands", "combined"]

SUITES = ("assignment", "gains", "moments", "matching", "renorm", "apply", "end-to-end", "growth")


def add_commands(commands: Commands) -> None:
    """Add the command to the grammar."""
    command = add_command(
        commands,
        "bench",
        bench_command,
        examples=("bench assignment gains --quick --out out/bench.json",),
        outcome=False,
    )
    command.add_argument(
        "suites", nargs="*", metavar="suite", help=f"some of {', '.join(SUITES)}; all by default"
    )
    command.add_argument(
        "--quick", action="store_true", help="use small sizes: less than three minutes on two cores"
    )
    command.add_argument(
        "--out", default="out/bench.json", metavar="FILE",
        help="JSON file to write; the pages are written next to it as .html and .md",
    )  # fmt: skip
    command.add_argument(
        "--families", nargs="?", const="*", metavar="PATTERN",
        help="with the suite assignment alone: measure families of costs in place of it, all or those whose names fit",
    )  # fmt: skip
    command.add_argument("--compare", metavar="FILE", help="JSON file of an earlier run to compare with")
    command.add_argument("--pictures", metavar="FOLDER", help="also write the README's plots to this folder")
    exists = command.add_mutually_exclusive_group()
    add(exists, "--force", help="replace the JSON file if it exists")
    exists.add_argument(
        "--add", action="store_true",
        help="keep the rows of the existing JSON file that this run does not measure, to run long suites one by one",
    )  # fmt: skip


def folder() -> Path:
    """Return bench/ of the checkout in the current folder, or of the checkout that this package is installed from.

    Raises:
        ValueError: there is neither. Wheels do not contain the suites.
    """
    for root in (Path.cwd(), Path(__file__).parents[2]):
        if (root / "bench" / "suites").is_dir():
            return root / "bench"
    raise ValueError(
        "no checkout here; clone the repository and run the command there, because the wheel has no suites"
    )


def combined(run: dict[str, Any], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """Combine a run with the rows of an earlier run that it does not measure again.

    Args:
        run: the JSON that pytest-benchmark wrote. It is changed.
        earlier: the same, or what this function returned.

    Returns:
        The run. Its entry ``runs`` says when and on which machine the rows were measured.
    """
    run["runs"] = {run["datetime"]: run["machine_info"]["fastmatch"]}
    for row in run["benchmarks"]:
        row["stats"].pop("data", None)  # the raw times; medians and ratios are in extra_info
        row["extra_info"]["run"] = run["datetime"]
    if earlier is not None:
        earlier = earlier if "runs" in earlier else combined(earlier, None)
        measured = set(map(_instance, run["benchmarks"]))
        kept = [row for row in earlier["benchmarks"] if _instance(row) not in measured]
        run["benchmarks"] = kept + run["benchmarks"]
        names = {row["extra_info"]["run"] for row in kept}
        run["runs"] = {k: v for k, v in earlier["runs"].items() if k in names} | run["runs"]
    return run


def _instance(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a benchmark measured. Its test may have been renamed."""
    told = row["extra_info"]
    known = "suite" in told
    return (told["suite"], told["instance"], told["size"]) if known else (row["fullname"],)


def bench_command(args: argparse.Namespace) -> None:
    """Run the suites, write their JSON without the raw times of the rounds, and write the pages.

    Raises:
        ValueError: a suite is unknown or failed (its output is printed), ``--families`` comes without the suite
            assignment or with another one, or there is no checkout.
        ImportError: pytest-benchmark is not installed (the extra ``bench``).
    """
    unknown = [name for name in args.suites if name not in SUITES]
    if unknown:
        raise ValueError(f"suite: expected some of {', '.join(SUITES)}, got {unknown[0]!r}")
    if args.families is not None and args.suites != ["assignment"]:
        raise ValueError(
            f"--families: expected the suite assignment alone, got {' '.join(args.suites) or 'all'}"
        )
    if find_spec("pytest_benchmark") is None:
        raise ImportError("the suites need pytest-benchmark: pip install 'fastmatch[bench]'")
    bench, out = folder(), Path(args.out).resolve()
    replace = args.force or args.add
    check_target(out, force=replace)
    earlier = json.loads(out.read_text()) if args.add and out.is_file() else None
    if args.compare and not Path(args.compare).is_file():
        raise ValueError(f"--compare: no file {args.compare}")
    out.parent.mkdir(parents=True, exist_ok=True)
    raw = out.with_suffix(".raw.json").resolve()
    files = [f"test_{name.replace('-', '_')}.py" for name in args.suites or SUITES]
    options = ["--quick"] if args.quick else []
    if args.families is not None:
        files, options = ["test_assignment_families.py"], [*options, "--families", args.families]
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--benchmark-columns=median",
        f"--benchmark-json={raw}", "--rootdir", str(bench.parent), *options,
        *(str(bench / "suites" / name) for name in files),
    ]  # fmt: skip
    # Within another pytest (this project's tests), its variables would change the options of this run.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    try:
        if subprocess.run(command, cwd=bench.parent, env=environment, check=False).returncode:
            raise ValueError("a suite failed; nothing was kept")
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
