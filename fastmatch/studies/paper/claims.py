"""The paper's claims, judged from the numbers of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

__all__ = ["Claim", "judge"]

Record = dict[str, Any]
Case = tuple[str, bool, str]
"""(what was measured, whether the claim is true for it, the numbers)."""


@dataclass(frozen=True)
class Claim:
    """One claim and its outcome.

    Attributes:
        claim: what the paper says, in a sentence.
        rule: what must be true in every case for the claim to hold.
        holds: whether the rule is true in every case; None if the run has no case.
        true: number of cases in which the rule is true.
        cases: number of cases.
        numbers: of every case.
        seeds: of the run.
    """

    claim: str
    rule: str
    holds: bool | None
    true: int
    cases: int
    numbers: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        if self.holds is None:
            return "not measured"
        return "holds" if self.holds else "does not hold here"


def judge(record: Record) -> list[Claim]:
    """Judge every claim; numbers are means over the run's seeds."""
    claims = []
    for claim, rule, cases in _CLAIMS:
        found = list(cases(record))
        true = sum(ok for _, ok, _ in found)
        claims.append(
            Claim(
                claim, rule, true == len(found) if found else None, true, len(found),
                tuple(f"{where}: {numbers}{'' if ok else ' (no)'}" for where, ok, numbers in found),
                tuple(record["seeds"]),
            )
        )  # fmt: skip
    return claims


def _mean(rows: Iterable[Record], column: str, **where: Any) -> float | None:
    """Return the mean of a column over the rows that match; None if there are none."""
    values = [row[column] for row in rows if all(row[k] == v for k, v in where.items())]
    return fmean(values) if values else None


def _networks(record: Record, **where: Any) -> list[str]:
    rows = record["curves"]
    names = dict.fromkeys(r["network"] for r in rows if all(r[k] == v for k, v in where.items()))
    return list(names)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _automatic(norm: str | None, kind: str) -> str:
    """Return the method that the paper recommends for a network of the study."""
    if norm == "BN":
        return "reset"
    return "repair" if norm == "LN" or kind == "ResNet" else "rescale"


def _compare(
    record: Record,
    column: str,
    less: dict[str, Any],
    more: dict[str, Any],
    *,
    margin: float = 0.0,
    **where: Any,
) -> Iterable[Case]:
    """Yield for every network at the largest width whether ``column`` is smaller under ``less`` than under ``more``."""
    width = max(record["widths"])
    for name in _networks(record, **where):
        low = _mean(record["curves"], column, network=name, width=width, **less)
        high = _mean(record["curves"], column, network=name, width=width, **more)
        if low is not None and high is not None:
            yield name, low < high + margin, f"{_percent(low)} against {_percent(high)}"


def _matching(how: str) -> Callable[[Record], Iterable[Case]]:
    def cases(record: Record) -> Iterable[Case]:
        return _compare(
            record, "accuracy barrier", {"matched": how, "renormalized": "none"},
            {"matched": "naive", "renormalized": "none"},
        )  # fmt: skip

    return cases


def _width(record: Record) -> Iterable[Case]:
    narrow, wide = min(record["widths"]), max(record["widths"])
    if narrow == wide:
        return
    for name in _networks(record):
        row = next(r for r in record["curves"] if r["network"] == name)
        method = _automatic(row["norm"], row["kind"])
        at = [
            _mean(
                record["curves"],
                "accuracy barrier",
                network=name,
                width=w,
                matched="weights",
                renormalized=method,
            )
            for w in (narrow, wide)
        ]
        if at[0] is not None and at[1] is not None:
            yield name, at[1] < at[0], f"{_percent(at[0])} at x{narrow}, {_percent(at[1])} at x{wide}"


def _collapse(record: Record) -> Iterable[Case]:
    for name in _networks(record):
        hidden = _hidden(record, name, "naive")
        if hidden:
            ratio = fmean(r["variance ratio"] for r in hidden)
            yield name, ratio < 0.9, f"{ratio:.3f}"


def _hidden(record: Record, network: str, model: str) -> list[Record]:
    """Return the layers between the first, which sees the same inputs in both networks, and the classifier."""
    rows = [r for r in record["layers"] if r["network"] == network and r["model"] == model]
    last = max((r["depth"] for r in rows), default=0)
    return [r for r in rows if 1 < r["depth"] < last]


def _vanishing(record: Record) -> Iterable[Case]:
    for name in _networks(record, norm=None):
        rows = [r for r in record["layers"] if r["network"] == name and r["model"] == "naive"]
        if rows:
            depths = (min(r["depth"] for r in rows), max(r["depth"] for r in rows))
            first, last = (fmean(r["feature ratio"] for r in rows if r["depth"] == d) for d in depths)
            yield name, last < first, f"{first:.3f} at the first layer, {last:.3f} at the last"


