"""Files whose tensors have other names than the model's parameters: renamed layers, one tensor an expert."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastmatch.checkpoint import (
    Checkpoint,
    MergeOptions,
    WriteOptions,
    align_checkpoints,
    align_many_checkpoints,
    trace_config,
    verify_checkpoints,
)
from fastmatch.checkpoint.names import RenamedCheckpoint, layout_of
from fastmatch.checkpoint.pairs import layout_for
from fastmatch.checkpoint.reader import SINGLE
from fastmatch.checkpoint.structure import bind
from fastmatch.checkpoint.writer import write_like
from fastmatch.permutations.apply import permute_tensor
from helpers.networks import fresh_seed

pytest.importorskip("transformers.core_model_loading")

import transformers
from transformers import conversion_mapping, core_model_loading

from helpers.families import FAMILIES
from helpers.grid import sampled

EACH = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
NAMED = {family.name: family for family in FAMILIES}


def save(family, folder):
    """A family's random model in a directory as transformers writes it."""
    transformers.logging.disable_progress_bar()
    model = family.build(fresh_seed())
    model.save_pretrained(folder)
    return model


def permute(source, out):
    """The same directory with every group moved at random."""
    checkpoint, traced = Checkpoint(source), trace_config(source)
    layout = layout_for(source, checkpoint, traced)
    named = RenamedCheckpoint(checkpoint, layout)
    spec = bind(traced, named.headers, str(source))
    permutations = spec.random()
    moved = {name: permute_tensor(named[name], name, spec, permutations) for name in named}
    write_like(checkpoint, out, lambda name: moved[layout[name].parameter][layout[name].index or ...])


@EACH
def test_a_directory_is_read_as_the_model_that_was_saved(family, tmp_path):
    model = save(family, tmp_path)
    checkpoint = Checkpoint(tmp_path)
    named = RenamedCheckpoint(checkpoint, layout_of(model, checkpoint.headers, "a"))
    own, assembled = model.state_dict(), dict(named)
    assert assembled.keys() <= own.keys()
    assert {own[name].data_ptr() for name in own} == {own[name].data_ptr() for name in assembled}
    assert all(torch.equal(own[name], tensor) for name, tensor in assembled.items())
    assert {k: v.shape for k, v in named.headers.items()} == {k: v.shape for k, v in assembled.items()}


@sampled("family", FAMILIES)
def test_a_permuted_directory_is_the_same_function(family, tmp_path):
    save(family, tmp_path / "a")
    permute(tmp_path / "a", tmp_path / "b")
    assert verify_checkpoints(tmp_path / "a", tmp_path / "b").error < 1e-9


@pytest.mark.parametrize("name", ["ViT", "GPT-NeoX", "Mixtral", "Qwen-MoE"])
def test_a_planted_directory_is_recovered_under_the_names_of_its_file(name, tmp_path):
    save(NAMED[name], tmp_path / "a")
    permute(tmp_path / "a", tmp_path / "b")
    align_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / "out")
    expected, found = (load_file(tmp_path / x / SINGLE) for x in ("a", "out"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_a_merge_of_experts_is_the_mean_of_its_parts(tmp_path):
    save(NAMED["Mixtral"], tmp_path / "a")
    save(NAMED["Mixtral"], tmp_path / "b")
    align_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / "aligned")
    align_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / "merged", write=WriteOptions(merge=0.5))
    a, aligned, merged = (load_file(tmp_path / x / SINGLE) for x in ("a", "aligned", "merged"))
    assert all(torch.allclose(merged[k], (a[k] + aligned[k]) / 2, rtol=1e-12, atol=0) for k in a)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight"),
            "hold 3840 of its 4800 entries",
        ),
        (
            lambda s: s.update({"model.layers.0.block_sparse_moe.experts.1.w1.weight": torch.ones(40, 23)}),
            r"experts.1.w1.weight' of shape \(40, 23\) does not fit into",
        ),
        (
            lambda s: s.update({"model.layers.0.block_sparse_moe.experts.5.w2.weight": torch.ones(24, 40)}),
            "experts.5.w2.weight' of shape .* does not fit into",
        ),
        (lambda s: s.update({"model.layers.0.mlp.gate.weight": torch.ones(5, 24)}), "under several names"),
    ],
)
def test_experts_that_do_not_fill_their_stack_are_refused(change, message, tmp_path):
    model = save(NAMED["Mixtral"], tmp_path)
    state = load_file(tmp_path / SINGLE)
    change(state)
    save_file(state, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=message):
        layout_of(model, Checkpoint(tmp_path).headers, str(tmp_path))


