"""The study's figures and its HTML report, one file with embedded pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

from fastmatch.studies.paper.claims import Claim
from fastmatch.studies.paper.figures import three_figures
from fastmatch.studies.paper.verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["counts", "picture", "report"]

Record = dict[str, Any]

COLOURS = {
    "none": "#888888", "repair": "#1b9e77", "rescale": "#7570b3", "reshift": "#e7298a", "reset": "#1f78b4",
    "bias": "#d95f02",
}  # fmt: skip
MATCHED = {"naive": ":", "weights": "-", "activations": "--"}

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { border-bottom: 1px solid #ddd; padding: .3em .7em;
text-align: left; vertical-align: top } .holds { color: #17733f; font-weight: 600 } .not { color: #b3261e;
font-weight: 600 } img { max-width: 100% } summary { cursor: pointer } small { color: #666 }
"""


def _figure(record: Record, draw: Callable[[Axes, Record, str], None], title: str) -> Figure:
    """Draw one panel per network."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r["network"] for r in record["curves"]))
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.0 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    entries: dict[str, Any] = {}
    for ax, name in zip(panels, names, strict=False):
        draw(ax, record, name)
        ax.set_title(name, fontsize=10)
        ax.grid(alpha=0.25)
        entries |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    for ax in panels[len(names) :]:
        ax.set_axis_off()
    figure.legend(entries.values(), entries, loc="outside lower center", ncol=6, fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def _rows(table: list[Record], **where: Any) -> list[Record]:
    return [row for row in table if all(row[k] == v for k, v in where.items())]


def _average(rows: list[Record], column: str) -> float:
    return sum(row[column] for row in rows) / len(rows)


def _draw_curves(ax: Axes, record: Record, name: str) -> None:
    width, seed = max(record["widths"]), record["seeds"][0]
    for row in _rows(record["curves"], network=name, width=width, seed=seed):
        if row["matched"] == "naive" and row["renormalized"] != "none":
            continue
        ax.plot(
            row["positions"], row["top-1"], MATCHED[row["matched"]], color=COLOURS[row["renormalized"]], lw=1.2,
            label=f"{row['matched']}, {row['renormalized']}",
        )  # fmt: skip
    ax.set_xlabel("λ")
    ax.set_ylabel("test accuracy")


def _draw_layers(ax: Axes, record: Record, name: str) -> None:
    rows = _rows(record["layers"], network=name, seed=record["seeds"][0])
    for model in dict.fromkeys(r["model"] for r in rows if r["model"] not in ("a", "b")):
        mine = [r for r in rows if r["model"] == model]
        matched = model.partition(",")[0]
        colour = COLOURS["repair" if model.endswith("renormalized") else "none"]
        ax.plot(
            [r["depth"] for r in mine], [r["variance ratio"] for r in mine], MATCHED[matched], color=colour,
            marker=".", label=model,
        )  # fmt: skip
    ax.axhline(1, color="black", lw=0.6)
    ax.set_xlabel("layer")
    ax.set_ylabel("variance over the ends'")


def _draw_pruning(ax: Axes, record: Record, name: str) -> None:
    rows = _rows(record["pruning"], network=name)
    at = sorted({r["sparsity"] for r in rows})
    for column, label, colour in (
        ("accuracy", "pruned", COLOURS["none"]), ("renormalized accuracy", "renormalized", COLOURS["repair"]),
    ):  # fmt: skip
        values = [_average([r for r in rows if r["sparsity"] == s], column) for s in at]
        ax.plot(at, values, marker=".", label=label, color=colour)
    ax.set_xlabel("sparsity")
    ax.set_ylabel("test accuracy")


def picture(record: Record) -> Figure:
    """Draw the accuracy barrier of every network, matched and renormalized in every way: one map per width."""
    from matplotlib.figure import Figure

    curves, widths = record["curves"], sorted(record["widths"])
    names = list(dict.fromkeys(row["network"] for row in curves))
    kinds = [
        (matched, method) for matched in MATCHED for method in COLOURS
        if (matched != "naive" or method == "none") and _rows(curves, matched=matched, renormalized=method)
    ]  # fmt: skip
    size = 1.5 + 0.48 * len(kinds) * len(widths), 1.7 + 0.32 * len(names)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(widths), squeeze=False, sharey=True)[0]
    for ax, width in zip(panels, widths, strict=True):
        _draw_map(ax, _rows(curves, width=width), names, kinds)
        ax.set_title(f"width x{width}", fontsize=10, pad=22)
    panels[0].set_yticks(range(len(names)), names)
    figure.suptitle("Accuracy barrier in points, the lowest of each network in bold", fontsize=11)
    return figure


def _draw_map(ax: Axes, curves: list[Record], names: list[str], kinds: list[tuple[str, str]]) -> None:
    """Draw a row per network and a column per kind of merge, (matched by, renormalized by)."""
    values = [
        [_barrier(_rows(curves, network=name, matched=matched, renormalized=method)) for matched, method in kinds]
        for name in names
    ]  # fmt: skip
    ax.imshow(values, cmap="YlOrRd", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(values):
        known = {j: x for j, x in enumerate(row) if x == x}
        for j, x in known.items():
            ax.text(
                j, i, f"{100 * x:.0f}", ha="center", va="center", fontsize=8,
                color="white" if x > 0.6 else "black", weight="bold" if x == min(known.values()) else "normal",
            )  # fmt: skip
    ax.set_xticks(range(len(kinds)), [method if method != "none" else "as merged" for _, method in kinds])
    ax.tick_params(axis="x", labelrotation=60, length=0, labelsize=8)
    ax.tick_params(axis="y", length=0, labelsize=9)
    ax.spines[:].set_visible(False)
    for matched in dict.fromkeys(matched for matched, _ in kinds):
        at = [j for j, (kind, _) in enumerate(kinds) if kind == matched]
        ax.axvline(at[-1] + 0.5, color="white", lw=3)
        word = "no match" if matched == "naive" else matched
        ax.text(sum(at) / len(at), -0.75, word, ha="center", fontsize=8, rotation=0 if len(at) > 1 else 25)


def _barrier(rows: list[Record]) -> float:
    """Return the mean barrier of some rows; NaN where a network has no such renormalization."""
    return _average(rows, "accuracy barrier") if rows else float("nan")


def _image(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def counts(claim: Claim) -> str:
    """Return the number of cases with each verdict in words."""
    found = claim.counts
    return (
        ", ".join(f"{verdict}: {found[verdict]}" for verdict in get_args(Verdict) if found[verdict])
        or "no case"
    )


def _claims(record: Record) -> str:
    lines = ["<table><tr><th>claim</th><th>here</th><th>cases</th><th>rule and numbers</th></tr>"]
    for entry in record["claims"]:
        claim = Claim(**entry)
        style = {"holds": "holds", "does not hold": "not"}.get(claim.verdict, "")
        numbers = "<br>".join(
            html.escape(f"{case['where']}: {case['verdict']}. {case['numbers']}") for case in claim.cases
        )
        lines.append(
            f'<tr><td>{html.escape(claim.claim)}</td><td class="{style}">{claim.verdict}</td>'
            f"<td>{counts(claim)}</td><td>{html.escape(claim.rule)}"
            f"<details><summary>numbers</summary><small>{numbers}</small></details></td></tr>"
        )
    return "\n".join([*lines, "</table>"])


def _all_curves(record: Record) -> str:
    columns = (
        "network", "width", "seed", "matched", "renormalized", "loss barrier", "accuracy barrier",
        "midpoint accuracy", "ends accuracy",
    )  # fmt: skip
    head = "".join(f"<th>{c}</th>" for c in columns)
    lines = [f"<details><summary>every curve</summary><table><tr>{head}</tr>"]
    for row in record["curves"]:
        cells = (f"{row[c]:.4f}" if isinstance(row[c], float) else str(row[c]) for c in columns)
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</table></details>"])


def _first_figures(record: Record) -> str:
    return "".join(
        f"<tr><td><b>{html.escape(figure)}</b></td><td>{html.escape(what)}</td></tr>"
        for figure, what in three_figures(record)
    )


def report(record: Record) -> str:
    """Return the report as one HTML page."""
    machine, seconds, samples = record["machine"], record["seconds"], record["samples"]
    figures = [
        _figure(
            record,
            _draw_curves,
            f"Accuracy on the line between the two networks, width x{max(record['widths'])}",
        ),
        picture(record),
        _figure(record, _draw_layers, "Variance of the midpoint merges, layer by layer"),
        _figure(record, _draw_pruning, "Layer-wise magnitude pruning"),
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>fastmatch study</title><style>{STYLE}</style></head><body>
<h1>Model re-basin and renormalization, the claims in small</h1>
<table>{_first_figures(record)}</table>
<p>{html.escape(record["data"])}: {samples["train"]} train and {samples["test"]} test samples, calibrated on
{samples["calibration"]}; widths x{", x".join(map(str, record["widths"]))}; seeds {record["seeds"]};
{record["points"]} points per curve. Calibration is sequential for merges and joint for pruned networks.
{seconds["wall"]} s ({seconds["processor"]} s of processor time) on {machine["cores"]} cores of
{html.escape(machine["processor"])}, torch {html.escape(machine["torch"])}, Python {machine["python"]}.
Claims are judged by code from the numbers below, for these small networks and data only. A case is one network; its
differences are paired by seed. In brackets: 95% confidence intervals over seeds, of one case at a time. A case
"holds" if the interval lies above the least difference that counts, "does not hold" if it lies below, and is "undecided"
otherwise. A claim holds if it holds in every case with something to mend.</p>
{_claims(record)}
{"".join(_image(figure) for figure in figures)}
{_all_curves(record)}
</body></html>
"""
