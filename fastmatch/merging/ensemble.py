"""What a merge is measured against: the models' averaged outputs, and what each costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastmatch._internal.batches import evaluating
from fastmatch._internal.coefficients import check_weights
from fastmatch.spec.trace import arguments_of

__all__ = ["Cost", "Ensemble", "cost_of"]


class Ensemble(nn.Module):
    """The weighted mean of the models' outputs: the baseline that a merge is measured against.

    Example:
        >>> logits = fm.Ensemble([model_a, model_b])(x)
    """

    def __init__(self, models: Sequence[nn.Module], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.weights = check_weights(weights, len(models))
        self.models = nn.ModuleList(models)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``sum_k weights[k] * models[k](...)``, for models that return one tensor."""
        first, *others = (model(*args, **kwargs) for model in self.models)
        total = first * self.weights[0]
        for weight, output in zip(self.weights[1:], others, strict=True):
            total = torch.add(total, output, alpha=weight)
        return total


@dataclass(frozen=True)
class Cost:
    """What a module costs: numbers in its parameters, floating point operations of one forward pass."""

    parameters: int
    flops: int


def cost_of(model: nn.Module, example_inputs: Any) -> Cost:
    """Parameters (shared ones once) and the FLOPs of matrix products and convolutions on the example.

    Example:
        >>> fm.cost_of(found.model, x).flops / fm.cost_of(model_a, x).flops
    """
    from torch.utils.flop_counter import FlopCounterMode  # loads triton

    args, kwargs = arguments_of(example_inputs, None)
    with evaluating(model), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops())
