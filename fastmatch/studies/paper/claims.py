"""The paper's claims, judged from the numbers of one run.

A case is one network (at one width or sparsity). What is compared is paired by seed: both sides of a difference come from
the same pair of networks. A case is left out if the fault that the claim is about does not occur in it, and a
network that answers at chance has recovered nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fastmatch.studies.paper.verdict import FEWEST_SEEDS, Effect, Verdict, combined, effect, overall

__all__ = ["Claim", "judge"]

Record = dict[str, Any]
Series = dict[int, float]
"""One number per seed."""
Case = dict[str, str]
"""``where`` it was measured, its ``verdict``, and the ``numbers`` in words."""

POINT = 0.01
"""The least difference of accuracies that counts."""
GAP = 0.02
"""A merge or a pruned network that loses less than this has nothing to mend."""
FLOOR = 0.05
"""A network must be this much better than chance."""
CLOSE = 0.05
"""Two methods are close if they differ by less than this."""
ALIKE = 0.02
"""Two ways to calibrate agree if they differ by less than this."""
RESTORED = 0.1
"""The variance is restored if its ratio to the endpoints' is this close to 1."""
OCTAVE = 0.1
"""The least difference of binary logarithms of ratios that counts: 7%."""


@dataclass(frozen=True)
class Claim:
    """One claim and its outcome.

    Attributes:
        claim: what the paper says, in a sentence.
        rule: what must be true in every case for the claim to hold.
        verdict: of all cases together, see :func:`fastmatch.studies.paper.verdict.overall`.
        cases: of the run.
    """

    claim: str
    rule: str
    verdict: Verdict
    cases: tuple[Case, ...]

    @property
    def counts(self) -> Mapping[str, int]:
        """Verdict -> number of cases."""
        return Counter(case["verdict"] for case in self.cases)


def judge(record: Record) -> list[Claim]:
    """Judge every claim."""
    claims = []
    for claim, rule, cases in _CLAIMS:
        found = tuple(cases(record))
        verdict = overall(case["verdict"] for case in found)  # pyright: ignore[reportArgumentType]
        claims.append(Claim(claim, rule, verdict, found))
    return claims


# Series of the run.


def _series(table: Iterable[Record], column: str, **where: Any) -> Series:
    """Return seed -> the column's value in the row that matches; the mean, if several rows do."""
    values: dict[int, list[float]] = {}
    for row in table:
        if all(row[k] == v for k, v in where.items()):
            values.setdefault(row["seed"], []).append(row[column])
    return {seed: fmean(found) for seed, found in values.items()}


def _curves(record: Record, column: str, network: str, matched: str, method: str, width: int | None = None):
    return _series(
        record["curves"], column, network=network, matched=matched, renormalized=method,
        width=max(record["widths"]) if width is None else width,
    )  # fmt: skip


def _minus(more: Series, less: Series | float) -> list[float]:
    """Return the paired differences, in the order of the seeds."""
    other = less if isinstance(less, dict) else dict.fromkeys(more, less)
    return [more[seed] - other[seed] for seed in sorted(more) if seed in other]


def _networks(table: Iterable[Record], **where: Any) -> dict[str, str | None]:
    """Return network -> norm of the networks with a row that matches."""
    return {r["network"]: r["norm"] for r in table if all(r[k] == v for k, v in where.items())}


# Cases.


def _case(where: str, effects: Iterable[Effect], *, void: bool = False, scale: float = 100) -> Case:
    """Return a case in words; ``scale`` 100 shows points of accuracy."""
    effects = list(effects)
    numbers = "; ".join(
        f"{e.name} {_signed(scale * e.mean)}"
        + (f" [{_signed(scale * e.low)}, {_signed(scale * e.high)}]" if math.isfinite(e.low) else "")
        + f" > {scale * e.least:g}"
        for e in effects
    )
    return {
        "where": where,
        "verdict": "nothing to mend" if void else combined(effects),
        "numbers": numbers,
    }


