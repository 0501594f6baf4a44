"""A structure traced from a config is proved on a small model of the same architecture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastmatch as fm
from fastmatch.checkpoint import align_checkpoints, trace_config
from fastmatch.checkpoint.proof import prove_config
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
