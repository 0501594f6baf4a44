"""The reports run at their smallest sizes, checks included, and the committed pages are those of the committed records."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from argparse import Namespace
from typing import Any

import pytest
import torch

from bench.lib import record
from bench.lib.findings import Findings, read_findings
from bench.reports import (
    balanced_matching,
    device_cost,
    first_calls,
    first_second,
    initial_duals,
    kernels_cpu,
    kernels_gpu,
    renormalization_choice,
    soundness,
    weight_matching,
)

TINY = Namespace(tiny=True)
PAGES = (
    "assignment_families",
    "assignment_solvers",
    "balanced_matching",
    "bfloat16_screening",
    "checkpoint_alignment",
    "device_cost",
    "diffusion_alignment",
    "diffusion_many",
    "diffusion_names",
    "first_calls",
    "greedy_initialization",
    "initial_duals",
    "kernels_cpu",
    "renormalization_choice",
    "soundness",
    "spliceai_merging",
    "transformers_families",
    "weight_matching",
)


def gpu_options(tmp_path, backend, *parts):
    return Namespace(tiny=True, device="cpu", backend=backend, sizes=None, parts=parts, out=tmp_path)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=pytest.mark.slow), "triton"])
def test_every_kernel_is_checked_and_timed(tmp_path, backend):
    if torch.cuda.is_available() and backend == "triton":
        pytest.skip("the interpreter is for machines without a GPU")
    kernels_gpu.measure(gpu_options(tmp_path, backend, "env", "ceilings", "kernels:900"))
    found = read_findings(tmp_path / "findings.jsonl")
    assert all(row["ok"] for row in found), [row for row in found if not row["ok"]]
    kernels = [row for row in found if row["part"] == "kernels"]
    names = {row["name"].partition(",")[0] for row in kernels}
    assert names >= {
        "gain",
        "row_softmin",
        "moments",
        "permute_merge",
        "channel_affine",
        "entries in float64",
    }
    assert ("row_topk" in names) == (backend == "triton")
    assert all(row["error / bound"] <= 1 for row in kernels), "a result outside its bound was recorded"
    assert all(row["fraction of the copy"] > 0 for row in kernels)
    assert "## kernels" in kernels_gpu.page(found)


@pytest.mark.slow
def test_public_calls_and_solves_are_compared_with_the_cpu(tmp_path):
    kernels_gpu.measure(gpu_options(tmp_path, "cpu", "calls:900", "solve:900", "profile:900"))
    found = read_findings(tmp_path / "findings.jsonl")
    assert all(row["ok"] for row in found), [row for row in found if not row["ok"]]
    assert all(row.get("same", True) for row in found)
    assert all(row.get("difference", 0.0) <= 1e-4 for row in found)
    assert {row["part"] for row in found} == {"calls", "solve", "profile"}
    assert (tmp_path / "profile.txt").exists()


def test_a_finding_that_fails_or_comes_too_late_stops_nothing(tmp_path):
    def fail():
        raise RuntimeError("CUDA error")

    findings = Findings(tmp_path / "findings.jsonl")
    with findings.part("one", 60):
        findings.attempt("bad", fail)
        findings.attempt("good", lambda: {"ms": 1.0})
    with findings.part("two", -1):
        findings.attempt("late", lambda: {"ms": 1.0})
    with findings.part("three", 60):
        fail()
    rows = read_findings(tmp_path / "findings.jsonl")
    assert [(row["name"], row["ok"]) for row in rows] == [
        ("bad", False),
        ("good", True),
        ("late", False),
        ("part", False),
    ]
    assert "CUDA error" in rows[0]["error"]
    assert "time is used up" in rows[2]["error"]


@pytest.mark.slow
def test_the_reading_of_device_matrices_is_counted():
    rows = {row["cost"]: row for row in device_cost.measure(TINY)["rows"]}
    assert (rows["constant"]["n"], rows["constant"]["lists"]) == (100, "given up")
    assert (rows["sibling 1"]["n"], rows["sibling 1"]["lists"]) == (100, "accepted")


def test_initial_duals_are_simulated():
    assert len(initial_duals.measure(TINY)["rows"]) == 2 * 8, "two instances from eight starts"


def test_the_kernels_are_compared_with_torch():
    found = kernels_cpu.measure(Namespace(tiny=True, repeats=2))
    assert {row["operation"] for row in found["rows"]} == {
        "matrix_product", "moments", "permute_merge", "gain", "row_topk", "row_softmin", "channel_affine",
    }  # fmt: skip
    assert kernels_cpu.page(found)


def test_weight_matching_is_compared_with_the_published_algorithm():
    published, ours = weight_matching.measure(TINY)["rows"]
    assert ours["objective"] >= published["objective"] * (1 - 1e-9)


def test_matches_of_balanced_copies_do_not_depend_on_scales():
    found = balanced_matching.measure(Namespace(tiny=True, pairs=1))
    plain, scaled = found["rows"]
    assert scaled["balanced match and merge"] == pytest.approx(plain["balanced match and merge"], abs=0.005)
    assert balanced_matching.page(found)


def fixed(row: dict[str, Any]) -> dict[str, float]:
    """The accuracies of the methods by name, and of the network left alone."""
    found = {k.removeprefix("accuracy, "): v for k, v in row.items() if k.startswith("accuracy, ")}
    return {k: v for k, v in found.items() if not k.startswith("auto")}


@pytest.mark.slow
def test_the_automatic_choice_is_compared_with_every_method():
    found = renormalization_choice.measure(TINY)
    assert len(found["rows"]) == 12
    for row in found["rows"]:
        known = fixed(row) | {"least-squares": row["accuracy, least squares, sequential"]}
        assert row["accuracy, auto"] == known[row["chosen"]]
        assert row["accuracy, auto, statistics"] == known[row["chosen among channel-wise ones"]]
        assert row["chosen among channel-wise ones"] != "least-squares"
    assert renormalization_choice.page(found)


def test_the_committed_choices_are_near_the_best_and_do_no_harm():
    rows = record.read("renormalization_choice")["rows"]
    assert len(rows) >= 500
    for choice, left_out in (("auto", "nothing"), ("auto, statistics", "least squares")):
        ours = [row[f"accuracy, {choice}"] for row in rows]
        best = [max(v for m, v in fixed(row).items() if not m.startswith(left_out)) for row in rows]
        near = sum(b - o <= 0.01 + 1e-9 for b, o in zip(best, ours, strict=True))
        assert near >= 0.9 * len(rows)
        assert max(row["accuracy, none"] - o for row, o in zip(rows, ours, strict=True)) <= 0.03


@pytest.mark.slow
def test_screening_is_counted():
    """In a process of its own: it replaces kernels and binds itself to one core."""
    command = [sys.executable, "-m", "bench.reports.bfloat16_screening", "--tiny", "--repeats", "1"]
    done = subprocess.run(command, cwd=record.RESULTS.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2


@pytest.mark.slow
def test_first_calls_are_timed():
    (row,) = first_calls.measure(TINY)["rows"]
    assert row["first wall s"] > row["later wall s"] > 0


@pytest.mark.slow
def test_the_first_second_is_timed():
    rows = first_second.measure(TINY)["rows"]
    assert len(rows) == 4
    assert all(row["seconds"] >= 0 for row in rows)


@pytest.mark.slow
def test_a_checkpoint_is_aligned(tmp_path):
    from bench.reports import checkpoint_alignment

    options = Namespace(tiny=True, dir=tmp_path / "work", groups=None, cosines=[1.0, 0.95], append=False)
    found = checkpoint_alignment.measure(options)
    assert [row["equal to A"] for row in found["rows"]] == [True, False]
    assert all(row["reads of A"] >= 2 and row["reads of B"] >= 3 for row in found["rows"])
    assert "| 0.95 |" in checkpoint_alignment.page(found)


def test_solvers_are_compared():
    from bench.reports import assignment_solvers

    options = Namespace(tiny=True, parts=assignment_solvers.PARTS, budget=1.0, peers=["scipy"])
    found = assignment_solvers.measure(options)
    assert [row["part"] for row in found["rows"]] == ["factor", "factor", "dense", "stack"]
    assert all(row["gap"] <= row["gap_bound"] for row in found["rows"] if "gap" in row)
    assert assignment_solvers.page(found)


@pytest.mark.parametrize("name", PAGES)
def test_a_committed_page_is_that_of_its_record(name):
    report = importlib.import_module(f"bench.reports.{name}")
    page = getattr(report, "page", None) or report.table
    found = record.read(name)
    assert set(found) == {"machine", "versions", "settings", "rows"}
    assert page(found) == (record.RESULTS / f"{name}.md").read_text()


def test_the_committed_page_of_the_gpu_is_that_of_its_findings():
    findings = read_findings(kernels_gpu.COMMITTED)
    assert kernels_gpu.page(findings) == kernels_gpu.COMMITTED.with_suffix(".md").read_text()
    assert {row["gpu"] for row in findings if row["name"] == "card"} == {"NVIDIA H200"}


def test_a_record_is_kept_and_its_page_written(tmp_path, monkeypatch):
    import argparse

    monkeypatch.setattr(record, "RESULTS", tmp_path)

    def measure(options):
        return record.record(
            [{"case": "a", "ms": 1.234}, {"case": "b", "ms": 2.0}], packages=["none"], repeats=3
        )

    def page(found):
        return record.page("A title", "name", found, record.table(found["rows"]))

    def run(*arguments):
        return record.run("name", measure, page, argparse.ArgumentParser(), list(arguments))

    assert run("--tiny") == 0
    assert not list(tmp_path.iterdir())
    assert run() == 0
    kept = json.loads((tmp_path / "name.json").read_text())
    assert kept["settings"] == {"repeats": 3}
    assert kept["versions"]["torch"] == torch.__version__
    text = (tmp_path / "name.md").read_text()
    assert text.startswith("# A title\n\nWritten by `python -m bench.reports.name`. ")
    assert text.endswith("| case | ms |\n|---|---|\n| a | 1.23 |\n| b | 2.00 |\n")
    (tmp_path / "name.md").unlink()
    assert run("--page") == 0
    assert (tmp_path / "name.md").read_text() == text


@pytest.mark.slow
def test_hunts_for_faults_write_what_they_tried(tmp_path):
    lines = tmp_path / "rows"
    found = soundness.measure(Namespace(tiny=True, parts=["networks"], seed=1, count=2, lines=lines))
    row = json.loads(lines.read_text())
    assert row in found["rows"]
    assert (row["part"], row["seed"], row["count"], row["changed"]) == ("networks", 1, 3, [])
    assert "3 networks with" in soundness.page({**found, "rows": [row]})


def test_the_page_of_the_hunts_needs_no_part_and_a_wrong_part_is_named(tmp_path, monkeypatch, capsys):
    shutil.copy(record.RESULTS / "soundness.json", tmp_path)
    page = (record.RESULTS / "soundness.md").read_text()
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert soundness.main(["--page"]) == 0
    assert (tmp_path / "soundness.md").read_text() == page
    with pytest.raises(SystemExit):
        soundness.main(["network"])
    assert "expected one of networks, files, kills; got 'network'" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_of_several_processes_are_compared_with_what_the_model_says(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from bench.reports import several_processes

    def run(folder, ranks, *, residual):  # in this process
        shutil.rmtree(folder / "out", ignore_errors=True)
        return {"load": 0.0, **several_processes.align(folder, residual=residual)}

    monkeypatch.setattr(several_processes, "run", run)
    threads = torch.get_num_threads()
    found = several_processes.measure(Namespace(tiny=True, ranks=[1, 2], dir=tmp_path / "made"))
    torch.set_num_threads(threads)
    assert not (tmp_path / "made").exists()
    assert [(row["ranks"], row["residual"]) for row in found["rows"]] == [
        (ranks, residual) for residual in ("moved", "held") for ranks in (1, 2)
    ]
    for one, two in zip(found["rows"][::2], found["rows"][1::2], strict=True):
        assert one["objective"] == two["objective"]
        assert 0 < two["predicted"]["survey"] < one["predicted"]["survey"]
        assert one["predicted"]["exchange"] == 0 < two["predicted"]["exchange"]
    assert "of 4 predictions are within 30% of the measured time" in several_processes.page(found)
