"""A structure traced from a config is proved on a small model of the same architecture."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import fastmatch as fm
from fastmatch.checkpoint import align_checkpoints, trace_config, verify_checkpoints
from fastmatch.checkpoint.proof import prove_config
from fastmatch.checkpoint.verify import DifferentFunction
from helpers.families import FAMILIES


def saved(name: str, folder, seed: int = 0):
    model = next(family for family in FAMILIES if family.name == name).build(seed)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["Llama", "OPT", "EfficientNet", "Mixtral", "T5"])
def test_a_small_model_of_the_architecture_is_proved(name, tmp_path):
    folder = saved(name, tmp_path)
    before = torch.get_rng_state()
    proof = prove_config(folder, trace_config(folder))
    assert proof is not None
    assert proof.error < 1e-12
    assert torch.equal(before, torch.get_rng_state())


def test_a_structure_that_moves_otherwise_is_not_proved(tmp_path):
    folder = saved("Llama", tmp_path)
    spec = trace_config(folder)
    assert prove_config(folder, spec.select([])) is None


def test_alignments_say_whether_they_are_proved(tmp_path):
    a, b = saved("Llama", tmp_path / "a", 1), saved("Llama", tmp_path / "b", 2)
    alignment = align_checkpoints(a, b, tmp_path / "out")
    assert alignment.proof is not None
    assert "not proved" not in repr(alignment)
    given = align_checkpoints(a, b, tmp_path / "other", spec=alignment.spec)
    assert given.proof is None
    assert repr(given).endswith(", not proved)")


def test_state_dicts_are_not_proved():
    a, b = (
        torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)) for _ in range(2)
    )
    x = torch.randn(4, 6)
    whole = fm.align(a, b, x)
    assert whole.proof is not None
    assert whole.proof.groups == ("0",)
    assert whole.compose(whole.invert()).proof is whole.proof
    assert fm.align(a, b, x, verify=False).proof is None
    states = fm.align(a.state_dict(), b.state_dict(), spec=whole.spec)
    assert states.proof is None
    assert "not proved" in repr(states)
    assert replace(whole, proof=None).compose(whole).proof is None
    assert [m.proof is not None for m in fm.align_many([a, b], x)] == [True, True]


def test_every_copy_of_a_tied_tensor_in_a_file_is_compared(tmp_path):
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "b")
    file = tmp_path / "b" / "model.safetensors"
    tensors = load_file(file)
    shutil.copytree(tmp_path / "b", tmp_path / "out")

    def verify(here, there):
        for folder, copy in (("b", here), ("out", there)):
            save_file({**tensors, head: copy}, tmp_path / folder / file.name, metadata={"format": "pt"})
        return verify_checkpoints(tmp_path / "b", tmp_path / "out")

    own, other = tensors[embedding].clone(), torch.randn(30, 8)
    assert verify(own, own).outputs == 1
    assert verify(other, other).outputs == 2
    tensors[embedding] = tensors[embedding].bfloat16().float()
    rounded = tensors[embedding].bfloat16()
    assert verify(rounded, rounded).outputs == 1, "the same numbers in another element type"
    own = tensors[embedding].clone()
    for here, there in ((own, other), (other, own)):
        with pytest.raises(DifferentFunction, match="outputs differ"):
            verify(here, there)


def test_every_copy_of_a_tied_buffer_in_a_file_is_compared(tmp_path):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    model = Shared()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, change in (("a", {}), ("b", {"second.running_mean": torch.ones(4)})):
        save_file({**state, **change}, tmp_path / f"{name}.safetensors")
    with pytest.raises(DifferentFunction, match="copy 2 of tied tensors"):
        verify_checkpoints(
            tmp_path / "a.safetensors",
            tmp_path / "b.safetensors",
            model=model,
            example_inputs=torch.randn(3, 4),
        )
