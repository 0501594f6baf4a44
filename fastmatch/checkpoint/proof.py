"""Proof of a structure that was traced from a config: on a small model of the same architecture.

The real model may not fit in memory twice in float64. A model of the same class with few layers and narrow ones has the
same names and runs the same operations, so a rule of the tracer that is wrong for the real one is wrong for it.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch

from fastmatch.checkpoint.structure import build_from, compared, config_inputs, config_of
from fastmatch.permutations.verify import Verification, verify
from fastmatch.spec import PermutationSpec

__all__ = ["LARGEST", "prove_config"]

log = logging.getLogger("fastmatch")

LAYERS = (
    "num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "n_layer", "n_layers",
)  # fmt: skip
INNER = (
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "encoder_ffn_dim",
    "decoder_ffn_dim", "d_ff", "n_inner", "hidden_dim",
)  # fmt: skip
HEADS = (
    "num_attention_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "n_head",
    "num_heads",
    "n_heads",
)
WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")
MOST_LAYERS, INNER_SIZE, VOCABULARY, HEAD = 2, 40, 128, 16
LARGEST = 20_000_000
"""Parameters above which the small model is not run."""


def prove_config(directory: str | Path, spec: PermutationSpec) -> Verification | None:
    """Verify a small model of a directory's architecture; None if there is none that moves as ``spec`` says.

    Args:
        directory: a folder with a config.json.
        spec: the structure that was traced from it.

    Raises:
        ValueError: permuting the small model changes its function.
    """
    config = copy.deepcopy(config_of(directory))
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        _shrink(part)
    try:
        torch_state = torch.get_rng_state()
        try:
            torch.manual_seed(0)
            model = build_from(config, directory, on_meta=False)
        finally:
            torch.set_rng_state(torch_state)
        if sum(p.numel() for p in model.parameters()) > LARGEST:
            return None
        inputs = config_inputs(model)
        small = PermutationSpec.trace(model, (), kwargs=inputs, outputs=compared)
        names = compared(model(**inputs))
    except Exception as error:  # whatever a model does with sizes it was not made for
        log.info("no small model of %s runs: %s", directory, error)
        return None
    if not _moves_alike(small, spec):
        return None
    return verify(model, small, (), kwargs=inputs, outputs=names)


def _shrink(config: Any) -> None:
    """Make a config small: few layers, narrow ones, few words. The ratio of query heads to key heads stays above one."""

    def present(names: tuple[str, ...]) -> list[str]:
        return [n for n in names if isinstance(getattr(config, n, None), int)]

    for name in present(LAYERS):
        setattr(config, name, min(getattr(config, name), MOST_LAYERS))
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[:MOST_LAYERS]
    for name in present(INNER):
        setattr(config, name, min(getattr(config, name), INNER_SIZE))
    heads = present(HEADS)
    groups = present(("num_key_value_heads",))
    for name in heads:
        shared = groups and getattr(config, groups[0]) < getattr(config, name)
        setattr(config, name, 4 if shared or not groups else 2)
    if groups and heads:
        config.num_key_value_heads = 2
    width = HEAD * getattr(config, heads[0]) if heads else None
    for name in present(WIDTHS):
        setattr(config, name, width or min(getattr(config, name), 64))
    for name in present(("head_dim", "d_kv")):
        setattr(config, name, HEAD)
    if isinstance(getattr(config, "vocab_size", None), int):
        config.vocab_size = min(config.vocab_size, VOCABULARY)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if isinstance(getattr(config, name, None), int) and getattr(config, name) >= VOCABULARY:
                setattr(config, name, 0)


def _moves_alike(small: PermutationSpec, spec: PermutationSpec) -> bool:
    """Whether the small model's parameters are among the real one's, and move along the same dimensions."""

    def moved(of: PermutationSpec) -> set[tuple[str, int]]:
        return {(axis.parameter, axis.dim) for group in of.groups.values() for axis in group.axes}

    shared = small.shapes.keys() & spec.shapes.keys()
    return shared == small.shapes.keys() and moved(small) == {x for x in moved(spec) if x[0] in shared}
