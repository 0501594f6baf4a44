"""The report on families: what it notes of peers, of ours, and of an earlier run."""

from __future__ import annotations

import json
import os
import re
import time
from fractions import Fraction

import numpy as np
import pytest

from bench.lib import record, timed_solves
from bench.lib.families import FAMILIES
from bench.lib.peers import Peer, peers
from bench.lib.timed_solves import OURS, Outcome, Runner, matched
from bench.reports import assignment_families as report


class Scripted:
    """A runner whose outcomes are given, turn by turn."""

    def __init__(self, **outcomes):
        self.outcomes = {name: list(turns) for name, turns in outcomes.items()}
        self.asked: list[str] = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def place(self, cost):
        pass

    def run(self, name, limit=None):
        self.asked.append(name)
        turns = self.outcomes[name]
        return turns.pop(0) if len(turns) > 1 else turns[0]


def outcome(seconds, objective=10, gap=(0.0, 1e-12)):
    return Outcome(seconds, "", Fraction(objective), Fraction(10), gap)


def row_of(monkeypatch, earlier=None, repeats=3, **outcomes):
    given = {k: Peer(k, "none", lambda cost: cost) for k in outcomes if k != "ours"}
    monkeypatch.setattr(report, "peers", lambda: given)
    measurement = report.Measurement(repeats=repeats, earlier=earlier)
    measurement.runner = Scripted(**{OURS if k == "ours" else k: v for k, v in outcomes.items()})  # type: ignore[assignment]
    return measurement.row(FAMILIES["uniform"], 4, 4, "float64", 0), measurement


def test_the_fastest_right_peer_is_compared_by_medians(monkeypatch):
    row, measurement = row_of(
        monkeypatch,
        ours=[outcome(2.0), outcome(3.0), outcome(9.0)],
        right=[outcome(1.5), outcome(1.0), outcome(1.5)],
        high=[outcome(0.1, Fraction(10) + Fraction(1, 10**6))],
        slow=[outcome(40.0)],
        stuck=[Outcome(None, "limit")],
        refusing=[Outcome(None, "ValueError: no")],
    )
    assert row["ratio"] == 2.0
    assert row["fastest"] == "right"
    assert row["wrong"] == ["high"]
    assert row["failed"] == {"stuck": "limit", "refusing": "ValueError: no"}
    assert row["fault"] == ""
    assert measurement.runner.asked.count("slow") == 1, "it takes over 20 times the fastest"
    again = measurement.row(FAMILIES["uniform"], 5, 5, "float64", 0)
    assert again["skipped"] == ["stuck"]


def test_what_an_order_gives_away_is_solved_again_in_random_order(monkeypatch):
    turns = {"ours": [3.0] * 3 + [1.0] * 3, "right": [1.0] * 3 + [2.0] * 3, "high": [0.1] * 6}
    given = {k: [outcome(t, 11 if k == "high" else 10) for t in taken] for k, taken in turns.items()}
    row, measurement = row_of(monkeypatch, **given)
    assert row["ratio"] == 3.0
    assert row["shuffled"] == 0.5
    assert measurement.runner.asked.count("high") == 3, "it is wrong"
    assert "again with rows and columns in random order: 0 are above 1.2 then, 0.50 at worst." in "\n".join(
        report.summary([row])
    )
    quick, _ = row_of(monkeypatch, ours=[outcome(1.0)], right=[outcome(1.0)])
    assert "shuffled" not in quick


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        (outcome(1.0, 11), "not optimal"),
        (outcome(1.0, 11, (0.0, 1e9)), "not optimal"),
        (outcome(1.0, gap=(1.0, 0.5)), "gap above its bound"),
        (outcome(1.0, gap=(float("nan"), 0.5)), "gap above its bound"),
        (outcome(1.0, gap=(0.0, float("inf"))), "no bound"),
        (Outcome(None, "crash"), "crash"),
    ],
)
def test_our_faults_are_named(monkeypatch, found, fault):
    row, _ = row_of(monkeypatch, ours=[found], right=[outcome(1.0)])
    assert row["fault"] == fault
    assert fault.upper() in report.line(row)
    assert f"1 {fault}" in report.summary([row])[-1]


def test_peers_of_an_earlier_run_are_not_measured(monkeypatch):
    row, _ = row_of(monkeypatch, ours=[outcome(2.0)], right=[outcome(1.0)], high=[outcome(0.1, 11)])
    earlier = {report.key(row): json.loads(json.dumps(row))}
    again, measurement = row_of(monkeypatch, earlier, ours=[outcome(0.5, 9)], right=[outcome(7.0)])
    assert set(measurement.runner.asked) == {OURS}
    assert again["ratio"] == 0.5
    assert again["wrong"] == ["high"]
    assert again["earlier"] == ["right", "high"]
    assert report.told(again, "right") == "1*"
    assert report.told(again, OURS) == "0.5"
    assert report.told(row, "right") == "1"
    worse, _ = row_of(monkeypatch, earlier, ours=[outcome(0.5, 11)], right=[outcome(7.0)])
    assert worse["fault"] == "not optimal"


