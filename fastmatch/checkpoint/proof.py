"""Proof of a structure that was traced from a config: on a small model of the same architecture.

The real model may not fit in memory twice in float64. A model of the same class with few layers and narrow ones has the
same names and runs the same operations, so a rule of the tracer that is wrong for the real one is wrong for it.
"""

from __future__ import annotations

import copy
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from fastmatch._internal.randomness import random_numbers_kept
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
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
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
    for narrow in (True, False):
        config = copy.deepcopy(config_of(directory))
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            _shrink(part, narrow)
        try:
            small, model, inputs = _small_model(config, directory)
        except Exception as error:  # whatever a model does with sizes it was not made for
            log.info("no small model of %s runs: %s", directory, error)
            continue
        if _moves_alike(small, spec):
            return verify(model, small, (), kwargs=inputs, outputs=compared(model(**inputs)))
    return None


def _small_model(config: Any, directory: str | Path) -> tuple[PermutationSpec, nn.Module, dict[str, Any]]:
    """Return what a trace of a config's model finds, the model and its inputs.

    Raises:
        ValueError: the model is too large.
    """
    empty = build_from(config, directory, on_meta=True)
    count = sum(p.numel() for p in empty.parameters())
    if count > LARGEST:
        raise ValueError(f"it has {count} parameters")
    with random_numbers_kept(0):
        model = build_from(config, directory, on_meta=False)
    inputs = config_inputs(model)
    return PermutationSpec.trace(model, (), kwargs=inputs, outputs=compared), model, inputs


def _shrink(config: Any, narrow: bool) -> None:
    """Make a config small: few layers and words; ``narrow``: few units, with several query heads per key head if there are."""

    def present(names: tuple[str, ...]) -> list[str]:
        return [n for n in names if isinstance(getattr(config, n, None), int)]

    sizes: dict[str, Any] = {name: min(getattr(config, name), MOST_LAYERS) for name in present(LAYERS)}
    sizes |= {name: min(getattr(config, name), VOCABULARY) for name in present(("vocab_size",))}
    sizes |= {name: min(getattr(config, name), VOCABULARY - 1) for name in present(TOKENS)}
    if isinstance(getattr(config, "layer_types", None), list):
        sizes["layer_types"] = config.layer_types[:MOST_LAYERS]
    if narrow:
        sizes |= {name: min(getattr(config, name), INNER_SIZE) for name in present(INNER)}
        heads, groups = present(HEADS), present(("num_key_value_heads",))
        shared = bool(heads and groups) and config.num_key_value_heads < getattr(config, heads[0])
        count = 2 if groups and not shared else 4
        sizes |= dict.fromkeys(heads, count) | dict.fromkeys(groups, 2)
        sizes |= {name: HEAD * count if heads else min(getattr(config, name), 64) for name in present(WIDTHS)}
        sizes |= dict.fromkeys(present(("head_dim", "d_kv")), HEAD)
    for name, value in sizes.items():
        with suppress(AttributeError):  # a property that follows from others
            setattr(config, name, value)


def _moves_alike(small: PermutationSpec, spec: PermutationSpec) -> bool:
    """Whether the small model's parameters are among the real one's, and move along the same dimensions."""

    def moved(of: PermutationSpec) -> set[tuple[str, int]]:
        return {(axis.parameter, axis.dim) for group in of.groups.values() for axis in group.axes}

    shared = small.shapes.keys() & spec.shapes.keys()
    return shared == small.shapes.keys() and moved(small) == {x for x in moved(spec) if x[0] in shared}
