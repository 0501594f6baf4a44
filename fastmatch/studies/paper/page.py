"""The study's tables as a Markdown page, in sections that the documentation includes."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

from fastmatch.studies.paper.claims import Claim
from fastmatch.studies.paper.figures import three_figures
from fastmatch.studies.paper.report import counts

__all__ = ["page"]

Record = dict[str, Any]

COLUMNS = (
    ("naive", "none"), ("weights", "none"), ("activations", "none"), ("weights", "repair"), ("weights", "rescale"),
    ("weights", "bias"), ("naive", "reset"), ("weights", "reset"), ("activations", "reset"), ("activations", "repair"),
)  # fmt: skip
"""(matching, renormalization) of the table of midpoints."""


PUBLISHED = (
    ("plain VGG, weights", "10.5", ("VGG", "weights", "none")),
    ("plain VGG, weights, REPAIR", "64.6", ("VGG", "weights", "repair")),
    ("plain VGG, weights, RESCALE", "84.5", ("VGG", "weights", "rescale")),
    ("plain VGG, weights, bias normalization", "83.8", ("VGG", "weights", "bias")),
    ("VGG with batch norm, weights, RESET", "87.9", ("VGG, BN", "weights", "reset")),
    ("ResNet with batch norm, naive", "10.4", ("ResNet, BN", "naive", "none")),
    ("ResNet with batch norm, weights", "15.2", ("ResNet, BN", "weights", "none")),
    ("ResNet with batch norm, weights, RESET", "81.4", ("ResNet, BN", "weights", "reset")),
)
"""(midpoint, test accuracy on CIFAR-10 in the authors' notebooks, what is nearest to it in the study)."""

PUBLISHED_PRUNING = (
    ("VGG with layer norm, sparsity 0.9", "72.6 to 91.7", ("VGG, LN", 0.9)),
    ("VGG with layer norm, sparsity 0.95", "10 to 88.0", ("VGG, LN", 0.95)),
    ("VGG with batch norm, sparsity 0.8", "23.6 to 92.0", ("VGG, BN", 0.8)),
)


def page(record: Record) -> str:
    """Return the page ``study.md``: three figures and the run, then accuracies, claims, pruning, and layers kept apart."""
    machine, seconds, samples = record["machine"], record["seconds"], record["samples"]
    run = (
        f"Written by `fastmatch study`. {record['data']}: {samples['train']} training samples, of which the first "
        f"{samples['calibration']} calibrate, and {samples['test']} others to test; widths x{', x'.join(map(str, record['widths']))}; "
        f"{len(record['seeds'])} pairs of networks of each kind and width; {record['points']} points per curve. Calibration is sequential "
        f"for merges and joint for pruned networks. {seconds['wall']:.0f} s "
        f"({seconds['processor']:.0f} s of processor time) on {machine['cores']} shared cores, {machine['processes']} processes of "
        f"{machine['threads']} torch threads, torch "
        f"{machine['torch']}, Python {machine['python']}."
    )
    figures = _table(["figure", "what it is"], [[f"**{x}**", what] for x, what in three_figures(record)])
    parts = ["# The paper's claims in small", figures, run]
    for name, text in (
        ("published", _published(record)), ("accuracies", _accuracies(record)), ("claims", _claims(record)), ("pruning", _pruning(record)),
        ("apart", _apart(record)), ("cases", _cases(record)),
    ):  # fmt: skip
        parts.append(f"<!-- --8<-- [start:{name}] -->\n{text}\n<!-- --8<-- [end:{name}] -->")
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mean(values: list[float]) -> str:
    """Return the mean over seeds in percent, with the standard deviation between them."""
    if not values:
        return ""
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{spread}"


def _published(record: Record) -> str:
    width = max(record["widths"])
    rows = []
    for what, figure, (name, matched, method) in PUBLISHED:
        key = {"network": name, "width": width, "matched": matched, "renormalized": method}
        own = [r for r in record["curves"] if all(r[k] == v for k, v in key.items())]
        rows.append([what, figure, _mean([r["midpoint accuracy"] for r in own])])
    for what, figure, (name, sparsity) in PUBLISHED_PRUNING:
        own = [r for r in record["pruning"] if r["network"] == name and r["sparsity"] == sparsity]
        rows.append([what, figure, _before_and_after(own)])
    return _table(["what", "published", "here"], rows)


def _before_and_after(rows: list[Record]) -> str:
    """Return the mean accuracies of pruned networks, alone and renormalized."""
    if not rows:
        return ""
    return " to ".join(
        f"{100 * fmean(r[column] for r in rows):.1f}" for column in ("accuracy", "renormalized accuracy")
    )


def _accuracies(record: Record) -> str:
    """Return the accuracy of every midpoint at the largest width, networks by matchings and renormalizations."""
    width = max(record["widths"])
    rows = []
    for name in dict.fromkeys(r["network"] for r in record["curves"]):
        own = [r for r in record["curves"] if r["network"] == name and r["width"] == width]
        ends = [r["ends accuracy"] for r in own if (r["matched"], r["renormalized"]) == ("naive", "none")]
        cells = [
            _mean([r["midpoint accuracy"] for r in own if (r["matched"], r["renormalized"]) == key])
            for key in COLUMNS
        ]
        rows.append([name, _mean(ends), *cells])
    head = [matched if method == "none" else f"{matched}, {method}" for matched, method in COLUMNS]
    return _table([f"network, x{width}", "ends", *head], rows)


def _claims(record: Record) -> str:
    rows = [[c.claim, f"**{c.verdict}**", counts(c)] for c in (Claim(**entry) for entry in record["claims"])]
    return _table(["claim", "here", "cases"], rows)


def _cases(record: Record) -> str:
    parts = [
        "## Every case\n\nMean differences and their 95% intervals over seeds, and the least that counts; in points of accuracy or in the "
        "rule's unit."
    ]
    for claim in (Claim(**entry) for entry in record["claims"]):
        lines = "\n".join(f"- {c['where']}: {c['verdict']}. {c['numbers']}" for c in claim.cases)
        parts.append(f"### {claim.claim}\n\nRule: {claim.rule}.\n\n{lines}".rstrip())
    return "\n\n".join(parts)


def _pruning(record: Record) -> str:
    at = sorted({r["sparsity"] for r in record["pruning"]})
    rows = []
    for name in dict.fromkeys(r["network"] for r in record["pruning"]):
        own = [r for r in record["pruning"] if r["network"] == name]
        cells = [_before_and_after([r for r in own if r["sparsity"] == s]) for s in at]
        rows.append([name, f"{100 * fmean(r['dense accuracy'] for r in own):.1f}", *cells])
    return _table(["network", "dense", *(f"sparsity {s}" for s in at)], rows)


def _apart(record: Record) -> str:
    """Return the accuracies of partial merges, with their sizes."""
    starts = sorted({r["start_at"] for r in record["partial"]})
    rows = []
    for name in dict.fromkeys(r["network"] for r in record["partial"]):
        own = [r for r in record["partial"] if r["network"] == name]
        cells = []
        for start in starts:
            chosen = [r for r in own if r["start_at"] == start]
            size = fmean(r["parameters"] for r in chosen)
            cells.append(f"{_mean([r['accuracy'] for r in chosen])} ({size:.2f})")
        rows.append([name, *cells])
    return _table(["network", *(f"start_at {s}" for s in starts)], rows)
