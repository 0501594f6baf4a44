"""Distances between models in the space of their parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from fastmatch._internal.states import State, check_same_architecture, state_of
from fastmatch.evaluation.table import Table

__all__ = ["distances"]


def distances(models: Mapping[str, nn.Module | State]) -> Table:
    """Return the L2 distance between the parameters of every two models.

    All floating point tensors of the state dict count, except running statistics.

    Example:
        >>> aligned = fm.align(model_a, model_b, x).apply(model_b)
        >>> table = fm.distances({"a": model_a, "b": model_b, "b aligned": aligned})

    Args:
        models: name -> module or state dict of one architecture, at least two. The initialization is welcome too.

    Returns:
        A :class:`fastmatch.Table` with the columns ``first``, ``second``, ``distance`` and ``relative``: the distance
        divided by the geometric mean of the two norms.

    Raises:
        TypeError: something is neither a module nor a state dict.
        ValueError: fewer than two models, or different architectures.
    """
    if len(models) < 2:
        raise ValueError(f"models: expected at least two, got {len(models)}")
    states = {key: state_of(m, f"models[{key!r}]") for key, m in models.items()}
    keys = list(states)
    for key in keys[1:]:
        check_same_architecture(states[keys[0]], states[key], f"models[{keys[0]!r}]", f"models[{key!r}]")
    names = [
        n
        for n, t in states[keys[0]].items()
        if t.is_floating_point() and n.rsplit(".", 1)[-1] not in ("running_mean", "running_var")
    ]
    norm = {k: _root_sum(s[n].double().square().sum() for n in names) for k, s in states.items()}
    rows = []
    for i, first in enumerate(keys):
        for second in keys[i + 1 :]:
            a, b = states[first], states[second]
            distance = _root_sum((a[n].double() - b[n].double()).square().sum() for n in names)
            scale = (norm[first] * norm[second]) ** 0.5
            relative = distance / scale if scale else float("nan")
            rows.append({"first": first, "second": second, "distance": distance, "relative": relative})
    return Table(tuple(rows))


def _root_sum(terms: Iterable[torch.Tensor]) -> float:
    return float(sum(float(t) for t in terms)) ** 0.5
