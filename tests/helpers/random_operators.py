"""A step of random networks that calls any operator that tracing has a rule for, on arguments made of hidden units."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from helpers.operators import UNTESTED, Sample, accepted, calls

__all__ = ["OPERATORS", "called"]

RAISING = frozenset(
    [
        "cholesky", "linalg_cholesky_ex", "cholesky_inverse", "_linalg_solve_ex", "fake_quantize_per_channel_affine_cachemask", "linalg_inv_ex", "mkldnn_rnn_layer",
    ]
)  # fmt: skip
"""Operators of matrices with a property that hidden units do not have, and two that know no float64."""

MOST = 800
"""Numbers in a result that a step goes on with."""


@cache
def prepared() -> dict[str, list[tuple[Any, Sample]]]:
    """Return operator -> calls that run."""
    found: dict[str, list[tuple[Any, Sample]]] = {}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        for name in accepted():
            if name in UNTESTED | RAISING:
                continue
            for function, (args, kwargs) in calls(name, 0):
                try:
                    results = _tensors(function(*_copies(args), **kwargs))
                except (RuntimeError, IndexError, TypeError):
                    continue  # another overload's arguments
                if any(0 < t.numel() <= MOST for t in results):
                    found.setdefault(name, []).append((function, (args, kwargs)))
    return found


def called(net, rng, name, h, live):
    """An operator on arguments that hidden units, weights and constants fill."""
    choices = prepared()
    function, (args, kwargs) = rng.choice(choices[rng.choice(sorted(choices))])
    net.log[-1] += f", {function}"
    number = 0

    def filled(value: Any) -> Any:
        nonlocal number
        if isinstance(value, (list, tuple)):
            return [filled(v) for v in value]
        if not isinstance(value, torch.Tensor) or value.numel() > MOST or not value.numel():
            return value
        number += 1
        draw = rng.random()
        if value.is_complex():
            return torch.complex(made(value.real, draw), made(value.imag, draw))
        if value.is_floating_point():
            return made(value, draw)
        return value.clone()

    def made(value: torch.Tensor, draw: float) -> torch.Tensor:
        nonlocal number
        number += 1
        low, high = value.min(), value.max()
        if draw < 0.6:
            flat = F.linear(h.mean(0), net.weight(f"{name}_{number}", value.numel(), h.shape[1]))
        elif draw < 0.85:
            flat = net.weight(f"{name}_{number}", *value.shape)
        else:
            return value.to(h.dtype, copy=True)
        return (low + (high - low) * flat.view(value.shape).sigmoid()).to(h.dtype)

    outputs = [t for t in _tensors(function(*filled(args), **kwargs)) if 0 < t.numel() <= MOST]
    out = rng.choice(outputs) if outputs else h
    if out.is_complex():
        out = torch.view_as_real(out.resolve_conj())
    flat = torch.tanh(out.to(h.dtype).nan_to_num()).flatten()
    width = rng.choice([6, 8, 12])
    mixed = F.linear(flat, net.weight(name, width, flat.numel()))
    return torch.tanh(F.linear(h, net.weight(f"{name}h", width, h.shape[1])) + mixed)


def _copies(args: list[Any]) -> list[Any]:
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in args]


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


OPERATORS = [called] * 12
