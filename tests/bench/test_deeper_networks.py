"""The report of deeper networks on small random data: which merges and corrections it compares, and its page."""

from __future__ import annotations

import pytest
import torch

from bench.lib.mnist import DEEP, SHAPE, of_classes, vgg10
from bench.reports import deeper_networks as report
from fastmatch.studies.digits import Batches
from helpers.networks import fresh_seed


def samples(count: int) -> Batches:
    return Batches(torch.randn(count, *SHAPE), torch.arange(count) % 10, 32)


def pair(name: str) -> report.Pair:
    torch.manual_seed(fresh_seed())
    a, b = (DEEP[name].build(1).eval() for _ in range(2))
    return report.Pair(a, b, DEEP[name], samples(80), samples(40))


@pytest.mark.slow
def test_midpoints_are_of_every_matching_and_correction():
    rows = list(report.midpoints(pair("MLP")))
    assert len(rows) == 2 + 3 * 6, "two ends, three matchings, six corrections"
    assert all(0 <= row["accuracy"] <= 1 for row in rows)


def test_networks_with_batch_norm_are_reset():
    assert "reset" in pair("VGG10, BN").corrections()
    assert "reset" not in pair("MLP").corrections()


def test_parts_are_merged_by_every_rule_and_the_page_has_their_means():
    rows = [{"network": "MLP", "width": 1, "seed": 0, **row} for row in report.parts(pair("MLP"))]
    assert {(row["matched"], row["start_at"]) for row in rows} == {
        (rule, start) for rule in report.RULES for start in report.STARTS
    }
    second = [{**row, "seed": 1, "accuracy": row["accuracy"] + 0.2} for row in rows]
    found = {
        "machine": {"cpu": "a processor"},
        "versions": {"python": "3"},
        "settings": {"calibration": 8},
        "rows": rows + second,
    }
    text = report.page(found)
    cells = next(line for line in text.splitlines() if line.startswith("| MLP | x1 | zip, 0 |"))
    first = next(
        row["accuracy"]
        for row in rows
        if (row["matched"], row["start_at"], row["corrected"]) == ("zip", 0, "none")
    )
    assert f"{100 * first + 10:.1f} ± 14.1" in cells


def test_samples_are_spread_over_sorted_data_and_classes_are_counted_from_zero():
    data = samples(100)
    data.targets = data.targets.sort().values
    assert report.first(data, 10).targets.tolist() == list(range(10))
    half = of_classes(data, 5, 10)
    assert (half.targets.min().item(), half.targets.max().item(), len(half.inputs)) == (0, 4, 50)


def test_a_deep_vgg_tells_inputs_apart_before_it_is_trained():
    torch.manual_seed(fresh_seed())
    with torch.no_grad():
        outputs = vgg10(16)(torch.randn(64, *SHAPE))
    assert float(outputs.std(0).mean()) > 0.01 * float(outputs.abs().mean()), (
        "torch's own initialization: below 0.001"
    )
