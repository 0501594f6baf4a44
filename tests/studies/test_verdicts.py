"""The study's verdicts on planted numbers: every claim can hold, fail, and stay undecided."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fastmatch.studies.networks import NETWORKS
from fastmatch.studies.paper import claims
from fastmatch.studies.paper.claims import judge
from fastmatch.studies.paper.verdict import combined, effect, overall

SEEDS = range(5)
NOISE = (-0.004, 0.003, 0.0, 0.002, -0.001)
"""Differences between seeds; small against every planted effect."""
Record = dict[str, Any]


def test_an_interval_above_the_least_difference_holds_below_it_does_not_and_across_it_is_undecided():
    assert effect("e", [0.2 + n for n in NOISE], 0.01).verdict == "holds"
    assert effect("e", [0.0 + n for n in NOISE], 0.01).verdict == "does not hold"
    assert effect("e", [-0.2 + n for n in NOISE], 0.01).verdict == "does not hold"
    assert effect("e", [0.3, -0.2, 0.1, -0.1, 0.2], 0.01).verdict == "undecided"


def test_intervals_are_those_of_students_t():
    found = effect("e", [1.0, 2.0, 3.0, 4.0, 5.0], 0.0)
    half = 2.7764451051977934 * math.sqrt(2.5) / math.sqrt(5)
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3.0 - half, 3.0 + half))


def test_intervals_cover_the_true_difference_as_often_as_they_say():
    import random

    generator = random.Random(3)
    covered = sum(
        found.low <= 1.0 <= found.high
        for found in (effect("e", [generator.gauss(1, 2) for _ in range(5)], 0.0) for _ in range(2000))
    )
    assert 0.93 < covered / 2000 < 0.97


@pytest.mark.parametrize("seeds", range(1, 5))
def test_fewer_than_five_seeds_decide_nothing(seeds):
    assert effect("e", [0.9] * seeds, 0.01).verdict == "undecided"


def test_no_difference_at_all_is_no_effect():
    assert effect("e", [0.0] * 5, 0.01).verdict == "does not hold"


@pytest.mark.parametrize("values", [[], [0.1, math.nan], [math.inf]])
def test_differences_that_are_no_numbers_are_refused(values):
    with pytest.raises(ValueError, match="differences: expected at least one, all finite"):
        effect("e", values, 0.0)


def test_a_case_needs_every_effect_and_a_claim_every_case():
    good, bad = effect("e", [0.5] * 5, 0.0), effect("e", [-0.5] * 5, 0.0)
    assert combined([good, good]) == "holds"
    assert combined([good, bad]) == "does not hold"
    assert overall(["holds", "undecided"]) == "undecided"
    assert overall(["holds", "undecided", "does not hold"]) == "does not hold"
    assert overall(["holds", "nothing to mend"]) == "holds"
    assert overall(["nothing to mend"]) == overall([]) == "not measured"


def planted_run(
    *, curve=None, ratio=None, pruning=None, partial=None, modes=None, wrong=0, moved=60, seeds=SEEDS
) -> Record:
    """Return the record of a run in which every claim of the paper holds, with some numbers replaced.

    ``curve(name, matched, method, width)`` is a midpoint accuracy, ``ratio(name, model, depth)`` a ratio to the endpoints;
    the others give an accuracy. The ends are at 0.95, chance is 0.1, and noise is added to every seed.
    """
    curve, ratio = curve or good_curve, ratio or good_ratio
    pruning = pruning or (lambda renewed: 0.9 if renewed else 0.5)
    partial, modes = partial or (lambda start: 0.5 + 0.2 * start), modes or (lambda mode: 0.9)
    tables = ("curves", "layers", "pruning", "planted", "partial", "modes")
    record: Record = {"widths": [1, 4], "seeds": list(seeds), "chance": 0.1, **{t: [] for t in tables}}
    for name, network in NETWORKS.items():
        for seed in seeds:
            noise = NOISE[seed]
            key = {"network": name, "kind": network.kind, "norm": network.norm, "seed": seed}
            record["curves"] += [
                {
                    **key, "width": width, "matched": matched, "renormalized": method, "ends accuracy": 0.95,
                    "midpoint accuracy": (at := curve(name, matched, method, width) + noise), "accuracy barrier": 0.95 - at,
                }
                for width in (1, 4)
                for matched in ("naive", "weights", "activations")
                for method in ("none", *network.methods)
            ]  # fmt: skip
            record["layers"] += [
                {
                    **key, "model": model, "depth": depth,
                    "variance ratio": ratio(name, model, depth) * (1 + noise),
                    "feature ratio": ratio(name, model, depth) * (1 + noise),
                }
                for model in ("naive", "weights", "weights, renormalized")
                for depth in (1, 2, 3, 4)
            ]  # fmt: skip
            record["pruning"] += [
                {
                    **key, "sparsity": sparsity, "accuracy": pruning(False) + noise,
                    "renormalized accuracy": pruning(True) - noise, "dense accuracy": 0.95,
                }
                for sparsity in (0.5, 0.9)
            ]  # fmt: skip
            record["planted"].append({**key, "units": 64, "moved": moved, "wrong": wrong})
            record["modes"] += [
                {**key, "mode": mode, "accuracy": modes(mode) + noise * (mode == "joint")}
                for mode in ("joint", "sequential")
            ]
            if network.norm is None:
                record["partial"] += [
                    {**key, "start_at": start, "accuracy": partial(start) + noise, "ends accuracy": 0.95}
                    for start in (0, 1, 2)
                ]
    return record


def good_curve(name: str, matched: str, method: str, width: int) -> float:
    gain = {"none": 0.0, "reshift": 0.0, "repair": 0.15, "reset": 0.15, "rescale": 0.2, "bias": 0.19}[method]
    return {"naive": 0.2, "weights": 0.5, "activations": 0.55}[matched] + gain + 0.05 * (width == 4)


def good_ratio(name: str, model: str, depth: int) -> float:
    if model.endswith("renormalized"):
        return 1.0
    return (0.3 if model == "naive" else 0.6) ** (depth / (2 if name == "ResNet" else 1))


def verdict(record: Record, claim: str) -> str:
    """Judge one claim: all of them take half a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "_CLAIMS", [entry for entry in claims._CLAIMS if entry[0] == claim])
        (found,) = judge(record)
    return found.verdict