def test_matchings_are_checked():
    cost = np.array([[1.0, np.inf], [0.5, 2.0], [3.0, 4.0]])
    assert matched(cost, np.array([0, 1]), np.array([0, 1])) == (3, 3)
    for rows, columns in (([0, 1], [1, 0]), ([0, 0], [0, 1]), ([0, 1], [0, 0]), ([0], [0])):
        with pytest.raises(ValueError, match=r"no matching|forbidden"):
            matched(cost, np.array(rows), np.array(columns))


def crash(name, pipe):
    """Stand for a solver: it is ready, then ends its process on the first matrix."""
    pipe.send(None)
    pipe.recv()
    os._exit(3)


def spin(name, pipe):
    """Stand for a solver that never answers."""
    pipe.send(None)
    pipe.recv()
    while True:
        time.process_time()


@pytest.mark.parametrize(("solver", "failure"), [(crash, "crash"), (spin, "limit")])
def test_a_solver_that_crashes_or_does_not_end_is_told(monkeypatch, solver, failure):
    monkeypatch.setattr(timed_solves, "work", solver)
    monkeypatch.setattr(timed_solves, "START", "fork")
    with Runner(limit=0.3) as runner:
        runner.place(np.eye(3))
        assert runner.run("scipy").failure == failure
        assert runner.run("scipy").failure == failure, "its process starts anew"


@pytest.mark.parametrize("name", peers())
def test_every_peer_solves_what_it_says_it_takes(name):
    peer, g = peers()[name], np.random.default_rng(0)
    finite, missing = g.random((6, 6)), np.where(np.eye(6) == 1, np.inf, g.random((6, 6)))
    assert peer.takes(finite) is (name != "scipy sparse")
    taken = 0
    for cost in (finite, missing, missing[:4], missing[:, :4], finite[:4], finite[:, :4]):
        for dtype in ("float64", "float32", "int32"):
            if np.isinf(cost).any() and dtype == "int32":
                continue
            given = (cost if dtype != "int32" else 1000 * cost).astype(dtype)
            if peer.takes(given):
                taken += 1
                value = matched(given, *peer.solve(given))[0]
                best = matched(given, *peers()["scipy"].solve(given))[0]
                assert abs(value - best) <= 1e-6 * abs(best), (given.shape, dtype)
    assert taken >= 4


def test_rows_are_ordered_from_the_worst():
    rows = [
        {"ratio": 0.5, "seconds": {OURS: 1.0, "scipy": 2.0}},
        {"ratio": None, "seconds": {OURS: 1.0}},
        {"ratio": None, "seconds": {"scipy": 1.0}},
        {"ratio": 3.0, "seconds": {OURS: 3.0, "scipy": 1.0}},
    ]
    ordered = sorted(rows, key=report.badness, reverse=True)
    assert [rows.index(row) for row in ordered] == [2, 3, 0, 1]


def test_shapes_have_at_least_one_column_more():
    assert report.sides(300, "1:1") == (300, 300)
    assert report.sides(300, "1:1.001") == (300, 301)
    assert report.sides(8192, "1:1.001") == (8192, 8200)
    assert report.sides(300, "10:1") == (3000, 300)


@pytest.mark.parametrize("solves", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_is_kept_and_continued(tmp_path, capsys, monkeypatch, solves):
    """``solves``: in processes of their own, which each compile first; otherwise the outcomes are given."""
    if not solves:
        given = Scripted(**{OURS: [outcome(1.0)], "scipy": [outcome(1.0)]})
        monkeypatch.setattr(report, "Runner", lambda limit: given)
    out = tmp_path / "found.json"
    arguments = ["--sizes=12", "--shapes=1:2", "--dtypes=float64,factors", "--repeats=1", "--peers=scipy"]
    found = []
    for families in ("uniform", "sums;uniform;factors, clusters"):
        assert report.main([*arguments, "--families", families, "--out", str(out)]) == 0
        found.append([row["family"] for row in json.loads(out.read_text())["rows"]])
    assert found == [["uniform"], ["uniform", "sums", "factors, clusters"]]
    kept = json.loads(out.read_text())
    assert kept["versions"]["scipy"]
    assert kept["rows"][0]["m"] == 24
    assert "Faults: none." in capsys.readouterr().out
    page = report.page(kept)
    assert "| sums | 12 x 24, float64 |" in page
    assert "| factors, clusters | 12 x 24, factors |" in page


def test_the_page_puts_the_worst_first():
    kept = record.read(report.NAME)
    lines = report.page(kept).split("Seconds of processor time.")[1].splitlines()
    cells = [re.split(r"(?<!\\)\|", line) for line in lines if " x " in line]
    assert len({len(row) for row in cells}) == 1, "a name broke the table"
    numbers = [float(row[3]) for row in cells if row[3].strip() != "-"]
    assert numbers == sorted(numbers, reverse=True)
    assert len(cells) == len(kept["rows"])
    assert len({row["family"] for row in kept["rows"]}) >= 90