def _signed(value: float) -> str:
    """Return three digits and the sign; what is only rounding is 0."""
    return f"{round(value, 6) + 0.0:+.3g}"


def _recovery(record: Record, where: str, after: Series, before: Series, whole: Series) -> Iterable[Case]:
    """Yield whether ``after`` is better than ``before`` and than chance, where ``before`` has lost something."""
    gain, gap = _minus(after, before), _minus(whole, before)
    if gain and gap:
        floor = _minus(after, float(record["chance"]))
        effects = (effect("gain", gain, POINT), effect("above chance", floor, FLOOR))
        yield _case(where, effects, void=fmean(gap) < GAP)


def _neutral(norm: str | None) -> str:
    """Return what every merge gets before matchings are compared: a merge with batch norm means nothing without RESET."""
    return "reset" if norm == "BN" else "none"


def _matching(how: str) -> Callable[[Record], Iterable[Case]]:
    def cases(record: Record) -> Iterable[Case]:
        for name, norm in _networks(record["curves"]).items():
            method = _neutral(norm)
            naive, matched = (_curves(record, "accuracy barrier", name, m, method) for m in ("naive", how))
            lowered = _minus(naive, matched)
            floor = _minus(_curves(record, "midpoint accuracy", name, how, method), float(record["chance"]))
            if lowered:
                effects = (effect("barrier lowered by", lowered, POINT), effect("above chance", floor, FLOOR))
                yield _case(name, effects, void=fmean(naive.values()) < GAP)

    return cases


def _width(record: Record) -> Iterable[Case]:
    narrow, wide = min(record["widths"]), max(record["widths"])
    if narrow == wide:
        return
    for name, norm in _networks(record["curves"]).items():
        at = [_curves(record, "accuracy barrier", name, "weights", _neutral(norm), w) for w in (narrow, wide)]
        lowered = _minus(at[0], at[1])
        if lowered:
            effects = (effect(f"barrier at x{narrow} - at x{wide}", lowered, POINT),)
            yield _case(name, effects, void=fmean(at[0].values()) < GAP)


def _hidden(record: Record, network: str) -> list[int]:
    """Return the depths between the first layer, which sees the same inputs in both networks, and the classifier."""
    depths = sorted({r["depth"] for r in record["layers"] if r["network"] == network})
    return depths[1:-1]


def _octaves(record: Record, column: str, network: str, model: str, depth: int) -> Series:
    ratios = _series(record["layers"], column, network=network, model=model, depth=depth)
    return {seed: math.log2(max(ratio, 2.0**-40)) for seed, ratio in ratios.items()}


def _falls(column: str, **where: Any) -> Callable[[Record], Iterable[Case]]:
    """Judge whether a ratio to the endpoints falls from the first hidden layer to the last."""

    def cases(record: Record) -> Iterable[Case]:
        for name in _networks(record["layers"], **where):
            depths = _hidden(record, name)
            if len(depths) > 1:
                first, last = (_octaves(record, column, name, "weights", depths[k]) for k in (0, -1))
                yield _case(name, [effect("octaves lost", _minus(first, last), OCTAVE)], scale=1)

    return cases


def _matching_keeps_variance(record: Record) -> Iterable[Case]:
    for name in _networks(record["layers"]):
        depths = _hidden(record, name)
        if depths:
            naive, matched = (
                _octaves(record, "variance ratio", name, m, depths[-1]) for m in ("naive", "weights")
            )
            yield _case(name, [effect("octaves kept", _minus(matched, naive), OCTAVE)], scale=1)


def _shortcuts_keep_features(record: Record) -> Iterable[Case]:
    names = _networks(record["layers"])
    for name in names:
        other = f"{name}, no shortcuts"
        if other in names:
            depth = _hidden(record, name)[-1], _hidden(record, other)[-1]
            kept, lost = (
                _octaves(record, "feature ratio", n, "weights", d)
                for n, d in zip((name, other), depth, strict=True)
            )
            yield _case(name, [effect("octaves kept", _minus(kept, lost), OCTAVE)], scale=1)


