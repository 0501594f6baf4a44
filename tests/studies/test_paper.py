"""The study: everything is measured, the report holds it, datasets of the user's run."""

from __future__ import annotations

import copy
import html
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from fastmatch.cli.main import main
from fastmatch.cli.studies import claims_table
from fastmatch.studies import paper as study
from fastmatch.studies.networks import NETWORKS, Network
from fastmatch.studies.paper import measure
from fastmatch.studies.paper.figures import three_figures
from fastmatch.studies.paper.page import page
from fastmatch.studies.paper.report import report
from helpers.networks import fresh_seed


@pytest.fixture(scope="module")
def sets():
    return tuple(TensorDataset(torch.randn(n, 1, 8, 8), torch.arange(n) % 4) for n in (160, 60))


@pytest.fixture(scope="module")
def record(tmp_path_factory, sets):
    out = tmp_path_factory.mktemp("study")
    made = study.run(
        out,
        data=sets,
        networks=["MLP", "MLP, BN"],
        widths=(1, 2),
        seeds=(0,),
        points=3,
        epochs=1,
        progress=False,
    )
    return made, out


def test_every_configuration_is_measured_and_the_files_hold_it(record):
    made, out = record
    saved = json.loads((out / "study.json").read_text())
    assert saved == made
    found = {(r["network"], r["width"], r["matched"], r["renormalized"]) for r in made["curves"]}
    assert found == {
        (name, width, matched, method)
        for name in ("MLP", "MLP, BN")
        for width in (1, 2)
        for matched in ("naive", "weights", "activations")
        for method in ("none", *NETWORKS[name].methods)
    }
    assert {r["sparsity"] for r in made["pruning"]} >= {0.5, 0.95}
    assert [r["start_at"] for r in made["partial"]] == [0, 1, 2]
    assert [(r["network"], r["mode"]) for r in made["modes"]] == [
        (name, mode) for name in ("MLP", "MLP, BN") for mode in ("joint", "sequential")
    ]
    assert all(r["moved"] > 0 for r in made["planted"])
    shown = (out / "study.html").read_text()
    assert shown.count("data:image/png;base64,") == 4
    for claim in made["claims"]:
        assert html.escape(claim["claim"]) in shown
    assert (out / "study.md").read_text() == page(made)
    assert (out / "study.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_digits_are_the_default(tmp_path):
    made = study.run(tmp_path, networks=["VGG, BN"], widths=(4,), seeds=range(5), points=3, progress=False)
    assert made["data"] == "scikit-learn digits"
    assert made["samples"] == {"train": 1348, "test": 449, "calibration": 512}
    assert verdicts(made)["RESET mends networks with batch norm."] == "holds"


def verdicts(record):
    return {c.claim: c.verdict for c in study.judge(record)}


def test_one_seed_decides_nothing(record):
    assert set(verdicts(record[0]).values()) <= {"undecided", "not measured", "does not hold"}
    assert "0 of " in claims_table(record[0])


def test_calibration_and_test_samples_are_apart(tmp_path):
    images = torch.randn(40, 1, 8, 8)
    labels = torch.arange(40) % 4
    sets = TensorDataset(images[:30], labels[:30]), TensorDataset(images[28:], labels[28:])
    with pytest.raises(ValueError, match="apart from the training images; 2 of 12 are the same"):
        study.run(tmp_path, data=sets, networks=["MLP"], widths=(1,), progress=False)


def test_layers_are_measured_on_test_samples(tmp_path, monkeypatch):
    seen = []
    original = measure.layer_table

    def spy(models, data, **options):
        seen.append(data)
        return original(models, data, **options)

    monkeypatch.setattr(measure, "layer_table", spy)
    sets = tuple(TensorDataset(torch.randn(n, 1, 8, 8), torch.arange(n) % 4) for n in (40, 20))
    made = study.run(
        tmp_path,
        data=sets,
        networks=["MLP, BN"],
        widths=(1,),
        seeds=(0,),
        points=3,
        epochs=1,
        progress=False,
    )
    assert [len(data.inputs) for data in seen] == [20]
    assert made["chance"] == 0.25


def test_processes_measure_the_same(tmp_path, record, sets):
    one, _ = record
    assert one["machine"]["processes"] == 1
    two = study.run(
        tmp_path,
        data=sets,
        networks=["MLP"],
        widths=(1, 2),
        seeds=(0,),
        points=3,
        epochs=1,
        processes=2,
        progress=False,
    )
    assert two["machine"]["processes"] == 2
    assert two["machine"]["threads"] == 1
    assert two["seconds"]["processor"] > two["seconds"]["wall"] / 10, "the processes' time counts"
    for table in measure.TABLES:
        assert two[table] == [row for row in one[table] if row["network"] == "MLP"]


@pytest.mark.parametrize("processes", [0, -1])
def test_processes_are_at_least_one(tmp_path, processes):
    with pytest.raises(ValueError, match=f"processes: expected at least 1; got {processes}"):
        study.run(tmp_path / "out", processes=processes)
    assert not (tmp_path / "out").exists()


def test_the_page_shows_every_verdict(record):
    made = copy.deepcopy(record[0])
    made["claims"] = [
        {
            "claim": v,
            "rule": "a rule",
            "verdict": v,
            "cases": [{"where": "here", "verdict": v, "numbers": "+1"}],
        }
        for v in ("holds", "does not hold", "undecided", "not measured")
    ]
    shown = report(made)
    for words in ("holds: 1", "does not hold: 1", "undecided: 1", "here: undecided. +1"):
        assert words in shown


def test_claims_without_a_case_are_not_measured(record):
    assert verdicts(record[0])["REPAIR mends networks with layer norm."] == "not measured"


def test_a_dataset_of_the_users_runs_from_the_shell(tmp_path, monkeypatch, capsys):
    torch.manual_seed(fresh_seed())
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\n"
        "def sets():\n    return [TensorDataset(torch.randn(n, 3, 9, 9), torch.arange(n) % 4) for n in (60, 30)]\n"
        "def flat():\n    return [TensorDataset(torch.randn(n, 81), torch.arange(n) % 4) for n in (60, 30)]\n"
        "def one():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = [
        "study",
        "--networks",
        "VGG, LN",
        "--widths",
        "1",
        "--seeds",
        "0",
        "--points",
        "3",
        "--epochs",
        "1",
        "--data",
    ]
    assert main([*arguments, "mine:sets"]) == 0
    assert "REPAIR mends networks with layer norm." in capsys.readouterr().out
    assert json.loads((tmp_path / "study/study.json").read_text())["samples"]["test"] == 30
    for name, message in (
        ("mine:flat", "expected images (C, H, W)"), ("mine:one", "expected (train, test) torch datasets"),
        ("none:sets", "--data: no module 'none'"),
    ):  # fmt: skip
        assert main([*arguments, name]) == 2
        assert message in capsys.readouterr().err
    sys.modules.pop("mine", None)


