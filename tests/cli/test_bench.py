"""``fastmatch bench`` and its report: one suite run for real, tables and plots from what it kept, errors named."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import bench.reports.suites as report
from fastmatch.cli.bench import SUITES, combined
from fastmatch.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_suite_runs_is_kept_drawn_and_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "run.json"
    assert main(["bench", "apply", "--quick", "--out", str(out)]) == 0
    run = json.loads(out.read_text())
    rows = report.rows_of(run)
    assert {row["instance"] for row in rows} == {"apply", "merge"}
    for row in rows:
        assert row["seconds"]["fastmatch"] > 0
        assert set(row["ratios"]) == {"torch, plainly", "copy of one model"}
        assert all(ratio > 0 for ratio in row["ratios"].values())
    machine = run["machine_info"]["fastmatch"]
    assert machine["versions"]["torch"]
    assert machine["quick"] is True
    page = out.with_suffix(".html").read_text()
    assert "data:image/png;base64," in page
    assert "torch, plainly" in page
    assert "| apply | merge | 512 | 1 |" in out.with_suffix(".md").read_text()
    assert main(["bench", "apply", "--quick", "--out", str(out)]) == 2  # an existing run is not replaced
    compared = tmp_path / "compared.html"
    report.main([str(out), "--compare", str(out), "--html", str(compared)])
    assert "then / now" in compared.read_text()


def fake_run(time, **seconds):
    """What pytest-benchmark would write of one row a keyword."""
    machine = {
        "versions": {"torch": "0"},
        "cpu": "none",
        "cores": 2,
        "torch_threads": 2,
        "load": 0.5,
        "quick": False,
    }
    rows = [
        {
            "fullname": name, "stats": {"data": [1.0], "median": 1.0},
            "extra_info": {
                "suite": "apply", "instance": name, "size": 8, "seconds": {"fastmatch": value},
                "ratios": {"torch": 2.0}, "peak_mb": {"fastmatch": None},
            },
        }
        for name, value in seconds.items()
    ]  # fmt: skip
    return {"datetime": time, "machine_info": {"fastmatch": machine}, "benchmarks": rows}


def test_rows_of_an_earlier_run_stay_where_they_were_not_measured_anew():
    first = combined(fake_run("2001-01-01T10:00:00", apply=1.0, merge=2.0), None)
    both = combined(fake_run("2002-02-02T10:00:00", merge=3.0), json.loads(json.dumps(first)))
    rows = {row["instance"]: row for row in report.rows_of(both)}
    assert {k: (r["seconds"]["fastmatch"], r["number"]) for k, r in rows.items()} == {
        "apply": (1.0, 1),
        "merge": (3.0, 2),
    }
    assert report.machine_text(both) == (
        "none, 2 cores, 2 torch threads; torch 0. "
        "Run 1 of 2001-01-01T10:00, load 0.5 at its start; run 2 of 2002-02-02T10:00, load 0.5 at its start."
    )
    assert all("data" not in row["stats"] for row in both["benchmarks"])
    plain = combined(fake_run("2002-02-02T10:00:00", merge=3.0), fake_run("2001-01-01T10:00:00", apply=1.0))
    assert report.rows_of(plain) == report.rows_of(both)  # an earlier run as pytest-benchmark wrote it
    renamed = fake_run("2002-03-03T10:00:00", merge=6.0)
    renamed["benchmarks"][0]["fullname"] = "a test of another name"
    assert [row["seconds"]["fastmatch"] for row in report.rows_of(combined(renamed, both))] == [1.0, 6.0]
    anew = combined(fake_run("2003-03-03T10:00:00", apply=4.0, merge=5.0), both)
    assert list(anew["runs"]) == ["2003-03-03T10:00:00"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "speed"], "suite: expected some of assignment, gains"),
        (["bench", "--families"], "--families: expected the suite assignment alone, got all"),
        (["bench", "assignment", "apply", "--families"], "alone, got assignment apply"),
        (["bench", "apply", "--compare", "missing.json"], "--compare: no file missing.json"),
    ],
)
def test_errors_are_named(arguments, message, capsys, tmp_path):
    assert main([*arguments, "--out", str(tmp_path / "run.json")]) == 2
    assert message in capsys.readouterr().err


def test_without_a_checkout_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastmatch.cli.bench.__file__", str(tmp_path / "fastmatch" / "cli" / "bench.py"))
    assert main(["bench", "apply"]) == 2
    assert "no checkout here" in capsys.readouterr().err


def test_every_suite_has_a_file():
    names = {f"test_{name.replace('-', '_')}.py" for name in SUITES}
    assert {path.name for path in (ROOT / "bench/suites").glob("test_*.py")} == names | {
        "test_assignment_families.py"  # run by --families
    }
    assert set(report.SUITES) == {*SUITES, "families"}


@pytest.mark.slow
def test_families_of_costs_are_measured_beside_every_solver(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "run.json"
    arguments = ["bench", "assignment", "--quick", "--families", "uniform;sparse, 1%", "--out", str(out)]
    assert main(arguments) == 0
    rows = {row["instance"]: row for row in report.rows_of(json.loads(out.read_text()))}
    assert set(rows) == {"uniform, 1:1, float64", "sparse, 1%, 1:1, float64"}
    for row in rows.values():
        assert (row["suite"], row["size"]) == ("families", 300)
        assert {"scipy", *(["lapjv"] if find_spec("lapjv") else [])} <= set(row["ratios"])
    assert "scipy sparse" in rows["sparse, 1%, 1:1, float64"]["ratios"]
    page = out.with_suffix(".md").read_text()
    assert "| families | 2 |" in page
    assert "| families | uniform, 1:1, float64 | 300 |" in page


def test_exponents_are_those_of_the_larger_sizes():
    sizes = np.array([256, 512, 1024, 2048, 4096, 8192])
    cubic = [(float(n), 1e-3 + 1e-9 * float(n) ** 3) for n in sizes]
    assert report.exponent(cubic) == pytest.approx(3, abs=0.1)
    assert report.exponent(cubic[:2]) is None
    quadratic = [(float(n), 2e-9 * float(n) ** 2) for n in sizes]
    assert report.exponent(quadratic) == pytest.approx(2)


def test_the_committed_run_is_what_the_docs_show():
    run = json.loads((ROOT / "bench/results/bench.json").read_text())
    rows = report.rows_of(run)
    assert {row["suite"] for row in rows} == set(SUITES)
    text = (ROOT / "bench/results/bench.md").read_text()
    assert text == report.markdown(run)


def test_a_page_leads_with_three_figures():
    """Of whole tasks, of weight matching, and of what is slower; a run of some suites has those of its own."""

    def row(suite, instance, size, **ratios):
        return {"suite": suite, "instance": instance, "size": size, "ratios": ratios}

    rows = [
        row("end-to-end", "x", 1, a=2.0, b=9.0), row("end-to-end", "x", 2, a=8.0), row("matching", "MLP, weights", 3, a=5.0),
        row("matching", "MLP, activations", 3, a=0.5), row("apply", "apply", 4, a=0.25),
    ]  # fmt: skip
    first, second, third = report.three_figures(rows)[1:]
    assert (first[0], second[0], third[0]) == ("**4.0 times**", "**5.0 times**", "**2 of 5**")
    assert "2.0 to 8.0 in 2 rows" in first[1]
    assert third[1].endswith("the worst is apply: apply, 4, at 0.25")
    assert len(report.three_figures(rows[-1:])) == 2
    assert (ROOT / "bench/results/bench.md").read_text().splitlines()[2] == "| figure | what it is |"
