"""The demo at its smallest width: the table, the numbers, the picture."""

from __future__ import annotations

import json

import pytest

from fastmatch.studies import demo


@pytest.mark.parametrize("networks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_demo_writes_what_it_prints(tmp_path, capsys, monkeypatch, networks):
    found = demo.architectures(128)[:networks]
    monkeypatch.setattr(demo, "architectures", lambda width: found)
    (tmp_path / "out").mkdir()
    for name in ("demo.json", "demo.png"):
        (tmp_path / "out" / name).write_text("of an earlier run")  # safe to repeat
    rows = demo.run(128, tmp_path / "out", points=3, progress=False)
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert len(rows) == len(record["rows"]) == 7 * networks
    assert (tmp_path / "out" / "demo.png").read_bytes()[:4] == b"\x89PNG"
    for row, saved in zip(rows, record["rows"], strict=True):
        assert f"{row.loss_barrier:.3f}" in printed
        assert saved["loss"] == list(row.loss)
    # Four channels are too few for the conv nets to meet; the MLPs do at any width.
    naive, *others = [r for r in rows if r.network == "MLP 128"]
    assert len(others) == 6
    assert all(r.loss_barrier < naive.loss_barrier for r in others)
