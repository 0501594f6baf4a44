"""The demo at its smallest width: the table, the numbers, the picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from fastmatch.studies import demo
from fastmatch.studies.digits import train_new


@pytest.mark.parametrize("networks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_demo_writes_what_it_prints(tmp_path, capsys, monkeypatch, networks):
    found = demo.architectures(128)[:networks]
    monkeypatch.setattr(demo, "architectures", lambda width: found)
    monkeypatch.setattr(demo, "compiling", lambda width: nullcontext())
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


def test_kernels_are_compiled_beside_the_training_and_the_process_ends_with_it(monkeypatch):
    begun = []

    class Process(subprocess.Popen):
        def __init__(self, command, **options):
            begun.append(self)
            assert command[-1] == "from fastmatch.studies.demo import compile_kernels; compile_kernels(128)"
            super().__init__(["sleep", "60"], **options)

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr("fastmatch_kernels._numba.cache.folders", list)

    def interrupted():
        with demo.compiling(128):
            assert begun[0].poll() is None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert begun[0].poll() is not None


def test_kernels_that_are_kept_are_not_compiled_beside_the_training(tmp_path, monkeypatch):
    (tmp_path / "kernel.nbc").touch()
    monkeypatch.setattr("fastmatch_kernels._numba.cache.folders", lambda: [tmp_path])
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("compiled again"))
    with demo.compiling(128):
        pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_training_that_fails_ends_the_other_one(error, monkeypatch):
    passes = []

    def fake_train(network, data, *, title, **options):
        if title.endswith("B"):
            raise error("B has failed")
        for k in range(100_000):
            network(data.inputs[:1])
            passes.append(k)

    monkeypatch.setattr(demo, "train", fake_train)
    data, _ = demo.digits()
    with pytest.raises(error, match="B has failed"):
        demo.train_pair(demo.architectures(128)[0], data, 0, demo.Stopwatch(), progress=False)
    assert len(passes) < 99_999


@pytest.mark.slow
def test_what_is_compiled_beside_the_training_is_all_that_the_comparison_needs(tmp_path):
    code = (
        "from fastmatch_kernels._numba.cache import folders\n"
        "from fastmatch.studies import demo\n"
        "demo.compile_kernels(1024)\n"
        "kept = lambda: {file.name for folder in folders() for file in folder.glob('*.nbc')}\n"
        "before = kept()\n"
        "data = demo.digits()\n"
        "for architecture in demo.architectures(1024):\n"
        "    pair = architecture.build(), architecture.build()\n"
        "    demo.compare(architecture, pair, data, 3, demo.Stopwatch(), progress=False)\n"
        "assert kept() == before, kept() - before"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]


def test_two_networks_train_side_by_side_as_one_after_the_other():
    """With one thread each; the threads of torch are as they were."""
    data, _ = demo.digits()
    (architecture,) = demo.architectures(128)[1:2]
    few = demo.Batches(data.inputs[:256], data.targets[:256], 64)
    threads = torch.get_num_threads()
    pair = demo.train_pair(architecture, few, 3, demo.Stopwatch(), progress=False)
    assert torch.get_num_threads() == threads
    for number, network in zip((3000, 3001), pair, strict=True):
        alone = train_new(architecture.build, few, epochs=architecture.epochs, seed=number, progress=False)
        for tensor, expected in zip(network.state_dict().values(), alone.state_dict().values(), strict=True):
            assert torch.equal(tensor, expected)
