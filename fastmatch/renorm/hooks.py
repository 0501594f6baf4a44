"""Forward hooks that measure a module during calibration and correct its activations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fastmatch._internal.layer_calls import on_input
from fastmatch.renorm.fold import bring_to_target, fold
from fastmatch.renorm.layers import Layer, survey
from fastmatch.renorm.norms import batch_norms
from fastmatch.renorm.plan import Plan
from fastmatch.renorm.targets import Target
from fastmatch.statistics.moments import ChannelMoments
from fastmatch_kernels.channel_affine.reference import Method as AffineMethod

__all__ = ["CalibrationHook", "affine_hooks", "reset_hooks"]

Targets: TypeAlias = Callable[[int | None], dict[str, Target]]
"""``targets(call)`` returns the target statistics by layer name; ``targets(None)`` pools over calls."""


class CalibrationHook(ABC):
    """One module under calibration: measured and corrected in every call, then written once after the last batch.

    Attributes:
        moments: of all calls so far.
        batches: how many batches were counted; for the counter of a batch norm.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.moments = ChannelMoments()
        self.batches = 0
        self.kept: torch.Tensor | None = None
        """(C,) True for the channels that keep gain one; known after :meth:`write`."""

    @abstractmethod
    def treat(self, tensors: list[torch.Tensor], call: int) -> list[torch.Tensor]:
        """Measure the tensors of one call and return them corrected.

        Args:
            tensors: those of one batch in joint mode, of all batches in sequential mode.
            call: position of the call of the module in the forward pass, 0 for the first.
        """

    def lacks_variance(self, samples: int | None) -> bool:
        """Return whether the method needs a variance, and what was measured so far has none.

        Args:
            samples: of the tensors that were treated last; None if they cannot be counted.
        """
        return False

    @abstractmethod
    def register(self, treat: Callable[[torch.Tensor], torch.Tensor]) -> RemovableHandle:
        """Pass the module's tensor to ``treat`` in every call, and replace it with the result."""

    @abstractmethod
    def write(self) -> None:
        """Write the result of all batches into the module."""


class _AffineHook(CalibrationHook):
    """A linear or convolution layer whose output is brought to the target of the call."""

    def __init__(
        self, name: str, layer: Layer, targets: Targets, method: AffineMethod, *, is_chosen: bool
    ) -> None:
        super().__init__(name, layer)
        self._layer, self._targets = layer, targets
        self._method: AffineMethod = method
        self._is_chosen = is_chosen

    def treat(self, tensors: list[torch.Tensor], call: int) -> list[torch.Tensor]:
        news, moments = bring_to_target(self._layer, tensors, self._targets(call)[self.name], self._method)
        self.moments.merge(moments)
        return news

    def lacks_variance(self, samples: int | None) -> bool:
        # A layer may give one value for many samples, as one that is run on a constant does; it keeps gain one. The automatic
        # choice judges what comes of a single sample.
        needs_it = self._is_chosen and self._method != "reshift"
        return needs_it and samples == 1 and self.moments.count == 1

    def register(self, treat: Callable[[torch.Tensor], torch.Tensor]) -> RemovableHandle:
        def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return treat(output)

        return self.module.register_forward_hook(hook)

    def write(self) -> None:
        if self.moments.count:
            self.kept = fold(self._layer, self.moments, self._targets(None)[self.name], self._method)


class _ResetHook(CalibrationHook):
    """A batch norm that normalizes by the statistics of its inputs."""

    def treat(self, tensors: list[torch.Tensor], call: int) -> list[torch.Tensor]:
        """Set the norm to the pooled statistics of its inputs before it runs on them; inputs do not change.

        One value for each channel, as a short last batch may give, has no variance: all inputs so far stand for it.
        """
        moments = ChannelMoments()
        for tensor in tensors:
            moments.update(tensor, dim=1 if tensor.ndim > 1 else 0)
        if moments.count:
            self.moments.merge(moments)
            self._set(self.moments if moments.count == 1 else moments)
        self.batches += len(tensors)
        return tensors

    def lacks_variance(self, samples: int | None) -> bool:
        return self.moments.count == 1

    def register(self, treat: Callable[[torch.Tensor], torch.Tensor]) -> RemovableHandle:
        return on_input(self.module, treat)

    def write(self) -> None:
        if self.moments.count:
            self._set(self.moments)
            counter: Any = getattr(self.module, "num_batches_tracked", None)
            if counter is not None:
                counter.fill_(self.batches)

    def _set(self, moments: ChannelMoments) -> None:
        module: Any = self.module
        module.running_mean.copy_(moments.mean)
        # torch keeps the unbiased variance.
        module.running_var.copy_(moments.m2 / max(moments.count - 1, 1))


def affine_hooks(model: nn.Module, plan: Plan, targets: Targets, *, is_chosen: bool) -> list[CalibrationHook]:
    """Return the hooks of REPAIR, RESCALE or RESHIFT.

    Args:
        is_chosen: whether this is the method for sure, so that a single value is an error.
    """
    layers = survey(model, plan.layers)[0]
    method = plan.method
    assert method not in ("auto", "reset", "least-squares", "none")
    return [_AffineHook(name, layer, targets, method, is_chosen=is_chosen) for name, layer in layers.items()]


def reset_hooks(model: nn.Module) -> list[CalibrationHook]:
    """Return the hooks of RESET."""
    return [_ResetHook(name, norm) for name, norm in batch_norms(model).items()]