def test_a_run_made_for_the_claims_meets_all_of_them():
    assert {c.claim: c.verdict for c in judge(planted_run())} == {
        c.claim: "holds" for c in judge(planted_run())
    }


@pytest.mark.parametrize("seeds", [2, 4])
def test_few_seeds_decide_no_claim(seeds):
    assert {c.verdict for c in judge(planted_run(seeds=range(seeds)))} == {"undecided"}


def without(*methods: str, at: float | None = None):
    """Return curves in which these methods change nothing, or end at the accuracy ``at``."""

    def curve(name: str, matched: str, method: str, width: int) -> float:
        if method in methods:
            return good_curve(name, matched, "none", width) if at is None else at
        return good_curve(name, matched, method, width)

    return curve


def flat(name: str, model: str, depth: int) -> float:
    return 0.5


COUNTEREXAMPLES: list[tuple[str, str, dict[str, Any]]] = [
    ("Weight matching lowers the barrier.", "changes nothing",
     {"curve": lambda name, matched, method, width: 0.5}),
    ("Weight matching lowers the barrier.", "ends at chance",
     {"curve": lambda name, matched, method, width: 0.05 if matched == "naive" else 0.12}),
    ("Activation matching lowers the barrier.", "does harm",
     {"curve": lambda name, matched, method, width: 0.5 - 0.1 * (matched == "activations")}),
    ("Wider networks have lower barriers.", "no effect of width",
     {"curve": lambda name, matched, method, width: good_curve(name, matched, method, 1)}),
    ("The variance of a merge's activations collapses with depth.", "a constant ratio", {"ratio": flat}),
    ("Matching keeps the variance that a naive merge loses.", "as much as the naive merge", {"ratio": flat}),
    ("Features vanish with depth in plain networks.", "a constant ratio", {"ratio": flat}),
    ("Residual connections keep features from vanishing.", "as in the chain",
     {"ratio": lambda name, model, depth: good_ratio("VGG", model, depth)}),
    ("Renormalization brings the variance back on new samples.", "half way",
     {"ratio": lambda name, model, depth: 0.5 if model.endswith("renormalized") else 0.2}),
    ("Renormalization brings the variance back on new samples.", "too far",
     {"ratio": lambda name, model, depth: 1.5 if model.endswith("renormalized") else 0.2}),
    ("REPAIR mends plain networks.", "changes nothing", {"curve": without("repair")}),
    ("REPAIR mends plain networks.", "from below chance to chance",
     {"curve": lambda name, matched, method, width: 0.12 if method == "repair" else 0.05}),
    ("RESCALE mends plain networks.", "does harm", {"curve": without("rescale", at=0.3)}),
    ("RESCALE does better than REPAIR on a plain VGG.", "the other way round",
     {"curve": without("rescale")}),
    ("RESCALE does better than REPAIR on a plain VGG.", "both at chance",
     {"curve": lambda name, matched, method, width: 0.12 if method == "rescale" else 0.08}),
    ("Bias normalization mends plain networks without data.", "moves nothing", {"curve": without("bias")}),
    ("Bias normalization comes close to RESCALE on a plain VGG.", "neither moves anything",
     {"curve": without("bias", "rescale")}),
    ("Bias normalization comes close to RESCALE on a plain VGG.", "far from it",
     {"curve": without("rescale", at=0.9)}),
    ("RESET mends networks with batch norm.", "changes nothing", {"curve": without("reset")}),
    ("REPAIR mends networks with layer norm.", "changes nothing", {"curve": without("repair")}),
    ("Renormalization recovers accuracy lost to pruning.", "changes nothing", {"pruning": lambda renewed: 0.5}),
    ("Renormalization recovers accuracy lost to pruning.", "ends at chance",
     {"pruning": lambda renewed: 0.12 if renewed else 0.05}),
    ("Keeping the first layers apart mends plain networks.", "changes nothing", {"partial": lambda start: 0.5}),
    ("Joint and sequential calibration agree.", "joint is worse",
     {"modes": lambda mode: 0.9 if mode == "sequential" else 0.8}),
    ("Joint and sequential calibration agree.", "sequential is worse",
     {"modes": lambda mode: 0.9 if mode == "joint" else 0.8}),
    ("A planted permutation of a retrained sibling is recovered.", "one unit is wrong", {"wrong": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("claim", "planted"), [(c, p) for c, _, p in COUNTEREXAMPLES],
                         ids=[f"{c} {why}" for c, why, _ in COUNTEREXAMPLES])  # fmt: skip
def test_a_planted_counterexample_fails(claim, planted):
    assert verdict(planted_run(**planted), claim) == "does not hold"


def test_every_claim_has_a_counterexample():
    assert {c.claim for c in judge(planted_run())} == {claim for claim, _, _ in COUNTEREXAMPLES}


@pytest.mark.parametrize(("claim", "planted"), [
    ("Weight matching lowers the barrier.", {"curve": lambda name, matched, method, width: 0.945}),
    ("REPAIR mends plain networks.", {"curve": lambda name, matched, method, width: 0.945}),
    ("Renormalization brings the variance back on new samples.", {"ratio": lambda name, model, depth: 1.02}),
    ("Renormalization recovers accuracy lost to pruning.", {"pruning": lambda renewed: 0.945}),
    ("A planted permutation of a retrained sibling is recovered.", {"moved": 0}),
])  # fmt: skip
def test_where_nothing_is_broken_nothing_counts_as_mended(claim, planted):
    assert verdict(planted_run(**planted), claim) == "not measured"


def test_networks_with_batch_norm_are_reset_before_matchings_are_compared():
    def at_chance_without_reset(name, matched, method, width):
        return 0.1 if "BN" in name and method != "reset" else good_curve(name, matched, method, width)

    assert (
        verdict(planted_run(curve=at_chance_without_reset), "Weight matching lowers the barrier.") == "holds"
    )

    def reset_alone_helps(name, matched, method, width):
        naive = 0.5 if matched == "naive" and method == "none" else 0.9
        return naive if "BN" in name else good_curve(name, matched, method, width)

    found = judge(planted_run(curve=reset_alone_helps))[0]
    assert {c["verdict"] for c in found.cases if "BN" in c["where"]} == {"does not hold"}


def test_effects_that_change_with_the_seed_are_undecided():
    record = planted_run()
    for row in record["curves"]:
        if row["renormalized"] == "repair":
            row["midpoint accuracy"] = 0.5 + (0.3, -0.2, 0.25, -0.1, 0.2)[row["seed"]]
    assert verdict(record, "REPAIR mends plain networks.") == "undecided"
