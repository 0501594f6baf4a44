"""``--report`` of align, merge and renormalize, as a user runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastmatch as fm
from fastmatch._internal.files import load_state
from fastmatch.cli.main import main
from helpers.examples import prepare

BUILT = ["--model", "cli_module:build"]
TRACED = ["--model", "cli_module:build_with_inputs"]
ON_DATA = ["--report-data", "cli_module:loader"]
ALIGN = [
    "align",
    "a.safetensors",
    "b.safetensors",
    *TRACED,
    "--out",
    "out.safetensors",
    "--report",
    "out.html",
]


def test_align_writes_a_page_and_prints_its_summary(models, loader, capsys):
    assert main([*ALIGN, *ON_DATA]) == 0
    printed = capsys.readouterr().out
    page = Path("out.html").read_text()
    before = fm.interpolate(models[0], models[1], loader, 7).barrier
    aligned = models[1]
    aligned.load_state_dict(load_state("out.safetensors"))
    after = fm.interpolate(models[0], aligned, loader, 7).barrier
    assert f"{before:.3g} -> {after:.3g}" in printed
    assert f"before: barrier {before:.3g}" in page
    assert "fastmatch align a.safetensors b.safetensors" in page
    assert "a.safetensors" in page
    for part in ("trace", "verify", "match"):
        assert f"{part} 0." in printed


def test_align_out_of_core_reports_the_weights(planted, capsys):
    assert main([*ALIGN, "--out-of-core"]) == 0
    printed = capsys.readouterr().out
    assert "cosine of weights" in printed
    assert "-> 1.00" in printed
    assert "write 0." in printed


def test_directories_have_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path, "model-a model-b")
    assert main(["align", "model-a", "model-b", "--out", "out", "--report", "out.html"]) == 0
    assert "residual stream" in Path("out.html").read_text()
    assert "unchanged" in capsys.readouterr().out


def test_merge_and_renormalize_report_what_the_merge_lost(models, loader, capsys):
    ends = ["a.safetensors", "b.safetensors"]
    assert main(["merge", *ends, *BUILT, "--out", "m.pt", "--report", "m.html", *ON_DATA]) == 0
    merged = fm.score(fm.merge(models[:2]), loader)
    assert f"{merged.loss:.3g}" in capsys.readouterr().out
    renormalize = [
        "renormalize", "m.pt", "--endpoints", *ends, *BUILT, "--data", "cli_module:loader", "--weights", "0.5", "0.5",
    ]  # fmt: skip
    assert main([*renormalize, "--method", "repair", "--out", "r.pt", "--report", "r.html"]) == 0
    text = capsys.readouterr().out
    assert f"takes the loss from {merged.loss:.3g}" in text
    assert "merge -> renormalized" in text
    assert "0.5 of a.safetensors, 0.5 of b.safetensors" in Path("r.html").read_text()


@pytest.mark.parametrize(("arguments", "message"), [
    ([*ALIGN[:-2], *ON_DATA], "--report-data: is an option of --report"),
    ([*ALIGN[:-1], "out.pdf"], "--report: expected a file ending in .htm, .html"),
    ([*ALIGN[:-1], "missing/out.html"], "missing is not a folder"),
    ([*ALIGN, "--out-of-core", *ON_DATA], "--report-data: alignment out of core does not run the networks"),
    (
        ["renormalize", "a.safetensors", *BUILT, "--data", "cli_module:loader", "--method", "reset", "--out", "r.pt",
         "--report", "r.html"],
        "--report: compares the result with --endpoints",
    ),
])  # fmt: skip
def test_bad_input_is_one_line(models, refused, arguments, message):
    refused(arguments, message)


def test_help_loads_neither_templates_nor_drawings(programs):
    code = (
        "import sys\nfrom fastmatch.cli.main import main\ntry:\n    main(['align', '--help'])\n"
        "except SystemExit:\n    pass\nprint([m for m in ('matplotlib', 'fastmatch.report') if m in sys.modules])"
    )
    done = programs.run(code, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
