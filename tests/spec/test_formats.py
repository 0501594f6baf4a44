"""Specs of other libraries, from their documented forms."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastmatch as fm
from fastmatch.permutations.verify import verify
from fastmatch.spec.formats import (
    SizedGroup,
    from_axes,
    from_mergekit,
    from_pleas,
    to_axes,
    to_layers_and_axes,
    to_mergekit,
    to_pleas,
)

AXES = {
    "0.weight": ("P0", None), "0.bias": ("P0", None, None),  # longer than the rank
    "2.weight": ("P1", "P0"), "2.bias": ("P1",), "4.weight": (None, "P1"), "4.bias": (None,),
    "scale": (), "absent.weight": ("P0", "P1"),
}  # fmt: skip


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def shapes_of(model):
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


def axes_of(spec):
    return {frozenset(group.axes) for group in spec.groups.values()}


def by_group():
    spec = {}
    for parameter, groups in AXES.items():
        for dim, group in enumerate(groups):
            if group:
                spec.setdefault(group, []).append((parameter, dim))
    return spec


@pytest.mark.parametrize("source", [
    AXES,
    SimpleNamespace(axes_to_perm=AXES, perm_to_axes=by_group()),
    SimpleNamespace(perm_to_axes=by_group()),
    SimpleNamespace(layer_and_axes_to_perm=AXES, perm_to_layers_and_axes=by_group()),
])  # fmt: skip
def test_hand_written_specs_are_what_tracing_finds(model, source):
    spec = from_axes(source, {**shapes_of(model), "scale": ()})
    x = torch.randn(2, 4)
    assert axes_of(spec) == axes_of(fm.PermutationSpec.trace(model, x))
    assert list(spec.groups) == ["P0", "P1"]


def test_axes_go_out_and_come_back(model):
    traced = fm.PermutationSpec.trace(model, torch.randn(2, 4))
    written = to_axes(traced)
    assert written.axes_to_perm["2.weight"] == ("2", "0")
    assert set(written.perm_to_axes["0"]) == {("0.weight", 0), ("0.bias", 0), ("2.weight", 1)}
    renamed = to_layers_and_axes(traced)
    assert renamed.layer_and_axes_to_perm == written.axes_to_perm
    for source in (written, renamed):
        assert axes_of(from_axes(source, shapes_of(model))) == axes_of(traced)
    assert axes_of(from_pleas(to_pleas(traced), shapes_of(model))) == axes_of(traced)
    text = json.dumps(to_mergekit(traced))
    assert axes_of(from_mergekit(json.loads(text), shapes_of(model))) == axes_of(traced)


def test_pleas_groups_are_told_apart_by_identity(model):
    p0, p1 = SizedGroup(8), SizedGroup(6)
    source = {(p, d): (p0, p1)[int(g[1])] for p, gs in AXES.items() for d, g in enumerate(gs) if g}
    verify(model, from_pleas(source, shapes_of(model)), torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"has size 7, 0\.weight:0 has length 8"):
        from_pleas({("0.weight", 0): SizedGroup(7)}, shapes_of(model))


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "pre_weights": [
        {"name": "model.embed_tokens.weight", "is_embed": True, "output_space": "running_residual"}
    ],
    "num_layers_config_key": "num_hidden_layers",
    "layer_templates": {
        "weights": [
            {"name": "model.layers.${layer_index}.input_layernorm.weight", "input_space": "running_residual"},
            {"name": "model.layers.${layer_index}.self_attn.q_proj.weight", "input_space": "running_residual",
             "output_space": "attn_qk_${layer_index}", "head_split": "output"},
            {"name": "model.layers.${layer_index}.self_attn.k_proj.weight", "input_space": "running_residual",
             "output_space": "attn_qk_${layer_index}", "head_split": "output"},
            {"name": "model.layers.${layer_index}.self_attn.v_proj.weight", "input_space": "running_residual",
             "output_space": "attn_v_${layer_index}", "head_split": "output"},
            {"name": "model.layers.${layer_index}.self_attn.o_proj.weight",
             "input_space": "attn_v_${layer_index}", "output_space": "running_residual",
             "head_split": "input"},
            {"name": "model.layers.${layer_index}.post_attention_layernorm.weight",
             "input_space": "running_residual"},
            {"name": "model.layers.${layer_index}.mlp.gate_proj.weight", "input_space": "running_residual",
             "output_space": "up_${layer_index}"},
            {"name": "model.layers.${layer_index}.mlp.up_proj.weight", "input_space": "running_residual",
             "output_space": "up_${layer_index}"},
            {"name": "model.layers.${layer_index}.mlp.down_proj.weight", "input_space": "up_${layer_index}",
             "output_space": "running_residual"},
        ]
    },
    "post_weights": [
        {"name": "model.norm.weight", "input_space": "running_residual"},
        {"name": "lm_head.weight", "input_space": "running_residual", "is_embed": True},
    ],
}  # fmt: skip


def test_a_mergekit_architecture_with_heads_keeps_the_function():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    spec = from_mergekit(LLAMA, shapes_of(model), layers=2, head_dim=4)
    assert list(spec.groups) == ["running_residual", "attn_v_0", "up_0", "attn_v_1", "up_1"]
    assert spec.groups["attn_v_0"].size == 4
    x = torch.randint(0, 30, (2, 5))
    # Norms compute in float32 inside, whatever the model's type.
    found = verify(model, spec, (), kwargs={"input_ids": x}, tolerance=1e-5)
    assert found.groups == tuple(spec.groups)
    with pytest.raises(ValueError, match="head_dim: needed"):
        from_mergekit(LLAMA, shapes_of(model), layers=2)


def test_what_does_not_fit_is_named(model):
    shapes = shapes_of(model)
    with pytest.raises(ValueError, match=r"'P' has 8 units on 0\.weight:0, but 2\.weight:0 has length 6"):
        from_axes({"0.weight": ("P",), "2.weight": ("P",)}, shapes)
    with pytest.raises(ValueError, match="none of its parameters"):
        from_axes({"x": ("P",)}, shapes)
    with pytest.raises(TypeError, match="expected axes_to_perm"):
        from_axes(3, shapes)
    flat = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    spec = fm.PermutationSpec.trace(flat, torch.randn(2, 1, 4, 4))
    for write in (to_axes, to_layers_and_axes, to_pleas, to_mergekit):
        with pytest.raises(
            ValueError, match=r"group '0' moves a part of a dimension, 2\.weight:1\[start 0, block 4\]"
        ):
            write(spec)
