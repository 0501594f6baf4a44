"""Compiles every configuration of the Triton kernels ahead of time and writes what the machine code says.

    python -m bench.reports.aot                    all targets -> bench/results/aot.md
    python -m bench.reports.aot --json out.json --target sm_90 --quick
    python -m bench.reports.aot --rows a.json --rows b.json --also other.json
                                           the table of these runs (one target each, for example), and the findings
                                           of another version of Triton

No GPU is needed. The times at the end are predicted by the roofline, not measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections import Counter
from pathlib import Path

from bench.lib import record as records

RESULTS = Path(__file__).parents[1] / "results" / "aot.md"
NAMES = {"sm_80": "A100", "sm_90": "H100", "sm_100": "B200", "gfx942": "MI300X"}
DEPTH, SAMPLES, SHORTLIST = 4096, 65536, 16


def table(rows):
    from bench.lib.aot import Compiled

    head = (
        "| operation | variant | precision | tile | warps | stages | registers | spills | shared (KiB) | blocks "
        "| occupancy | matrix instr. | 16-byte loads | bytes / step | FLOP / step |"
    )
    lines = [head, "|" + "---|" * 15]
    for r in rows:
        assert isinstance(r, Compiled)
        lines.append(
            f"| {r.op} | {r.variant} | {r.precision} | {r.tiles} | {r.warps} | {r.stages} | {r.registers} "
            f"| {r.spills} | {r.shared / 1024:.1f} | {r.blocks} | {r.occupancy:.0%} | {r.matrix} "
            f"| {r.wide_loads} | {r.tile_bytes} | {r.tile_flops} |"
        )
    return lines


def works(n, target):
    """(operation, precision, work) of every operation at width ``n``."""
    from bench.lib import roofline
    from fastmatch_kernels._triton.tiles import PRECISIONS

    for precision in (*PRECISIONS, "half"):
        size = 2 if precision == "half" else 4
        yield f"gain, d = {DEPTH}", precision, roofline.gain(n, n, DEPTH, size)
        work = roofline.cost_rows(n, n, DEPTH, SHORTLIST, precision, target, size)
        yield f"cost_rows, d = {DEPTH}, k = {SHORTLIST}", precision, work
        work = roofline.row_softmin(n, n, DEPTH, precision, target, size)
        yield f"row_softmin, d = {DEPTH}", precision, work
        if precision != "half":
            yield f"moments, {SAMPLES} samples", precision, roofline.moments(SAMPLES, n, n)
    yield "permute_merge, two n x n float32", "ieee", roofline.permute_merge(n * n, 2)
    yield f"channel_affine, {SAMPLES} samples", "ieee", roofline.channel_affine(SAMPLES * n)


def predictions():
    from fastmatch_kernels._triton.tiles import TARGETS

    lines = [
        "| operation | precision | n | " + " | ".join(NAMES[t] for t in TARGETS) + " |",
        "|---|---|---|" + "---|" * len(TARGETS),
    ]
    for n in (4096, 16384, 65536):
        for columns in zip(*(list(works(n, t)) for t in TARGETS.values()), strict=True):
            name, precision, _ = columns[0]
            cells = [
                f"{1e3 * work.seconds(target, precision):.3g} ms ({work.limit(target, precision)})"
                for (_, _, work), target in zip(columns, TARGETS.values(), strict=True)
            ]
            lines.append(f"| {name} | {precision} | {n} | " + " | ".join(cells) + " |")
    return lines


def findings(version, rows):
    """A paragraph that counts what this version of Triton compiled, and a list of the faults; ``rows`` as in the JSON."""
    faulty = [r for r in rows if r["faults"]]
    targets = ", ".join(f"{name} {count}" for name, count in Counter(r["target"] for r in rows).items())
    lines = [f"Triton {version}: {len(rows)} configurations ({targets}), {len(faulty)} with a fault.", ""]
    for r in faulty:
        named = f"{r['target']}: {r['op']}, {r['variant']}, {r['precision']}, {r['tiles']}"
        lines.append(f"- {named}: {'; '.join(r['faults'])}")
    return [*lines, ""] if faulty else lines


def read_rows(files):
    """What ``--json`` wrote, by runs of the installed version of Triton."""
    import triton

    from bench.lib.aot import Compiled

    rows = []
    for file in files:
        record = json.loads(file.read_text())
        if record["versions"]["triton"] != triton.__version__:
            sys.exit(
                f"{file}: expected rows by Triton {triton.__version__}, got {record['versions']['triton']}"
            )
        rows += [Compiled(**{k: v for k, v in row.items() if k != "faults"}) for row in record["rows"]]
    return rows


def other_versions(files):
    """Findings of other versions of Triton, from what their runs wrote: one file or several of each version."""
    rows = {}
    for file in files:
        record = json.loads(file.read_text())
        rows.setdefault(record["versions"]["triton"], []).extend(record["rows"])
    return [line for version in rows for line in findings(version, rows[version])]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=sorted(NAMES))
    parser.add_argument("--quick", action="store_true", help="one variant per operation and precision")
    parser.add_argument("--json", type=Path, help="write rows there instead of the table")
    parser.add_argument(
        "--rows",
        type=Path,
        action="append",
        help="JSON of earlier runs to write the table of, instead of compiling",
    )
    parser.add_argument(
        "--also", type=Path, action="append", default=[], help="JSON of another version's run, for the table"
    )
    options = parser.parse_args(arguments)

    import triton

    if triton.knobs.runtime.interpret:
        sys.exit("bench/reports/aot.py: unset TRITON_INTERPRET, the interpreter does not compile")
    from bench.lib.aot import compile_all

    if options.rows:
        rows = read_rows(options.rows)
    else:
        rows = compile_all(options.target or list(NAMES), options.quick)
    targets = dict.fromkeys(r.target for r in rows)
    plain = [r.row() for r in rows]
    if options.json:
        found = records.record(plain, packages=["triton"], show=False)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    else:
        lines = [
            "# The Triton kernels, compiled ahead of time",
            "",
            f"Written by `python -m bench.reports.aot` with Triton {triton.__version__}, Python {platform.python_version()}. "
            "No GPU was involved: registers, spills, shared memory and instructions are read from the machine "
            "code (cuobjdump; AMD's assembly). Occupancy is resident warps over the most a multiprocessor takes. "
            "IEEE float32 has no matrix instruction on NVIDIA. Bytes and FLOP are of one step of one program.",
            "",
            "A fault is a spill, shared memory over the target's, or no matrix instruction or 16-byte load where one is "
            "expected. Unaligned: nothing is known of pointers, sizes and strides, so loads are narrow and more "
            "addresses are held.",
            "",
            *findings(triton.__version__, plain),
            *other_versions(options.also),
        ]
        lines += ["## Predicted times (roofline, not measured)", ""]
        lines += [
            "Least time at the published peak rates and bandwidth, and what limits it. fp16 and fp16x3 use matrix "
            "units; cost_rows adds the time of its picks on the ordinary units.",
            "",
            *predictions(),
        ]
        for target in targets:
            lines += [
                "",
                f"## {target} ({NAMES[target]})",
                "",
                *table([r for r in rows if r.target == target]),
            ]
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text("\n".join(lines) + "\n")
        print(RESULTS)
    print("\n".join(findings(triton.__version__, plain)).rstrip())
    return 1 if any(r.faults for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