def test_bad_input(tmp_path):
    for change, message in (
        ({"networks": ["AlexNet"]}, "networks: expected some of"),
        ({"points": 4}, "points: expected an odd number"),
        ({"widths": (0, 1)}, "widths: expected different positive numbers"),
        (
            {"data": (TensorDataset(torch.zeros(3)),) * 2},
            r"expected \(image, label\) samples in the train set",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            study.run(tmp_path, **change)


def test_the_docs_show_the_committed_run():
    root = Path(__file__).parents[2]
    committed = json.loads((root / "bench/results/study.json").read_text())
    assert [{**vars(c), "cases": list(c.cases)} for c in study.judge(committed)] == committed["claims"]
    assert claims_table(committed) in (root / "docs/guides/analysis.md").read_text()
    text = (root / "bench/results/study.md").read_text()
    assert text == page(committed)
    sections = re.findall(r"bench/results/study.md:(\w+)", (root / "docs/paper.md").read_text())
    assert len(sections) > 4
    for name in sections:
        assert f"[start:{name}]" in text


def test_a_page_leads_with_three_figures():
    committed = json.loads((Path(__file__).parents[2] / "bench/results/study.json").read_text())
    (midpoints, _), (pruned, _), (claims, rest) = three_figures(committed)
    rows = [
        r
        for r in committed["curves"]
        if (r["width"], r["matched"], r["renormalized"]) == (4, "naive", "none")
    ]
    assert midpoints.startswith(f"{100 * sum(r['midpoint accuracy'] for r in rows) / len(rows):.1f}% → ")
    assert pruned.count("%") == 2
    assert (
        claims == f"{sum(c['verdict'] == 'holds' for c in committed['claims'])} of {len(committed['claims'])}"
    )
    assert " do not hold" in rest
    lines = page(committed).splitlines()
    assert lines[2] == "| figure | what it is |"
    assert f"**{midpoints}**" in lines[4]
    committed["curves"], committed["pruning"] = [], []
    assert len(three_figures(committed)) == 1


@pytest.mark.slow
def test_the_page_of_the_committed_run_leads_with_its_figures():
    committed = json.loads((Path(__file__).parents[2] / "bench/results/study.json").read_text())
    assert html.escape(three_figures(committed)[0][0]) in report(committed)


def test_published_figures_stand_beside_those_of_the_run(record):
    made = copy.deepcopy(record[0])
    made["curves"] = [
        {
            "network": "VGG", "width": 2, "seed": seed, "matched": "weights", "renormalized": "repair",
            "midpoint accuracy": 0.5 + 0.1 * seed, "ends accuracy": 0.9,
        }
        for seed in (0, 1)
    ]  # fmt: skip
    assert "| plain VGG, weights, REPAIR | 64.6 | 55.0 ± 7.1 |" in page(made)
    assert "| VGG with batch norm, weights, RESET | 87.9 |  |" in page(made)


@pytest.mark.parametrize(("kind", "norm"), [("ResNet", "LN"), ("Linear", "BN"), ("Chain", "LN")])
def test_networks_without_this_norm_are_refused(kind, norm):
    with pytest.raises(ValueError, match="norm: expected one of"):
        Network(kind, norm, 1)


def test_the_chain_is_the_resnet_without_its_shortcuts():
    x = torch.randn(2, 1, 8, 8)
    with_shortcuts, without = (NETWORKS[n].make(1, (1, 8, 8), 10) for n in ("ResNet", "ResNet, no shortcuts"))

    def shapes(model):
        found = [m.weight.shape for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
        return sorted(shape for shape in found if shape[2:] == (3, 3))

    assert shapes(with_shortcuts) == shapes(without)
    assert with_shortcuts(x).shape == without(x).shape == (2, 10)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in with_shortcuts.modules())


def test_the_deep_linear_network_is_affine():
    net = NETWORKS["Deep linear"].make(1, (1, 8, 8), 10).double()
    x, y = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(net((x + y) / 2), (net(x) + net(y)) / 2)
