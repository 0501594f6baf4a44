"""One page from a run of the suites: plots of time and memory, ratios, fitted exponents, the machine.

    python -m bench.reports.suites RUN.json

RUN.json is what pytest-benchmark or ``fastmatch bench`` wrote. ``--compare`` adds the change against an earlier run.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fastmatch.cli.bench import combined

OURS = "fastmatch"
SUITES = ("assignment", "families", "gains", "moments", "matching", "renorm", "apply", "end-to-end", "growth")
README = {("matching", "seconds"): "bench_matching.png", ("growth", "seconds"): "bench_growth.png"}
"""Plots that are also kept as pictures, for the README and the documentation."""

PANELS = 60
"""Instances of a suite that are drawn at most. A suite of more is told by its tables."""

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}img{max-width:100%}
.good{color:#06662c}.bad{color:#a11}"""


def read_run(file: Path) -> dict[str, Any]:
    """Read what ``fastmatch bench`` kept, or what pytest-benchmark wrote."""
    run = json.loads(file.read_text())
    return run if "runs" in run else combined(run, None)


def rows_of(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the row of every benchmark, by suite, instance and size. ``number`` is the run's."""
    numbers = {time: number for number, time in enumerate(run["runs"], start=1)}
    rows = [b["extra_info"] for b in run["benchmarks"] if "suite" in b["extra_info"]]
    rows = [row | {"number": numbers[row["run"]]} for row in rows]
    return sorted(rows, key=lambda r: (SUITES.index(r["suite"]), r["instance"], r["size"]))


def lines_of(
    rows: Iterable[dict[str, Any]], suite: str, field: str
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Return the points (size, value) of one suite by instance and solver. ``field`` is ``seconds`` or ``peak_mb``."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row["suite"] == suite:
            for solver, value in row[field].items():
                if value:
                    lines.setdefault((row["instance"], solver), []).append((row["size"], value))
    return lines


def exponent(points: list[tuple[float, float]]) -> float | None:
    """Return the slope on log-log axes over the larger half of the sizes, or None for fewer than three sizes."""
    if len(points) < 3:
        return None
    sizes, values = np.log(np.array(sorted(points)[-max(3, len(points) // 2 + 1) :]).T)
    return float(np.polyfit(sizes, values, 1)[0])


def figure(rows: list[dict[str, Any]], suite: str, field: str) -> Figure:
    """Draw one suite on log-log axes, one panel per instance."""
    lines = lines_of(rows, suite, field)
    instances = list(dict.fromkeys(instance for instance, _ in lines))
    columns = 2 if len(instances) == 4 else min(len(instances), 3)
    height = -(-len(instances) // columns)
    drawn = Figure(figsize=(4.2 * columns, 3.4 * height), layout="constrained")
    panels = drawn.subplots(height, columns, squeeze=False).flatten()
    for panel in panels[len(instances) :]:
        panel.axis("off")
    for panel, instance in zip(panels, instances, strict=False):
        for (name, solver), points in lines.items():
            if name == instance:
                style = {"linewidth": 2.5, "color": "black"} if solver == OURS else {"linewidth": 1}
                panel.plot(*zip(*sorted(points), strict=True), marker=".", label=solver, **style)
        along = next(r["along"] for r in rows if r["suite"] == suite and r["instance"] == instance)
        panel.set(xscale="log", yscale="log", title=instance, xlabel=along)
        panel.set_ylabel("seconds" if field == "seconds" else "peak MB above the start")
        panel.set_xticks(
            sorted({r["size"] for r in rows if r["suite"] == suite and r["instance"] == instance})
        )
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
    return drawn


def ratio_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return suite, instance, size, fastmatch's time and memory, neurons per second, and each peer's time over it."""
    table = [
        ["suite", "instance", "size", "run", "seconds", "peak MB", "neurons/s", "passes", "peer / fastmatch"]
    ]
    for row in rows:
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items())
        peak = row["peak_mb"][OURS]
        table.append(
            [row["suite"], row["instance"], f"{row['size']:g}", str(row["number"]), f"{row['seconds'][OURS]:.4g}",
             "-" if peak is None else f"{peak:.0f}",
             f"{row['neurons_per_second']:.3g}" if "neurons_per_second" in row else "-",
             str(row.get("passes", "-")), ratios or "-"]
        )  # fmt: skip
    return table


def extremes_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return the worst and the best row of each suite: the fastest peer's time over fastmatch's."""
    table = [["suite", "rows", "worst", "of", "best", "of", "geometric mean"]]
    for suite in SUITES:
        found = sorted(
            (min(row["ratios"].values()), f"{row['instance']}, {row['size']:g}")
            for row in rows
            if row["suite"] == suite and row["ratios"]
        )
        if found:
            mean = float(np.exp(np.mean(np.log([ratio for ratio, _ in found]))))
            (worst, slow), (best, fast) = found[0], found[-1]
            table.append([suite, str(len(found)), f"{worst:.2f}", slow, f"{best:.2f}", fast, f"{mean:.2f}"])
    return table


def three_figures(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return a table of what says most: whole tasks, the matching of weights, and the row that does worst."""
    table = [["figure", "what it is"]]
    for suite, part, what in (
        ("end-to-end", "", "whole tasks: the time of the fastest other way over fastmatch's"),
        ("matching", ", weights", "weight matching: the time of the published algorithm in torch or numpy, whichever is faster, over fastmatch's"),
    ):  # fmt: skip
        found = [
            min(r["ratios"].values())
            for r in rows
            if r["suite"] == suite and part in r["instance"] and r["ratios"]
        ]
        if found:
            mean = float(np.exp(np.mean(np.log(found))))
            spread = f"{min(found):.1f} to {max(found):.1f} in {len(found)} rows"
            table.append([f"**{mean:.1f} times**", f"{what}; geometric mean, {spread}"])
    least = sorted(
        (min(r["ratios"].values()), r["suite"], r["instance"], r["size"]) for r in rows if r["ratios"]
    )
    if least:
        slower = sum(ratio < 1 for ratio, *_ in least)
        worst, suite, instance, size = least[0]
        what = f"rows in which a peer, or a part of the work alone, takes less time; the worst is {suite}: {instance}, {size:g}, at {worst:.2f}"
        table.append([f"**{slower} of {len(least)}**", what])
    return table


def markdown(run: dict[str, Any]) -> str:
    """Return the page of the committed run: three figures, the machine, and all tables."""
    rows = rows_of(run)
    extremes = "The fastest peer's time over fastmatch's, by suite. Some peers do a part of the work alone, as a bound."
    return (
        f"# Suites against other libraries\n\n{as_markdown(three_figures(rows))}\n{machine_text(run)}\n\n{extremes}\n\n"
        f"{as_markdown(extremes_table(rows))}\n{as_markdown(ratio_table(rows))}\n{as_markdown(growth_table(rows))}"
    )


def growth_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return the fitted exponents of time and memory, and that of the time outside of the gain's product."""
    table = [["suite", "instance", "solver", "time ~ size^", "memory ~ size^"]]
    for suite in SUITES:
        times, memory = (lines_of(rows, suite, field) for field in ("seconds", "peak_mb"))
        for key, points in times.items():
            fits = exponent(points), exponent(memory.get(key, []))
            if fits[0] is not None:
                table.append([suite, *key, *("-" if f is None else f"{f:.2f}" for f in fits)])
    beside = [(r["size"], r["beside_seconds"]) for r in rows if "beside_seconds" in r]
    fit = exponent(beside)
    if fit is not None:
        table.append(["growth", "one sweep of one layer", "all but the gain's product", f"{fit:.2f}", "-"])
    return table


def comparison(rows: list[dict[str, Any]], earlier: list[dict[str, Any]]) -> list[list[str]]:
    """Return fastmatch's time and ratios then and now, for rows that both runs have."""
    before = {(r["suite"], r["instance"], r["size"]): r for r in earlier}
    table = [["suite", "instance", "size", "seconds then", "now", "then / now", "ratios then", "now"]]
    for row in rows:
        old = before.get((row["suite"], row["instance"], row["size"]))
        if old is not None:
            then, now = old["seconds"][OURS], row["seconds"][OURS]
            ratios = [", ".join(f"{k} {v:.2f}" for k, v in r["ratios"].items()) for r in (old, row)]
            table.append(
                [
                    row["suite"],
                    row["instance"],
                    f"{row['size']:g}",
                    f"{then:.4g}",
                    f"{now:.4g}",
                    f"{then / now:.2f}",
                    *ratios,
                ]
            )
    return table


def machine_text(run: dict[str, Any]) -> str:
    """Return one paragraph per machine: its versions, and the runs on it, numbered as in the table."""
    runs_on: dict[str, list[str]] = {}
    for number, (time, info) in enumerate(run["runs"].items(), start=1):
        versions = ", ".join(f"{k} {v}" for k, v in info["versions"].items())
        text = f"{info['cpu']}, {info['cores']} cores, {info['torch_threads']} torch threads; {versions}"
        small = ", small sizes (--quick)" if info["quick"] else ""
        runs_on.setdefault(text, []).append(
            f"run {number} of {time[:16]}, load {info['load']:.1f} at its start{small}"
        )
    return "\n\n".join(f"{text}. R{'; '.join(runs)[1:]}." for text, runs in runs_on.items())


def machines(run: dict[str, Any]) -> list[str]:
    """Return one HTML paragraph per machine."""
    return [f"<p>{html.escape(text)}</p>" for text in machine_text(run).split("\n\n")]


def as_html(table: list[list[str]]) -> str:
    head, *body = ([html.escape(cell) for cell in row] for row in table)
    lines = ["<tr>" + "".join(f"<th>{c}</th>" for c in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in body]
    return "<table>" + "\n".join(lines) + "</table>"


def as_markdown(table: list[list[str]]) -> str:
    head, *body = table
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body]) + "\n"


def page(run: dict[str, Any], earlier: dict[str, Any] | None, pictures: Path | None) -> str:
    """Return the HTML with its plots. Those of :data:`README` are also written to ``pictures``."""
    rows = rows_of(run)
    parts = [
        "<!doctype html><meta charset='utf-8'><title>fastmatch benchmarks</title>", f"<style>{STYLE}</style>",
        "<h1>fastmatch benchmarks</h1>", as_html([[cell.strip("*") for cell in line] for line in three_figures(rows)]), *machines(run),
        "<p>Ratios are a peer's time over fastmatch's, paired in one run, medians. Results were checked equal, or "
        "no worse, before they were timed.</p>",
    ]  # fmt: skip
    parts += ["<h2>Fastest peer / fastmatch</h2>", as_html(extremes_table(rows))]
    parts += ["<h2>Ratios</h2>", as_html(ratio_table(rows))]
    if earlier is not None:
        parts += ["<h2>Against an earlier run</h2>", *machines(earlier)]
        parts.append(as_html(comparison(rows, rows_of(earlier))))
    parts += [
        "<h2>Growth</h2>",
        "<p>Fitted over the larger half of the sizes.</p>",
        as_html(growth_table(rows)),
    ]
    for suite in dict.fromkeys(row["suite"] for row in rows):
        if len({row["instance"] for row in rows if row["suite"] == suite}) > PANELS:
            continue
        parts.append(f"<h2>{suite}</h2>")
        for field in ("seconds", "peak_mb"):
            if lines_of(rows, suite, field):
                drawn, file = figure(rows, suite, field), io.BytesIO()
                drawn.savefig(file, format="png", dpi=110)
                parts.append(
                    f"<img src='data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}' alt='{suite}'>"
                )
                if pictures is not None and (suite, field) in README:
                    drawn.savefig(pictures / README[suite, field], dpi=110)
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="JSON of a run of the suites")
    parser.add_argument("--compare", type=Path, help="JSON of an earlier run")
    parser.add_argument("--html", type=Path, default=Path("out/bench.html"))
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    parser.add_argument("--pictures", type=Path, help="also write the README's plots into this folder")
    args = parser.parse_args(arguments)
    run = read_run(args.run)
    earlier = read_run(args.compare) if args.compare else None
    args.html.parent.mkdir(parents=True, exist_ok=True)
    args.html.write_text(page(run, earlier, args.pictures))
    if args.markdown:
        args.markdown.write_text(markdown(run))
    print(f"wrote {args.html}")


if __name__ == "__main__":
    main()