def _restored(record: Record) -> Iterable[Case]:
    for name in _networks(record["layers"]):
        depths = _hidden(record, name)
        if not depths:
            continue
        before, after = (
            _series(record["layers"], "variance ratio", network=name, model=m, depth=depths[-1])
            for m in ("weights", "weights, renormalized")
        )
        left = [RESTORED - abs(ratio - 1) for _, ratio in sorted(after.items())]
        if left:
            void = max(abs(ratio - 1) for ratio in before.values()) < RESTORED
            yield _case(name, [effect(f"{RESTORED} - |variance ratio - 1|", left, 0.0)], void=void, scale=1)


def _method_helps(method: str, **where: Any) -> Callable[[Record], Iterable[Case]]:
    def cases(record: Record) -> Iterable[Case]:
        for name in _networks(record["curves"], **where):
            before, after = (
                _curves(record, "midpoint accuracy", name, "weights", m) for m in ("none", method)
            )
            ends = _curves(record, "ends accuracy", name, "weights", "none")
            yield from _recovery(record, name, after, before, ends)

    return cases


def _plain_vgg(record: Record) -> Iterable[tuple[str, dict[str, Series]]]:
    """Yield the plain VGGs with the midpoint accuracy of each method."""
    for name in _networks(record["curves"], norm=None, kind="VGG"):
        methods = ("none", "repair", "rescale", "bias")
        yield name, {m: _curves(record, "midpoint accuracy", name, "weights", m) for m in methods}


def _rescale_beats_repair(record: Record) -> Iterable[Case]:
    for name, at in _plain_vgg(record):
        effects = (
            effect("RESCALE - REPAIR", _minus(at["rescale"], at["repair"]), POINT),
            effect("RESCALE above chance", _minus(at["rescale"], float(record["chance"])), FLOOR),
        )
        yield _case(name, effects)


def _bias_like_rescale(record: Record) -> Iterable[Case]:
    for name, at in _plain_vgg(record):
        effects = (
            effect("RESCALE's gain", _minus(at["rescale"], at["none"]), POINT),
            effect("bias normalization's gain", _minus(at["bias"], at["none"]), POINT),
            effect("bias normalization - RESCALE", _minus(at["bias"], at["rescale"]), -CLOSE),
        )
        yield _case(name, effects)


def _pruning(record: Record) -> Iterable[Case]:
    table = record["pruning"]
    for name in _networks(table):
        for sparsity in sorted(
            {r["sparsity"] for r in table if r["network"] == name and r["sparsity"] >= 0.9}
        ):
            plain, renewed, dense = (
                _series(table, column, network=name, sparsity=sparsity)
                for column in ("accuracy", "renormalized accuracy", "dense accuracy")
            )
            yield from _recovery(record, f"{name} at {sparsity}", renewed, plain, dense)


def _planted(record: Record) -> Iterable[Case]:
    """Yield whether every unit is found in every run; here the claim is about all of them, not about a mean."""
    for name in _networks(record["planted"]):
        rows = [r for r in record["planted"] if r["network"] == name]
        wrong, units, moved = (sum(r[key] for r in rows) for key in ("wrong", "units", "moved"))
        enough = len({r["seed"] for r in rows}) >= FEWEST_SEEDS
        verdict = (
            "not measured" if moved == 0 else "does not hold" if wrong else "holds" if enough else "undecided"
        )
        yield {
            "where": name,
            "verdict": verdict,
            "numbers": f"{wrong} of {units} units wrong, {moved} were moved, {len(rows)} seeds",
        }


def _modes_agree(record: Record) -> Iterable[Case]:
    for name in _networks(record["modes"]):
        sequential, joint = (
            _series(record["modes"], "accuracy", network=name, mode=mode) for mode in ("sequential", "joint")
        )
        difference = _minus(sequential, joint)
        effects = (
            effect("sequential - joint", difference, -ALIKE),
            effect("joint - sequential", [-d for d in difference], -ALIKE),
        )
        yield _case(name, effects)


