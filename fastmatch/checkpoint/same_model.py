"""Refuse what is no model, and two folders of Hugging Face whose configs name different models, before a model is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastmatch._internal.json_files import read_json
from fastmatch._internal.states import prefix_before
from fastmatch.checkpoint.diffusion.lora import is_lora
from fastmatch.checkpoint.reader import CONFIG, Checkpoint
from fastmatch.permutations.files import SPEC

__all__ = ["check_is_model", "check_same_sizes", "check_same_type"]

SIZES = frozenset({
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "n_embd", "n_inner", "n_layer", "n_head", "d_model", "d_ff", "d_kv", "num_layers", "num_decoder_layers", "num_heads",
    "dim", "hidden_dim", "n_layers", "n_heads", "encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim",
    "hidden_sizes", "depths", "num_experts", "num_local_experts", "moe_intermediate_size",
})  # fmt: skip
"""Keys of a config that say how many hidden units, layers and heads there are. Models that differ in them are not aligned."""


def check_is_model(checkpoint: Checkpoint) -> None:
    """Raise ValueError for a file of permutations, and for one that holds a LoRA alone."""
    path = checkpoint.path
    if any(SPEC in header for header in checkpoint.metadata.values()):
        raise ValueError(
            f"{path}: holds permutations, as `fastmatch align --permutations` writes them; expected a checkpoint"
        )
    if path.is_file() and is_lora(checkpoint.headers, alone=True):
        raise ValueError(
            f"{path}: holds a LoRA, not a model; `fastmatch apply PERMUTATIONS {path}` permutes it for an aligned model"
        )


def check_same_type(a: Checkpoint, b: Checkpoint) -> None:
    """Raise ValueError if one is no model, or if two configs name different types of models and the tensors have different names.

    Some types have the same tensors, as Llama and Mistral, and one of two files may lack the head.
    """
    for checkpoint in (a, b):
        check_is_model(checkpoint)
    configs = [_config_of(checkpoint) for checkpoint in (a, b)]
    types = [config.get("model_type") for config in configs]
    if None in types or types[0] == types[1]:
        return
    if a.keys() <= b.keys() or b.keys() <= a.keys() or prefix_before(a, b) or prefix_before(b, a):
        return
    said = [_described(config) for config in configs]
    raise ValueError(
        f"{b.path}: holds a model of type {said[1]}, {a.path} one of type {said[0]}; architectures must be equal"
    )


def check_same_sizes(a: Checkpoint, b: Checkpoint) -> None:
    """Raise ValueError if two configs name models of different types or sizes, and the tensors differ.

    Raises:
        ValueError: see :func:`check_same_type`; or a number of hidden units, layers or heads differs. The keys are named.
    """
    check_same_type(a, b)
    shapes = [{name: tensor.shape for name, tensor in checkpoint.headers.items()} for checkpoint in (a, b)]
    if shapes[0] == shapes[1]:
        return
    first, second = (dict(_sizes(_config_of(checkpoint))) for checkpoint in (a, b))
    differ = [key for key in first if second.get(key, first[key]) != first[key]]
    if differ:
        said = [", ".join(f"{key} {config[key]}" for key in differ) for config in (first, second)]
        raise ValueError(
            f"{b.path}: its config.json says {said[1]}, that of {a.path} {said[0]}; architectures must be equal"
        )


def _config_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return the config of a folder; an empty one if there is none."""
    file = checkpoint.path / CONFIG
    return read_json(file) if file.is_file() else {}


def _described(config: Mapping[str, Any]) -> str:
    classes = config.get("architectures")
    named = f" ({', '.join(map(str, classes))})" if isinstance(classes, list) and classes else ""
    return f"{config['model_type']!r}{named}"


def _sizes(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the sizes that a config names, those of its parts with the part's name before them."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _sizes(value, f"{before}{key}.")
        elif key in SIZES and value is not None:
            yield before + key, value
