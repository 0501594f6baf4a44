"""The entry of ``channel_affine``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmatch_kernels._dispatch import backend_of, check_floating, is_plain, module_of
from fastmatch_kernels.channel_affine.reference import METHODS

__all__ = ["channel_affine"]


@torch.library.custom_op("fastmatch::channel_affine", mutates_args=("out",))
def _channel_affine(
    x: Tensor,
    dim: int,
    goal_mean: Tensor,
    goal_std: Tensor,
    method: str,
    eps: float,
    out: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return module_of(backend, "channel_affine").channel_affine(x, dim, goal_mean, goal_std, method, eps, out)


@_channel_affine.register_fake
def _(x, dim, goal_mean, goal_std, method, eps, out, backend) -> tuple[Tensor, Tensor]:
    return torch.empty_like(goal_mean), torch.empty_like(goal_mean)


def channel_affine(
    x: Tensor,
    goal_mean: Tensor,
    goal_std: Tensor,
    method: str = "repair",
    *,
    dim: int = 1,
    eps: float = 1e-5,
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's output brought to its goals by its own statistics, which come back too.

    With mean mu and population variance v of each channel and ``g = goal_std / sqrt(v + eps)``:
    repair ``(x - mu) g + goal_mean``, rescale ``x g``, reshift ``x - mu + goal_mean``.

    Example:
        >>> z, mean, variance = channel_affine(z, goal_mean, goal_std, "repair")

    Args:
        x: (B, C, *spatial) with channels at ``dim``, at least one sample; float64 not on "triton". Any strides.
            NaN and inf stay in their channel.
        goal_mean, goal_std: (C,), float64 (others are converted).
        method: "repair", "rescale", "reshift".
        dim: where the channels lie.
        eps: added to the variance.
        out: like ``x``, written and returned; may be ``x``.
        backend: see :func:`backend_of`.

    Returns:
        (out, mean (C,) float64, population variance (C,) float64).

    Raises:
        ValueError, TypeError: shapes, types or options that do not fit.
    """
    check_floating("x", x)
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"x: expected a dimension {dim}, got shape {tuple(x.shape)}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    if x.numel() == 0:
        raise ValueError(f"x: expected at least one sample and channel, got shape {tuple(x.shape)}")
    for name, goal in (("goal_mean", goal_mean), ("goal_std", goal_std)):
        if goal.shape != (x.shape[dim],):
            raise ValueError(f"{name}: expected {x.shape[dim]} numbers, got shape {tuple(goal.shape)}")
    chosen = backend_of(x, goal_mean, goal_std, backend=backend)
    if out is None:
        out = torch.empty_like(x)
    elif out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(f"out: expected a tensor like x, got {tuple(out.shape)} of {out.dtype}")
    goals = (goal_mean.detach().double(), goal_std.detach().double())
    arguments = (x.detach(), dim, *goals, method, eps, out)
    shares = (
        not torch.compiler.is_compiling()
        and x.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
    )
    # torch.library knows no output that is also an input; under torch.compile this is never eager.
    if shares or is_plain(arguments[0], out):
        mean, variance = module_of(chosen, "channel_affine").channel_affine(*arguments)
    else:
        mean, variance = _channel_affine(*arguments, chosen)
    return out, mean, variance