def _restored(record: Record) -> Iterable[Case]:
    for name in _networks(record):
        before, after = (_hidden(record, name, m) for m in ("weights", "weights, renormalized"))
        if before and after:
            off = [fmean(abs(r["variance ratio"] - 1) for r in rows) for rows in (before, after)]
            yield name, off[1] < off[0], f"off by {off[0]:.3f} before, {off[1]:.3f} after"


def _method_helps(method: str, **where: Any) -> Callable[[Record], Iterable[Case]]:
    def cases(record: Record) -> Iterable[Case]:
        return _compare(
            record, "midpoint accuracy", {"matched": "weights", "renormalized": "none"},
            {"matched": "weights", "renormalized": method}, **where,
        )  # fmt: skip

    return cases


def _rescale_beats_repair(record: Record) -> Iterable[Case]:
    return _compare(
        record, "midpoint accuracy", {"matched": "weights", "renormalized": "repair"},
        {"matched": "weights", "renormalized": "rescale"}, norm=None, kind="VGG",
    )  # fmt: skip


def _bias_like_rescale(record: Record) -> Iterable[Case]:
    return _compare(
        record, "midpoint accuracy", {"matched": "weights", "renormalized": "rescale"},
        {"matched": "weights", "renormalized": "bias"}, margin=0.05, norm=None, kind="VGG",
    )  # fmt: skip


def _pruning(record: Record) -> Iterable[Case]:
    for name in dict.fromkeys(r["network"] for r in record["pruning"]):
        for sparsity in sorted({r["sparsity"] for r in record["pruning"] if r["sparsity"] >= 0.9}):
            where = {"network": name, "sparsity": sparsity}
            plain = _mean(record["pruning"], "accuracy", **where)
            renewed = _mean(record["pruning"], "renormalized accuracy", **where)
            if plain is not None and renewed is not None:
                yield f"{name} at {sparsity}", renewed > plain, f"{_percent(plain)} to {_percent(renewed)}"


def _planted(record: Record) -> Iterable[Case]:
    for row in record["planted"]:
        yield row["network"], row["wrong"] == 0, f"{row['wrong']} of {row['units']} units wrong"


_BARRIER = "accuracy barrier, matched < naive, at the largest width"
_MIDPOINT = "midpoint accuracy of the weight-matched merge, {} > without, at the largest width"

_CLAIMS: tuple[tuple[str, str, Callable[[Record], Iterable[Case]]], ...] = (
    ("Weight matching lowers the barrier.", _BARRIER, _matching("weights")),
    ("Activation matching lowers the barrier.", _BARRIER, _matching("activations")),
    (
        "Wider networks have lower barriers.",
        "accuracy barrier, weight-matched and renormalized as the paper recommends: widest < narrowest",
        _width,
    ),
    (
        "Merging makes activations' variance collapse.",
        "variance of the naive midpoint over the ends', mean of hidden layers, < 0.9",
        _collapse,
    ),
    (
        "Features vanish with depth in plain networks.",
        "|z(x) - z(0)| of the naive midpoint over the ends', last layer < first layer",
        _vanishing,
    ),
    (
        "Renormalization brings the variance back.",
        "|variance ratio - 1| of the weight-matched midpoint, mean of hidden layers: smaller after",
        _restored,
    ),
    ("REPAIR mends plain networks.", _MIDPOINT.format("REPAIR"), _method_helps("repair", norm=None)),
    ("RESCALE mends plain networks.", _MIDPOINT.format("RESCALE"), _method_helps("rescale", norm=None)),
    (
        "RESCALE does better than REPAIR on a plain VGG.",
        "midpoint accuracy of the weight-matched merge, RESCALE > REPAIR, at the largest width",
        _rescale_beats_repair,
    ),
    (
        "Bias normalization mends plain networks without data.",
        _MIDPOINT.format("bias normalization"),
        _method_helps("bias", norm=None),
    ),
    (
        "Bias normalization comes close to RESCALE on a plain VGG.",
        "midpoint accuracy of the weight-matched merge, bias normalization > RESCALE - 5 points",
        _bias_like_rescale,
    ),
    ("RESET mends networks with batch norm.", _MIDPOINT.format("RESET"), _method_helps("reset", norm="BN")),
    (
        "REPAIR mends networks with layer norm.",
        _MIDPOINT.format("REPAIR"),
        _method_helps("repair", norm="LN"),
    ),
    (
        "Renormalization recovers accuracy lost to pruning.",
        "accuracy at sparsity 0.9 and above, renormalized as the paper recommends > pruned alone",
        _pruning,
    ),
    (
        "A planted permutation of a retrained sibling is recovered.",
        "no unit wrong after weight matching",
        _planted,
    ),
)
