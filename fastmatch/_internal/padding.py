"""Mappings of inputs as tokenizers return them: lists become tensors, and sequences of several lengths are padded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["is_rows", "is_text", "padded", "takes"]

FILL = {"labels": -100, "label": -100}
"""What pads these entries; ``input_ids`` by the model's own padding token, all others by zeros."""


def is_text(value: Any) -> bool:
    """Whether a value is a text or a list of texts, which no model takes."""
    return isinstance(value, str) or (
        isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(v, str) for v in value)
    )


def is_rows(value: Any) -> bool:
    """Whether a value is a tensor with rows, an array, or a list of numbers, of lists of numbers or of tensors."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.ndim > 0
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(isinstance(v, (bool, int, float)) or _is_sequence(v) for v in value)


def _is_sequence(value: Any) -> bool:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.ndim == 1
    return isinstance(value, (list, tuple)) and all(isinstance(v, (bool, int, float)) for v in value)


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the forward pass of a model has an argument of that name."""
    try:
        return argument in inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return False


def padded(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the inputs with tensors in place of lists, padded on the right to the longest sequence.

    If ``input_ids`` are padded and there is no ``attention_mask`` although the model takes one, it is added.
    """
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) or not is_rows(value):
            found[name] = value
        elif isinstance(value, np.ndarray) or not _is_sequence(value[0]):
            found[name] = torch.as_tensor(value, device="cpu")
        else:
            rows = [torch.as_tensor(row, device="cpu") for row in value]
            fill = FILL.get(name, 0)
            if name == "input_ids":
                fill = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
            found[name] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
            lengths = [len(row) for row in rows]
            is_ragged = len(set(lengths)) > 1
            if (
                name == "input_ids"
                and is_ragged
                and "attention_mask" not in inputs
                and takes(model, "attention_mask")
            ):
                positions = torch.arange(max(lengths), device="cpu")
                found["attention_mask"] = (positions < torch.tensor(lengths, device="cpu")[:, None]).long()
    return found
