"""Norms, found by what a module computes on a few random numbers, whatever its class is called."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["batch_norms", "is_norm"]

_NORMS = (
    nn.modules.batchnorm._BatchNorm,  # SyncBatchNorm too
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
ANY = 6
"""Channels of the inputs for a module without vectors, which runs on any number."""
SCALE, SHIFT = 4.0, 3.0
TOLERANCE = 1e-2
"""Relative. Norms add an eps to the variance, so that they are invariant only nearly."""


def is_norm(module: nn.Module) -> bool:
    """Return whether a module normalizes: its output does not grow with its input, and its own parameters, if any, are vectors.

    A module of another class than torch's is copied and run on random numbers, with the channels in every place
    where a norm has them, in eval mode and in train mode (in which a batch norm uses the batch). Modules of which children have
    parameters are no norms, whatever they compute, nor are containers.
    """
    if isinstance(module, _NORMS):
        return True
    own = [*module.parameters(recurse=False)]
    if not own and (type(module).__module__.startswith("torch.") or any(True for _ in module.children())):
        return False
    size = _channels(own or [*module.buffers(recurse=False)])
    return size is not None and any(_is_invariant(probe, x) for probe, x in _probes(module, size))


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that normalize by buffers ``running_mean`` and ``running_var``, by name."""
    return {name: module for name, module in model.named_modules() if _has_running_statistics(module)}


def _has_running_statistics(module: nn.Module) -> bool:
    buffers = dict(module.named_buffers(recurse=False))
    mean, variance = buffers.get("running_mean"), buffers.get("running_var")
    if mean is None or variance is None or mean.ndim != 1 or mean.shape != variance.shape:
        return False
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    return any(_follows_buffers(probe, x) for probe, x in _probes(module, len(mean)) if not probe.training)


def _channels(tensors: Sequence[torch.Tensor]) -> int | None:
    """Return the common length of vectors, :data:`ANY` if there is none; None if lengths differ or a tensor is no vector."""
    lengths = {t.numel() for t in tensors if t.numel() > 1} or {ANY}
    vectors = all(max(t.shape, default=1) == t.numel() for t in tensors)
    return lengths.pop() if vectors and len(lengths) == 1 else None


def _probes(module: nn.Module, size: int) -> Iterator[tuple[nn.Module, torch.Tensor]]:
    """Yield copies of the module, and inputs with ``size`` channels, that it may run on; none if its children have parameters."""
    if any(True for child in module.children() for _ in child.parameters()):
        return
    generator = torch.Generator(device="cpu").manual_seed(0)
    for train in (False, True):
        for shape in (
            (5, size),
            (5, size, 3),
            (5, size, 3, 4),
            (5, size, 2, 3, 4),
            (5, 3, size),
            (5, 3, 4, size),
        ):
            try:
                probe = copy.deepcopy(module).to(device="cpu", dtype=torch.float32).train(train)
            except Exception:  # a module that cannot be copied or moved
                return
            yield probe, torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def _output(module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    try:
        # The probe is on the CPU, so only that generator can move. Each run draws the same numbers.
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            found: Any = module(x)
    except Exception:  # the module does not run on one tensor of this shape
        return None
    return found if isinstance(found, torch.Tensor) and found.shape == x.shape else None


def _is_invariant(probe: nn.Module, x: torch.Tensor) -> bool:
    """Return whether the output varies with the input, but not with its scale."""
    with torch.no_grad():
        for parameter in probe.parameters(recurse=False):
            parameter.fill_(1.0)  # gains may be trained to zero
    one = _output(probe, x)
    if one is None or not _close(one, _output(probe, SCALE * x)):
        return False
    return not _close(one, _output(probe, x.roll(1, 0).flip(-1)))


def _follows_buffers(probe: nn.Module, x: torch.Tensor) -> bool:
    """Return whether ``(x - running_mean) / sqrt(running_var)`` determines the output."""
    buffers = dict(probe.named_buffers(recurse=False))
    outputs = []
    for mean, std, y in ((0.0, 1.0, x), (SHIFT, SCALE, SCALE * x + SHIFT), (SHIFT, SCALE, x)):
        buffers["running_mean"].fill_(mean)
        buffers["running_var"].fill_(std**2)
        outputs.append(_output(probe, y))
    return _close(outputs[0], outputs[1]) and not _close(outputs[0], outputs[2])


def _close(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None or not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return False
    return bool((a - b).abs().max() <= TOLERANCE * a.abs().max().clamp(min=1e-30))
