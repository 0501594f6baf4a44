"""Baselines of a merge: the models' averaged outputs, and what each model costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastmatch._internal.batches import check_module, evaluating
from fastmatch._internal.coefficients import check_weights
from fastmatch.spec.running import arguments_of

__all__ = ["Ensemble", "ModelCost", "model_cost"]


class Ensemble(nn.Module):
    """The weighted mean of the models' outputs, the baseline of a merge.

    Example:
        >>> logits = fm.Ensemble([model_a, model_b])(x)

    Args:
        models: modules that return one tensor; they become sub-modules and are not copied.
        weights: one per model; None takes equal ones.

    Raises:
        ValueError: no model, or weights that do not fit.
    """

    def __init__(self, models: Sequence[nn.Module], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not models:
            raise ValueError("models: expected at least one")
        self.weights = check_weights(weights, len(models))
        self.models = nn.ModuleList(models)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return ``sum_k weights[k] * models[k](...)``."""
        first, *others = (model(*args, **kwargs) for model in self.models)
        total = first * self.weights[0]
        for weight, output in zip(self.weights[1:], others, strict=True):
            total = torch.add(total, output, alpha=weight)
        return total


@dataclass(frozen=True)
class ModelCost:
    """What a module costs.

    Example:
        >>> single = fm.model_cost(model_a, x)
        >>> parameters, flops = single.parameters, single.flops

    Attributes:
        parameters: numbers in its parameters; shared ones count once.
        flops: floating point operations of one forward pass on the example, in matrix products and convolutions.
    """

    parameters: int
    flops: int


def model_cost(model: nn.Module, example_inputs: Any) -> ModelCost:
    """Count the parameters of a module and the FLOPs of one forward pass.

    Example:
        >>> both = fm.Ensemble([model_a, model_b])
        >>> fm.model_cost(both, x).flops / fm.model_cost(model_a, x).flops
        2.0

    Args:
        model: it is run once in eval mode.
        example_inputs: a tensor, a tuple of positional inputs, or a mapping of inputs by name.

    Raises:
        TypeError: ``model`` is not a torch module.
    """
    from torch.utils.flop_counter import FlopCounterMode  # loads triton

    check_module(model, "model")
    args, kwargs = arguments_of(example_inputs, None)
    with evaluating(model), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    return ModelCost(sum(p.numel() for p in model.parameters()), counter.get_total_flops())