def _preserve_first(record: Record) -> Iterable[Case]:
    table = record["partial"]
    for name in _networks(table):
        starts = sorted({r["start_at"] for r in table if r["network"] == name})
        whole = _series(table, "accuracy", network=name, start_at=starts[0])
        ends = _series(table, "ends accuracy", network=name, start_at=starts[0])
        for start in starts[1:]:
            kept = _series(table, "accuracy", network=name, start_at=start)
            yield from _recovery(record, f"{name}, start_at {start}", kept, whole, ends)


_BARRIER = (
    "accuracy barrier, naive - matched > 1 point, and the matched midpoint more than 5 points above chance, at the "
    "largest width; networks with batch norm are RESET on both sides; left out where the naive barrier is below 2 points"
)
_RECOVERY = "{}: accuracy after - before > 1 point, and more than 5 points above chance; left out where less than 2 points are lost"
_MIDPOINT = _RECOVERY.format("weight-matched midpoint with and without {}, at the largest width")

_CLAIMS: tuple[tuple[str, str, Callable[[Record], Iterable[Case]]], ...] = (
    ("Weight matching lowers the barrier.", _BARRIER, _matching("weights")),
    ("Activation matching lowers the barrier.", _BARRIER, _matching("activations")),
    (
        "Wider networks have lower barriers.",
        "accuracy barrier, weight-matched, with batch norm after RESET: narrowest - widest > 1 point; left out where the "
        "narrowest has a barrier below 2 points",
        _width,
    ),
    (
        "The variance of a merge's activations collapses with depth.",
        "variance over the ends', weight-matched midpoint, test samples: log2 at the first hidden layer - at the last > 0.1",
        _falls("variance ratio"),
    ),
    (
        "Matching keeps the variance that a naive merge loses.",
        "log2 of the variance over the ends', last hidden layer, test samples: matched - naive > 0.1",
        _matching_keeps_variance,
    ),
    (
        "Features vanish with depth in plain networks.",
        "|z(x) - z(0)| over the ends', weight-matched midpoint, test samples: log2 at the first hidden layer - at the last > 0.1",
        _falls("feature ratio", norm=None),
    ),
    (
        "Residual connections keep features from vanishing.",
        "log2 of |z(x) - z(0)| over the ends', last hidden layer of the weight-matched midpoint: with shortcuts - without > 0.1",
        _shortcuts_keep_features,
    ),
    (
        "Renormalization brings the variance back on new samples.",
        "variance over the ends', last hidden layer of the weight-matched midpoint after REPAIR (RESET with batch norm), "
        "test samples: within 0.1 of 1; left out where it was before",
        _restored,
    ),
    ("REPAIR mends plain networks.", _MIDPOINT.format("REPAIR"), _method_helps("repair", norm=None)),
    ("RESCALE mends plain networks.", _MIDPOINT.format("RESCALE"), _method_helps("rescale", norm=None)),
    (
        "RESCALE does better than REPAIR on a plain VGG.",
        "weight-matched midpoint: RESCALE - REPAIR > 1 point, and RESCALE more than 5 points above chance",
        _rescale_beats_repair,
    ),
    (
        "Bias normalization mends plain networks without data.",
        _MIDPOINT.format("bias normalization"),
        _method_helps("bias", norm=None),
    ),
    (
        "Bias normalization comes close to RESCALE on a plain VGG.",
        "weight-matched midpoint: each gains more than 1 point, and bias normalization - RESCALE > -5 points",
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
        _RECOVERY.format('layer-wise magnitude pruning to 0.9 and above, method "auto"'),
        _pruning,
    ),
    (
        "Keeping the first layers apart mends plain networks.",
        _RECOVERY.format(
            "activation-matched partial merge, from a later group against from the first, not renormalized"
        ),
        _preserve_first,
    ),
    (
        "Joint and sequential calibration agree.",
        "weight-matched midpoint after REPAIR: the accuracies differ by less than 2 points either way",
        _modes_agree,
    ),
    (
        "A planted permutation of a retrained sibling is recovered.",
        "no unit wrong after weight matching, in any run",
        _planted,
    ),
)
