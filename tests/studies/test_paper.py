"""The study: claims follow the numbers, the report holds them, datasets of the user's run."""

from __future__ import annotations

import copy
import html
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from fastmatch.cli.main import main
from fastmatch.cli.studies import claims_table
from fastmatch.studies import paper as study
from fastmatch.studies.networks import NETWORKS
from fastmatch.studies.paper.report import report
from helpers.networks import fresh_seed


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    sets = tuple(TensorDataset(torch.randn(n, 1, 8, 8), torch.arange(n) % 4) for n in (160, 60))
    made = study.run(
        out, data=sets, networks=["MLP", "MLP, BN"], widths=(1, 2), points=3, epochs=1, progress=False
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
    page = (out / "study.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    for claim in made["claims"]:
        assert html.escape(claim["claim"]) in page
    assert (out / "study.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_digits_are_the_default(tmp_path):
    made = study.run(tmp_path, networks=["VGG, BN"], widths=(4,), points=3, progress=False)
    assert made["data"] == "scikit-learn digits"
    assert made["samples"] == {"train": 1348, "test": 449, "calibration": 512}
    assert verdicts(made)["RESET mends networks with batch norm."] == "holds"


def verdicts(record):
    return {c.claim: c.verdict for c in study.judge(record)}


def test_verdicts_follow_the_numbers(record):
    made = copy.deepcopy(record[0])
    claim = "Weight matching lowers the barrier."
    for row in made["curves"]:
        row["accuracy barrier"] = 0.1 if row["matched"] == "weights" else 0.5
    assert verdicts(made)[claim] == "holds"
    for row in made["curves"]:
        if row["network"] == "MLP" and row["matched"] == "weights":
            row["accuracy barrier"] = 0.6
    (judged,) = [c for c in study.judge(made) if c.claim == claim]
    assert (judged.holds, judged.true, judged.cases) == (False, 1, 2)
    assert judged.numbers == ("MLP: 60.0% against 50.0% (no)", "MLP, BN: 10.0% against 50.0%")
    assert "does not hold here" in report({**made, "claims": [vars(c) for c in study.judge(made)]})


@pytest.mark.parametrize(("claim", "table", "change"), [
    ("Renormalization recovers accuracy lost to pruning.", "pruning",
     lambda row, good: row.update({"accuracy": 0.5, "renormalized accuracy": 0.6 if good else 0.4})),
    ("A planted permutation of a retrained sibling is recovered.", "planted",
     lambda row, good: row.update({"wrong": 0 if good else 2})),
    ("Merging makes activations' variance collapse.", "layers",
     lambda row, good: row.update({"variance ratio": 0.3 if good else 1.0})),
    ("Features vanish with depth in plain networks.", "layers",
     lambda row, good: row.update({"feature ratio": row["depth"] ** (-1 if good else 1)})),
    ("RESET mends networks with batch norm.", "curves",
     lambda row, good: row.update({"midpoint accuracy": 0.9 if (row["renormalized"] == "reset") == good else 0.2})),
    ("RESCALE mends plain networks.", "curves",
     lambda row, good: row.update({"midpoint accuracy": 0.9 if (row["renormalized"] == "rescale") == good else 0.2})),
    ("Wider networks have lower barriers.", "curves",
     lambda row, good: row.update({"accuracy barrier": row["width"] ** (-1.0 if good else 1.0)})),
])  # fmt: skip
def test_claims_turn_with_their_numbers(record, claim, table, change):
    for good, verdict in ((True, "holds"), (False, "does not hold here")):
        made = copy.deepcopy(record[0])
        for row in made[table]:
            change(row, good)
        assert verdicts(made)[claim] == verdict


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
    assert [vars(c) for c in study.judge(committed)] == [
        {**c, "numbers": tuple(c["numbers"]), "seeds": tuple(c["seeds"])} for c in committed["claims"]
    ]
    assert claims_table(committed) in (root / "docs/guides/analysis.md").read_text()
