"""The three figures that say most about a study."""

from __future__ import annotations

from collections import Counter
from statistics import fmean
from typing import Any

__all__ = ["three_figures"]

Record = dict[str, Any]


def three_figures(record: Record) -> list[tuple[str, str]]:
    """Return (figure, what it says) of a study: what matching and renormalization do, what pruning keeps, and how many claims hold."""
    found = [_midpoints(record), _pruned(record), _claims(record)]
    return [figure for figure in found if figure is not None]


def _percent(values: list[float]) -> str:
    return f"{100 * fmean(values):.1f}%"


def _midpoints(record: Record) -> tuple[str, str] | None:
    width = max(record["widths"])
    rows = [r for r in record["curves"] if r["width"] == width]
    pairs = (("naive", "none"), ("weights", "none"), ("weights", "repair"))
    means = [
        [r["midpoint accuracy"] for r in rows if (r["matched"], r["renormalized"]) == pair] for pair in pairs
    ]
    if not all(means):
        return None
    naive, matched, repaired = map(_percent, means)
    networks = len({r["network"] for r in rows})
    what = (
        f"mean accuracy of the average of two networks: not matched, matched by weights, and with REPAIR. The networks themselves have "
        f"{_percent([r['ends accuracy'] for r in rows])} ({networks} kinds of networks, width x{width})"
    )
    return f"{naive} → {matched} → {repaired}", what


def _pruned(record: Record) -> tuple[str, str] | None:
    rows = record["pruning"]
    if not rows:
        return None
    alone, renormalized = (
        _percent([r[name] for r in rows]) for name in ("accuracy", "renormalized accuracy")
    )
    sparsities = sorted({r["sparsity"] for r in rows})
    what = (
        f"mean accuracy of pruned networks, alone and renormalized; {_percent([r['dense accuracy'] for r in rows])} before pruning "
        f"(sparsity {', '.join(map(str, sparsities))})"
    )
    return f"{alone} → {renormalized}", what


def _claims(record: Record) -> tuple[str, str]:
    count = Counter(claim["verdict"] for claim in record["claims"])
    others = ", ".join(f"{count[v]} {v.replace('does', 'do')}" for v in count if v != "holds")
    return (
        f"{count['holds']} of {count.total()}",
        f"claims of the paper hold for these networks and data ({others or 'no other verdict'})",
    )
