"""The plan of a renormalization: the method and its reason, the layers, and what is left alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from fastmatch._internal.dispatch_mode import DispatchMode
from fastmatch.renorm.layers import batch_norms, is_norm, survey
from fastmatch.renorm.options import Method, Renormalization, renormalization_of

__all__ = ["Plan", "ResidualDetector", "choose_without_norms", "plan_renormalization"]


@dataclass(frozen=True)
class Plan:
    """What a renormalization will do.

    Example:
        >>> plan = fm.plan_renormalization(model_a, "repair")
        >>> plan.method
        'repair'

    Attributes:
        method: ``"repair"``, ``"rescale"``, ``"reshift"`` or ``"reset"``. ``"auto"`` if the choice depends on the
            first batch: a network without norms has to be run to see whether it adds residual streams.
        why: the reason for the method.
        layers: names of the layers to renormalize (of the batch norms for ``"reset"``).
        left_alone: module name -> the reason why it is left alone.
    """

    method: Method
    why: str
    layers: tuple[str, ...]
    left_alone: dict[str, str] = field(hash=False)

    def __str__(self) -> str:
        """The plan as text: the method, the reason, and one line per module left alone."""
        lines = [f"{self.method}: {self.why}; {len(self.layers)} layers"]
        return "\n".join([*lines, *(f"  left alone: {n}: {reason}" for n, reason in self.left_alone.items())])


def plan_renormalization(model: nn.Module, method: Method | Renormalization = "auto") -> Plan:
    """Return what :func:`fastmatch.renormalize` would do to ``model``. Nothing is run or changed.

    The automatic choice follows the paper (Qu and Horvath 2024): ``"reset"`` with batch norm; ``"repair"`` with
    another norm (layer, group, RMS); without norms ``"rescale"`` for a plain chain, and ``"repair"`` for a network
    that adds residual streams.

    Example:
        >>> plan = fm.plan_renormalization(model_a)
        >>> text = str(plan)  # such as "reset: the network has batch norm; 8 layers"

    Args:
        model: the merged or pruned model.
        method: a method's word, or a :class:`fastmatch.Renormalization`.

    Raises:
        ValueError: an unknown method, ``"reset"`` for a model without batch norm, an option that the chosen method
            does not use, a layer that cannot be renormalized, or no layer at all.
    """
    options = renormalization_of(method)
    chosen, why = options.method, "as asked"
    if chosen == "auto":
        if batch_norms(model):
            chosen, why = "reset", "the network has batch norm"
        elif any(is_norm(m) for m in model.modules()):
            chosen, why = "repair", "the network has norms that keep no statistics of the data"
        else:
            why = "no norms: rescale for a plain chain, repair with residual adds, seen on the first batch"
    options = replace(options, method=chosen)  # refuses options that the chosen method does not use
    if chosen == "reset":
        norms = batch_norms(model)
        if not norms:
            raise ValueError(
                'model: method "reset" needs batch norm with running statistics, and there is none; '
                'use "repair" or "rescale"'
            )
        return Plan(chosen, why, tuple(norms), {})
    found, left = survey(model, options.layers)
    return Plan(chosen, why, tuple(found), left)


class ResidualDetector(DispatchMode):
    """Detects whether a forward pass adds two activations of one shape, as a residual stream does."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_) and len(args) == 2:
            a, b = args
            if isinstance(b, torch.Tensor) and a.shape == b.shape and a.ndim > 1:
                self.found = self.found or not (isinstance(a, nn.Parameter) or isinstance(b, nn.Parameter))
        return func(*args, **(kwargs or {}))


def choose_without_norms(residual: bool) -> tuple[Method, str]:
    """Return (method, reason) for a network without norms."""
    if residual:
        return "repair", "the network has no norms and adds residual streams"
    return "rescale", "the network is a plain chain without norms"
