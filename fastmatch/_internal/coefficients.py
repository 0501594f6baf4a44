"""Merge coefficients: checks, and a note of them on a merged module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

__all__ = ["check_weights", "remember_weights", "remembered_weights"]


_NOTE = "fastmatch_merge_weights"


def check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return one finite weight per model; equal weights for None.

    Raises:
        ValueError: the number of weights is not ``count``, or one is not finite.
    """
    if weights is None:
        return [1.0 / count] * count
    if isinstance(weights, (str, Mapping)) or not isinstance(weights, Iterable):
        raise TypeError(f"weights: expected {count} numbers, got {type(weights).__name__}")
    try:
        values = [float(w) for w in weights]
    except (TypeError, ValueError) as error:
        raise TypeError(f"weights: expected {count} numbers, got {weights!r}") from error
    if len(values) != count:
        raise ValueError(f"weights: expected {count}, one per model, got {len(values)}")
    if not all(abs(w) < float("inf") for w in values):
        raise ValueError(f"weights: expected finite numbers; got {values}")
    return values


def remember_weights(model: nn.Module, weights: Sequence[float]) -> nn.Module:
    """Note on a merged module the weights it was made with, for a later renormalization; copies keep the note."""
    model.__dict__[_NOTE] = tuple(float(w) for w in weights)
    return model


def remembered_weights(model: nn.Module) -> tuple[float, ...] | None:
    """Return the weights that a module was merged with; None if there is no note."""
    return model.__dict__.get(_NOTE)
