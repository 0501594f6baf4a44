"""Folders of Hugging Face that hold different models are refused by their configs, before transformers is imported."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from fastmatch.checkpoint import (
    align_checkpoints,
    align_many_checkpoints,
    merge_checkpoints,
    verify_checkpoints,
)
from fastmatch.cli.main import main

BERT = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "hidden_size": 4,
    "num_hidden_layers": 2,
    "vocab_size": 9,
}
GPT = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 4, "n_layer": 2}


@pytest.fixture(autouse=True)
def without_transformers(monkeypatch, tmp_path):
    """Importing it takes ten seconds on a slow machine."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.chdir(tmp_path)


def write(folder, config, names, width=4):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: torch.ones(width, width) for name in names}, folder / "model.safetensors")


CALLS = {
    "align": align_checkpoints,
    "align-many": lambda a, b, out: align_many_checkpoints([a, b], out),
    "merge": lambda a, b, out: merge_checkpoints([a, b], out),
    "verify": lambda a, b, out: verify_checkpoints(a, b),
}


@pytest.mark.parametrize("call", CALLS)
def test_two_types_are_named(tmp_path, call):
    write(tmp_path / "a", BERT, ["encoder.weight"])
    write(tmp_path / "b", GPT, ["h.weight"])
    with pytest.raises(
        ValueError,
        match=r"b: holds a model of type 'gpt2' \(GPT2LMHeadModel\), .*a one of type 'bert' \(BertModel\)",
    ):
        CALLS[call](tmp_path / "a", tmp_path / "b", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line", [["align", "a", "b", "--out", "o"], ["plan", "a", "b"], ["verify", "a", "b"]]
)
def test_a_command_names_two_types(tmp_path, capsys, line):
    write(tmp_path / "a", BERT, ["encoder.weight"])
    write(tmp_path / "b", GPT, ["h.weight"])
    assert main(line) == 2
    assert "b: holds a model of type 'gpt2'" in capsys.readouterr().err


@pytest.mark.parametrize("call", ["align", "align-many", "verify"])
def test_sizes_that_differ_are_named_by_the_keys_of_the_config(tmp_path, call):
    write(tmp_path / "a", {**BERT, "text_config": {"d_ff": 4}}, ["0.weight"])
    write(
        tmp_path / "b",
        {**BERT, "hidden_size": 5, "vocab_size": 8, "text_config": {"d_ff": 5}},
        ["0.weight"],
        5,
    )
    with pytest.raises(
        ValueError,
        match=r"b: its config.json says hidden_size 5, text_config.d_ff 5, that of .*a hidden_size 4, ",
    ):
        CALLS[call](tmp_path / "a", tmp_path / "b", tmp_path / "out")


@pytest.mark.parametrize("prefix", ["", "model."])
def test_two_types_with_the_same_tensors_are_merged(tmp_path, monkeypatch, prefix):
    write(tmp_path / "a", BERT, ["0.weight", "1.weight"])
    write(tmp_path / "b", {**BERT, "model_type": "roberta"}, [f"{prefix}0.weight", f"{prefix}1.weight"])
    monkeypatch.setattr("fastmatch.checkpoint.tracing.build_empty", lambda path: torch.nn.Identity())
    merge_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
