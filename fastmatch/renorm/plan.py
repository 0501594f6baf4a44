"""What a renormalization will do, before it does it: the method and why, the layers, what is left alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastmatch.renorm.layers import BATCH_NORMS, is_norm, survey

__all__ = ["METHODS", "Plan", "plan_renormalization"]

METHODS = ("auto", "repair", "rescale", "reshift", "reset")


@dataclass(frozen=True)
class Plan:
    """A renormalization, planned.

    Attributes:
        method: ``"repair"``, ``"rescale"``, ``"reshift"`` or ``"reset"``; or ``"auto"``, where only the first
            batch can say whether a net without norms adds a residual stream.
        why: the reason for the method.
        layers: names of what is renormalized (batch norms for ``"reset"``).
        left_alone: name -> reason.
    """

    method: str
    why: str
    layers: tuple[str, ...]
    left_alone: dict[str, str]

    def __str__(self) -> str:
        """The plan as text: the method, why, and a line for every layer left alone."""
        lines = [f"{self.method}: {self.why}; {len(self.layers)} layers"]
        return "\n".join([*lines, *(f"  left alone: {n}: {reason}" for n, reason in self.left_alone.items())])


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The batch norms with running statistics, by name."""
    return {
        n: m for n, m in model.named_modules() if isinstance(m, BATCH_NORMS) and m.running_mean is not None
    }


def plan_renormalization(
    model: nn.Module, method: str = "auto", *, layers: Sequence[str] | None = None
) -> Plan:
    """What :func:`fastmatch.renormalize` would do to ``model``; nothing is run or changed.

    Example:
        >>> print(fm.plan_renormalization(merged))
        reset: the net has batch norm; 8 layers

    The automatic choice is the paper's: reset with batch norm; repair with another norm (layer, group, RMS);
    without norms rescale for a plain chain and repair where a residual stream is added.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    why = "as asked"
    if method == "auto":
        if batch_norms(model):
            method, why = "reset", "the net has batch norm"
        elif any(is_norm(m) for m in model.modules()):
            method, why = "repair", "the net has norms that keep no statistics of the data"
        else:
            why = "no norms: rescale for a plain chain, repair with residual adds, seen on the first batch"
    if method == "reset":
        norms = batch_norms(model)
        if not norms:
            raise ValueError(
                'model: method "reset" needs batch norm with running statistics, and there is none; '
                'use "repair" or "rescale"'
            )
        if layers is not None:
            raise ValueError('layers: method "reset" measures every batch norm; leave layers out')
        return Plan(method, why, tuple(norms), {})
    found, left = survey(model, layers)
    return Plan(method, why, tuple(found), left)


class ResidualDetector(TorchDispatchMode):
    """Sees whether a forward pass adds two activations of one shape, as a residual stream does."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_) and len(args) == 2:
            a, b = args
            if isinstance(b, torch.Tensor) and a.shape == b.shape and a.ndim > 1:
                self.found = self.found or not (isinstance(a, nn.Parameter) or isinstance(b, nn.Parameter))
        return func(*args, **(kwargs or {}))


def choose_without_norms(residual: bool) -> tuple[str, str]:
    """(method, why) for a net without norms."""
    if residual:
        return "repair", "the net has no norms and adds residual streams"
    return "rescale", "the net is a plain chain without norms"
