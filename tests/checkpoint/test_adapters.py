"""Adapters of peft follow their base: the aligned base with the moved adapter is the base with the adapter, aligned."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmatch as fm
from fastmatch.checkpoint import Checkpoint, align_checkpoints, apply_to_checkpoint, trace_config
from fastmatch.cli.main import main
from helpers.networks import fresh_seed

transformers = pytest.importorskip("transformers")

RANK = 3
LLAMA = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {
    "vocab_size": 40,
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 4,
    "n_positions": 16,
    "tie_word_embeddings": False,
}
LAYERS = {
    "Llama": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"],
    "GPT2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
}
START = {"Llama": "model.layers.0.", "GPT2": "transformer.h.0."}
EMBEDDING = {"Llama": "model.embed_tokens", "GPT2": "transformer.wte"}


def make_base(folder, kind):
    torch.manual_seed(fresh_seed())
    options = LLAMA if kind == "Llama" else GPT2
    config = getattr(transformers, f"{kind}Config")(**options)
    name = "LlamaForCausalLM" if kind == "Llama" else "GPT2LMHeadModel"
    getattr(transformers, name)(config).save_pretrained(folder)
    return Checkpoint(folder)


def make_adapter(folder, base, kind, **config):
    """Write an adapter as peft does: factors, magnitudes, an embedding, and a layer that it holds whole."""
    generator = torch.Generator().manual_seed(fresh_seed())

    def noise(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    state = {}
    for layer in LAYERS[kind]:
        name = START[kind] + layer
        rows, columns = base[f"{name}.weight"].shape
        outputs, inputs = (columns, rows) if kind == "GPT2" else (rows, columns)
        state[f"base_model.model.{name}.lora_A.weight"] = noise(RANK, inputs)
        state[f"base_model.model.{name}.lora_B.weight"] = noise(outputs, RANK)
        state[f"base_model.model.{name}.lora_magnitude_vector"] = noise(outputs)
    words, width = base[f"{EMBEDDING[kind]}.weight"].shape
    state[f"base_model.model.{EMBEDDING[kind]}.lora_embedding_A"] = noise(RANK, words)
    state[f"base_model.model.{EMBEDDING[kind]}.lora_embedding_B"] = noise(width, RANK)
    state["base_model.model.lm_head.weight"] = noise(*base["lm_head.weight"].shape)
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"base_model_name_or_path": "base", "fan_in_fan_out": kind == "GPT2", **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def with_adapter(base, adapter, kind):
    """The base's tensors with what the adapter adds, and its magnitudes as further tensors."""
    state = {name: base[name].double() for name in base}
    found = load_file(adapter / "adapter_model.safetensors")
    magnitudes = {}
    for layer in LAYERS[kind]:
        name = f"base_model.model.{START[kind]}{layer}"
        product = found[f"{name}.lora_B.weight"] @ found[f"{name}.lora_A.weight"]
        weight = f"{START[kind]}{layer}.weight"
        state[weight] = state[weight] + (product.T if kind == "GPT2" else product)
        # A magnitude belongs to the row of an output; scaling the rows shows where it went.
        scale = found[f"{name}.lora_magnitude_vector"]
        state[weight] = state[weight] * (scale if kind == "GPT2" else scale[:, None])
    name = f"base_model.model.{EMBEDDING[kind]}"
    product = (found[f"{name}.lora_embedding_B"] @ found[f"{name}.lora_embedding_A"]).T
    state[f"{EMBEDDING[kind]}.weight"] = state[f"{EMBEDDING[kind]}.weight"] + product
    return {**state, "lm_head.weight": found["base_model.model.lm_head.weight"], **magnitudes}


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_a_moved_adapter_adds_to_the_aligned_base_what_it_added_to_the_base(tmp_path, kind):
    base = make_base(tmp_path / "base", kind)
    make_adapter(tmp_path / "adapter", base, kind)
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")
    spec = trace_config(tmp_path / "base")
    alignment = fm.Alignment(spec.random(torch.Generator().manual_seed(fresh_seed())), spec)
    assert apply_to_checkpoint(alignment, tmp_path / "adapter", tmp_path / "moved") == "LoRA"
    aligned = alignment.apply(dict(base))
    expected = alignment.apply(with_adapter(base, tmp_path / "adapter", kind))
    found = with_adapter(aligned, tmp_path / "moved", kind)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)
    assert sorted(p.name for p in (tmp_path / "moved").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
    ]  # fmt: skip


def test_an_adapter_in_place_of_a_model_is_told_what_to_do(tmp_path, capsys):
    base = make_base(tmp_path / "base", "Llama")
    make_adapter(tmp_path / "adapter", base, "Llama")
    for pair in (("base", "adapter"), ("adapter", "base")):
        with pytest.raises(
            ValueError, match="holds an adapter of base, not a model; align base with --permutations"
        ):
            align_checkpoints(*(tmp_path / x for x in (*pair, "out")))
    arguments = ["align", str(tmp_path / "base"), str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "holds an adapter of base" in capsys.readouterr().err


def test_a_tensor_of_an_adapter_without_a_rule_is_refused_by_name(tmp_path):
    base = make_base(tmp_path / "base", "Llama")
    make_adapter(tmp_path / "adapter", base, "Llama")
    spec = trace_config(tmp_path / "base")
    alignment = fm.Alignment(spec.random(), spec)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    name = "base_model.model.prompt_encoder.embedding"
    save_file({**load_file(file), name: torch.ones(3)}, file)
    with pytest.raises(ValueError, match=f"tensor '{name}' is no factor of a LoRA"):
        apply_to_checkpoint(alignment, tmp_path / "adapter", tmp_path / "moved")
    assert not (tmp_path / "moved").exists()