def test_a_conversion_that_is_not_followed_is_named(monkeypatch, tmp_path):
    model = save(NAMED["Llama"], tmp_path)
    converter = core_model_loading.WeightConverter(
        source_patterns="mlp.up_proj.weight", target_patterns="mlp.up_proj.weight",
        operations=[core_model_loading.Transpose(0, 1)],
    )  # fmt: skip
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [converter])
    with pytest.raises(ValueError, match=r"up_proj.weight' are made into .* by Transpose on loading"):
        layout_of(model, Checkpoint(tmp_path).headers, str(tmp_path))


def test_a_spec_in_the_names_of_the_file_is_taken_as_it_is(tmp_path):
    save(NAMED["Mixtral"], tmp_path)
    checkpoint, spec = Checkpoint(tmp_path), trace_config(tmp_path)
    attention = [n for n, g in spec.groups.items() if all("self_attn" in x.parameter for x in g.axes)]
    layout = layout_for(tmp_path, checkpoint, spec.select(attention))
    assert {name: chunk.parameter for name, chunk in layout.items()} == {name: name for name in checkpoint}


def test_a_file_of_the_model_without_its_head_gets_the_prefix(tmp_path):
    """As the first language models were saved: GPT-2's file has wte.weight, its class transformer.wte.weight."""
    model = save(NAMED["GPT-2"], tmp_path / "a")
    state = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "a" / SINGLE).items()}
    save_file(state, tmp_path / "a" / SINGLE)
    layout = layout_of(model, state, "a")
    assert layout["wte.weight"].parameter == "transformer.wte.weight"
    permute(tmp_path / "a", tmp_path / "b")
    assert load_file(tmp_path / "b" / SINGLE).keys() == state.keys()
    assert verify_checkpoints(tmp_path / "a", tmp_path / "b").error < 1e-9


def save_tied_and_permuted(folder):
    """Write a Llama whose table of words is its head too, and a permuted one, as a and b."""
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(fresh_seed())
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "a")
    permute(folder / "a", folder / "b")


@pytest.mark.parametrize("holder", ["a", "b"])
def test_many_of_which_one_stores_a_tied_tensor_twice_are_merged(holder, tmp_path):
    save_tied_and_permuted(tmp_path)
    permute(tmp_path / "a", tmp_path / "c")
    state = load_file(tmp_path / holder / SINGLE)
    save_file(
        {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, tmp_path / holder / SINGLE
    )
    align_many_checkpoints(
        [tmp_path / x for x in "abc"], tmp_path / "out", merge=MergeOptions((0.5, 0.25, 0.25))
    )
    found, first = (load_file(tmp_path / x / SINGLE) for x in ("out", "a"))
    assert found.keys() == first.keys()
    assert all(torch.allclose(found[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("holder", ["a", "b"])
def test_a_tied_tensor_that_only_one_of_two_files_stores_twice_is_no_difference(holder, tmp_path):
    transformers.logging.disable_progress_bar()
    save_tied_and_permuted(tmp_path)
    path = tmp_path / holder / SINGLE
    state = load_file(path)
    assert "lm_head.weight" not in state
    copied = {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}
    save_file(copied, path)
    align_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / "out")
    found = load_file(tmp_path / "out" / SINGLE)
    assert found.keys() == load_file(tmp_path / "b" / SINGLE).keys()
    assert all(torch.equal(v, load_file(tmp_path / "a" / SINGLE).get(k, v)) for k, v in found.items())
    assert verify_checkpoints(tmp_path / "out", tmp_path / "out").outputs
    (tmp_path / "out" / SINGLE).unlink()
    save_file({**copied, "lm_head.weight": torch.randn(50, 16)}, path)
    with pytest.raises(ValueError, match=r"tensor 'lm_head\.weight'"):
        align_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / "out2")
