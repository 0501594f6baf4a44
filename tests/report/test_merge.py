"""The report of a merge: what it lost, and what a renormalization brings back."""

from __future__ import annotations

import pytest
import torch

import fastmatch as fm
from helpers.browser import faults
from helpers.examples import namespace


@pytest.fixture(scope="module")
def names():
    found = namespace()
    a, b = found["model_a"], found["model_b"]
    merged = fm.merge([a, b], [0.25, 0.75])
    return {**found, "merged": merged, "repaired": fm.renormalize(merged, [a, b], found["loader"], "repair")}


def table(report, title):
    return next(found for found in report.tables if found.title == title)


def test_losses_and_variances_are_those_of_the_library(names):
    ends, data = [names["model_a"], names["model_b"]], names["test_loader"]
    report = fm.merge_report(names["merged"], ends, data, renormalized=names["repaired"], names=["a", "b"])
    assert report.subtitle == "0.25 of a, 0.75 of b"
    tiles = {tile.label: tile for tile in report.tiles}
    before, after = (fm.score(names[key], data) for key in ("merged", "repaired"))
    assert (tiles["Loss"].before, tiles["Loss"].value) == (f"{before.loss:.3g}", f"{after.loss:.3g}")
    assert tiles["Accuracy"].value == f"{100 * after.accuracy:.1f}%"
    models = {"a": ends[0], "b": ends[1], "m": names["merged"]}
    expected = fm.layer_table(models, data, endpoints=["a", "b"], weights=[0.25, 0.75]).where(model="m")
    rows = table(report, "How much the layers still vary").rows
    assert [row.before for row in rows] == expected.column("variance ratio")
    assert [row.name for row in rows] == expected.column("layer")


def test_without_data_the_weights_are_compared(names):
    states = [names[key].state_dict() for key in ("model_a", "model_b")]
    merged = fm.merge(states)
    report = fm.merge_report(merged, states)
    sizes = {row.name: row.after for row in table(report, "How large the weights are").rows}
    norms = [state["4.weight"].norm() for state in states]
    assert sizes["4.weight"] == pytest.approx(float(2 * merged["4.weight"].norm() / sum(norms)), rel=1e-5)
    cosines = {row.name: row.after for row in table(report, "How alike the endpoints are").rows}
    expected = torch.cosine_similarity(states[0]["9.weight"].flatten(), states[1]["9.weight"].flatten(), 0)
    assert cosines["9.weight"] == pytest.approx(float(expected), abs=1e-5)
    assert "1.weight" not in sizes  # scales of norms are alike in all networks
    assert max(map(len, str(report).splitlines())) <= 80


def test_what_does_not_fit_is_refused(names):
    a, b, merged = names["model_a"], names["model_b"], names["merged"]
    with pytest.raises(ValueError, match="endpoints: expected at least one"):
        fm.merge_report(merged, [])
    with pytest.raises(ValueError, match="names: expected 2"):
        fm.merge_report(merged, [a, b], names=["a"])
    with pytest.raises(ValueError, match="weights: expected 2"):
        fm.merge_report(merged, [a, b], weights=[1.0])
    with pytest.raises(TypeError, match="merge: expected a torch module"):
        fm.merge_report(merged.state_dict(), [a, b], names["test_loader"])
    with pytest.raises(ValueError, match="architectures must be equal"):
        fm.merge_report(merged, [a, torch.nn.Linear(2, 2)])


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_overflows(names, tmp_path, width):
    ends = [names["model_a"], names["model_b"]]
    fm.merge_report(names["merged"], ends, names["test_loader"]).save(tmp_path / "merge.html")
    assert faults([tmp_path / "merge.html"], width, tmp_path) == {}


def test_names_may_be_those_of_the_stages_or_alike(names):
    ends, data = [names["model_a"], names["model_b"]], names["test_loader"]
    plain = fm.merge_report(names["merged"], ends, data)
    named = fm.merge_report(names["merged"], ends, data, names=["merge", "merge"])
    assert named.tiles == plain.tiles
    assert named.subtitle == "0.25 of merge, 0.75 of merge"


def test_layers_of_constant_outputs_are_not_measured():
    def net():
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).eval()

    dead = net()
    with torch.no_grad():
        for parameter in dead.parameters():
            parameter.zero_()
    report = fm.merge_report(dead, [dead], [torch.randn(8, 3)])
    assert [row.after for row in table(report, "How much the layers still vary").rows] == [None, None]
    assert "could be measured" in str(report)
    assert "nan" not in report.html()
