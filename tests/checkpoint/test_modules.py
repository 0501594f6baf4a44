"""Folders with more than a model: layers of sentence-transformers, and heads for other classes."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmatch as fm
from fastmatch.checkpoint import (
    Checkpoint,
    WriteOptions,
    align_checkpoints,
    apply_to_checkpoint,
    trace_config,
    verify_checkpoints,
)
from fastmatch.checkpoint.writer import write_like
from fastmatch.permutations.apply import permute_tensor
from helpers.networks import fresh_seed

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 20,
}  # fmt: skip


def save_bert(folder, kind, **options):
    torch.manual_seed(fresh_seed())
    model = getattr(transformers, kind)(transformers.BertConfig(**SIZES, **options))
    model.save_pretrained(folder)
    return model


def permuted(source, target):
    checkpoint, spec = Checkpoint(source), trace_config(source)
    planted = spec.random()
    write_like(checkpoint, target, lambda name: permute_tensor(checkpoint[name], name, spec, planted))


def add_modules(folder, weight):
    """Make a folder one of sentence-transformers, with pooling and a dense layer that reads the pooled output."""
    modules = [{"path": name, "type": "x"} for name in ("", "1_Pooling", "2_Dense", "../other")]
    (folder / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Pooling", "2_Dense"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    save_file({"linear.weight": weight}, folder / "2_Dense" / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def sentences(tmp_path):
    """a and b: folders of sentence-transformers, b a with its units moved; their dense layers differ."""
    save_bert(tmp_path / "a", "BertModel")
    permuted(tmp_path / "a", tmp_path / "b")
    for number, name in enumerate("ab"):
        add_modules(tmp_path / name, torch.full((3, 16), float(number)))
    return tmp_path


def embedding(folder):
    """The output of the dense layer on the mean over words."""
    model = transformers.BertModel.from_pretrained(folder).double().eval()
    words = torch.arange(12).reshape(2, 6)
    pooled = model(words).last_hidden_state.mean(1)
    return pooled @ load_file(folder / "2_Dense" / "model.safetensors")["linear.weight"].double().T


def test_a_dense_layer_after_the_model_is_carried_and_reads_what_it_read(sentences, caplog):
    random = torch.randn(3, 16)
    save_file({"linear.weight": random}, sentences / "b" / "2_Dense" / "model.safetensors")
    with caplog.at_level(logging.WARNING, logger="fastmatch"):
        alignment = align_checkpoints(*(sentences / x for x in ("a", "b", "out")))
    assert alignment.moved
    assert not [r for r in caplog.records if r.name == "fastmatch"]
    assert (sentences / "out" / "2_Dense" / "config.json").is_file()
    torch.testing.assert_close(embedding(sentences / "out"), embedding(sentences / "b"))
    apply_to_checkpoint(alignment, sentences / "b", sentences / "again")
    torch.testing.assert_close(embedding(sentences / "again"), embedding(sentences / "b"))


def test_dense_layers_after_two_models_must_be_equal(sentences):
    with pytest.raises(ValueError, match=r"tensor '2_Dense.linear.weight' differs"):
        verify_checkpoints(sentences / "a", sentences / "b")
    save_file({"linear.weight": torch.zeros(3, 16)}, sentences / "b" / "2_Dense" / "model.safetensors")
    assert verify_checkpoints(sentences / "a", sentences / "b").error < 1e-12


def test_a_merge_merges_the_dense_layers_too(sentences):
    align_checkpoints(*(sentences / x for x in ("a", "b", "out")), write=WriteOptions(merge=0.25))
    dense = load_file(sentences / "out" / "2_Dense" / "model.safetensors")["linear.weight"]
    assert torch.equal(dense, torch.full((3, 16), 0.25))


def test_a_dense_layer_that_only_one_folder_has_is_no_difference(sentences):
    shutil.rmtree(sentences / "a" / "2_Dense")
    align_checkpoints(*(sentences / x for x in ("a", "b", "out")))
    assert Checkpoint(sentences / "out").modules.keys() == {"2_Dense"}
    align_checkpoints(*(sentences / x for x in ("b", "a", "back")))
    assert not Checkpoint(sentences / "back").modules


def test_a_dense_layer_behind_an_order_that_may_change_is_left_out_and_named(tmp_path, caplog):
    save_bert(tmp_path / "a", "BertForMaskedLM")  # only its logits keep their order
    permuted(tmp_path / "a", tmp_path / "b")
    add_modules(tmp_path / "b", torch.ones(3, 16))
    with caplog.at_level(logging.WARNING, logger="fastmatch"):
        align_checkpoints(*(tmp_path / x for x in ("a", "b", "out")))
    assert not (tmp_path / "out" / "2_Dense").exists()
    assert "order of what they read may change: 2_Dense" in caplog.text


def test_a_head_for_other_classes_is_not_matched_and_named(tmp_path, caplog):
    torch.manual_seed(fresh_seed())
    save_bert(tmp_path / "a", "BertForSequenceClassification", num_labels=5)
    save_bert(tmp_path / "c", "BertForSequenceClassification", num_labels=3)
    source, head = (
        load_file(tmp_path / "a" / "model.safetensors"),
        load_file(tmp_path / "c" / "model.safetensors"),
    )
    body = {k: v for k, v in source.items() if not k.startswith("classifier.")}
    save_file({**head, **body}, tmp_path / "c" / "model.safetensors", metadata={"format": "pt"})
    permuted(tmp_path / "c", tmp_path / "b")
    with caplog.at_level(logging.WARNING, logger="fastmatch"):
        align_checkpoints(*(tmp_path / x for x in ("a", "b", "out")), write=WriteOptions(merge=0.5))
    said = [r.getMessage() for r in caplog.records if r.name == "fastmatch"]
    assert len(said) == 1
    assert "classifier.bias (3,), not (5,), classifier.weight (3, 16), not (5, 16)" in said[0]
    out = Checkpoint(tmp_path / "out")
    # The head is B's, in the order of the units that A has.
    assert all(torch.equal(out[k], v) for k, v in Checkpoint(tmp_path / "c").items())


def test_permutations_move_a_model_with_a_head_for_other_classes(tmp_path, caplog):
    for name, labels in (("five", 5), ("three", 3)):
        save_bert(tmp_path / name, "BertForSequenceClassification", num_labels=labels)
    spec = trace_config(tmp_path / "five")
    alignment = fm.Alignment(spec.random(), spec)
    apply_to_checkpoint(alignment, tmp_path / "three", tmp_path / "out")
    assert verify_checkpoints(tmp_path / "three", tmp_path / "out").error < 1e-12
    before, after = Checkpoint(tmp_path / "three"), Checkpoint(tmp_path / "out")
    name = "classifier.weight"
    assert torch.equal(after[name], permute_tensor(before[name], name, spec, alignment.permutations))
    assert not torch.equal(after[name], before[name])
    (said,) = (r.getMessage() for r in caplog.records if r.name == "fastmatch")
    assert "classifier.bias (3,), not (5,), classifier.weight (3, 16), not (5, 16)" in said


def test_another_width_is_still_refused(tmp_path):
    save_bert(tmp_path / "a", "BertModel")
    save_bert(tmp_path / "b", "BertModel")
    state = load_file(tmp_path / "a" / "model.safetensors")
    name = "encoder.layer.0.intermediate.dense.bias"
    save_file({**state, name: torch.zeros(23)}, tmp_path / "a" / "model.safetensors")
    with pytest.raises(ValueError, match=rf"tensor '{name}' has shape \(24,\)"):
        align_checkpoints(*(tmp_path / x for x in ("a", "b", "out")))


def test_a_spec_of_the_user_is_no_reason_to_trust_the_order(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    spec = fm.PermutationSpec.trace(model, torch.zeros(2, 3))
    for name in "ab":
        (tmp_path / name).mkdir()
        save_file(model.state_dict(), tmp_path / name / "model.safetensors")
        add_modules(tmp_path / name, torch.ones(3, 2))
    align_checkpoints(*(tmp_path / x for x in ("a", "b", "out")), spec=spec)
    assert not (tmp_path / "out" / "2_Dense").exists()
