"""Streaming moments of activations: ``moments``, which gathers small batches before it adds them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from fastmatch_kernels._dispatch import (
    Backend,
    Operation,
    Precision,
    backend_of,
    check_choice,
    check_floating,
)
from fastmatch_kernels.moments.reference import CROSS, Moments, MomentsArguments

__all__ = ["PENDING", "moments"]

HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)

PENDING = 4096
"""Samples of small batches that are added to a cross product at once: a pass over its memory costs more than few samples."""


_moments_update = Operation(
    "moments_update",
    MomentsArguments,
    lambda arguments: None,
    mutates=("stats_a", "stats_b", "ab", "aa", "bb"),
    folder="moments",
)


def moments(
    a: Tensor,
    b: Tensor | None = None,
    *,
    dim: int = 1,
    cross: Iterable[str] | None = None,
    state: Moments | None = None,
    precision: Precision = "ieee",
    backend: Backend | None = None,
) -> Moments:
    """Add a batch of one or two models' activations to ``state``, and return the state.

    Small batches are copied and wait until a product over them is worth a pass over its n x n accumulator.

    Example:
        >>> from fastmatch_kernels.ops import moments
        >>> state = None
        >>> for _ in range(3):
        ...     state = moments(torch.randn(16, 5), torch.randn(16, 4), state=state)
        >>> state.count, state.correlation().shape, state.mean(0).shape
        (48, torch.Size([5, 4]), torch.Size([5]))

    Args:
        a: (B, C, *spatial) activations with channels at ``dim``; float32, bfloat16 or float16 (float64 not on
            "triton"). Any strides. NaN and inf reach only the statistics of their own channel (its row and column of a
            cross product).
        b: (B, C', *spatial) activations of a second model on the same samples.
        dim: dimension of the channels.
        cross: cross products to keep, of "ab", "aa" and "bb"; by default "ab" if there are two models. The first batch
            fixes them.
        state: result of an earlier call, changed in place. None starts a new one.
        precision: of float32 products on "triton": "ieee", "fp16" (11 bits of each factor; TF32 below 256
            channels) or "fp16x3" (20 and more). On "cpu" always float32.
        backend: "triton", "cpu" or "reference"; by the tensors' device if None.

    Returns:
        The :class:`Moments`, in float64.

    Raises:
        TypeError: activations that are not floating point.
        ValueError: sample counts, channel counts or options that do not fit.
    """
    check_choice("precision", precision, Precision)
    models = {"a": a} if b is None else {"a": a, "b": b}
    for name, x in models.items():
        check_floating(name, x)
        if not -x.ndim <= dim < x.ndim:
            raise ValueError(f"{name}: expected a dimension {dim}, got shape {tuple(x.shape)}")
    count = a.numel() // a.shape[dim] if a.shape[dim] else 0
    if b is not None:
        dim_b = dim % b.ndim
        if a.ndim != b.ndim or any(a.shape[d] != b.shape[d] for d in range(a.ndim) if d != dim_b):
            raise ValueError(
                f"b: expected the samples of a, shape {tuple(a.shape)} but for dimension {dim}, "
                f"got {tuple(b.shape)}"
            )
    chosen = backend_of(*models.values(), backend=backend)
    if chosen == "triton":
        # Here already: a small batch may be added much later.
        for name, x in models.items():
            if x.dtype not in HALF_AND_SINGLE:
                raise TypeError(
                    f"{name}: expected one of {HALF_AND_SINGLE} on the Triton backend, got {x.dtype}"
                )
    if state is None:
        names = tuple(cross) if cross is not None else ("ab",) if b is not None else ()
        unknown = [n for n in names if n not in CROSS or (b is None and n != "aa")]
        if unknown:
            raise ValueError(
                f"cross: expected names of {CROSS if b is not None else ('aa',)}, got {unknown[0]!r}"
            )
        if count == 0:
            raise ValueError(
                f"a: expected at least one sample in the first batch, got shape {tuple(a.shape)}"
            )
        state = Moments.empty(a.detach(), None if b is None else b.detach(), dim=dim, cross=names)
    else:
        got = tuple(x.shape[dim] for x in models.values())
        expected = tuple(s.shape[0] for s in state.shifts)
        if got != expected:
            raise ValueError(f"a, b: expected {expected} channels as in state, got {got}")
    if count == 0:
        return state
    add = partial(_add_moments, precision=precision, backend=chosen)
    if state.cross and count < PENDING // 4 and not torch.compiler.is_compiling():
        _leave_pending(state, [x.detach().movedim(dim, -1) for x in models.values()], count, add)
    else:
        add(state, a.detach(), None if b is None else b.detach(), dim=dim)
    state.count += count
    return state


def _add_moments(
    state: Moments,
    a: Tensor,
    b: Tensor | None = None,
    *,
    dim: int = 1,
    precision: Precision,
    backend: Backend,
) -> None:
    two = b is not None
    arguments = MomentsArguments(
        a,
        b,
        dim,
        state.shifts[0],
        state.shifts[1] if two else None,
        state.stats[0],
        state.stats[1] if two else None,
        state.cross.get("ab"),
        state.cross.get("aa"),
        state.cross.get("bb"),
        precision,
    )
    _moments_update(arguments, backend)


def _leave_pending(state: Moments, models: list[Tensor], count: int, add: partial[None]) -> None:
    """Copy a small batch, channels last, behind the waiting ones of its kind; add all once they are ``PENDING`` samples.

    The copy never shares memory with the batch, which a network may overwrite.
    """
    alike = isinstance(state.add, partial) and state.add.keywords == add.keywords
    if not alike or any(
        x.dtype != old.dtype or x.device != old.device
        for x, old in zip(models, state.pending, strict=False)  # none at first
    ):
        state.settle()
    state.add = add
    needed = state.waiting + count
    if not state.pending or needed > len(state.pending[0]):
        # CPU memory is committed lazily, so the full size is allocated at once; elsewhere the size doubles.
        most = PENDING + PENDING // 4
        room = max(needed, most if models[0].device.type == "cpu" else min(2 * needed, most))
        with torch.inference_mode(False):  # else no later batch outside of it could be copied here
            grown = tuple(torch.empty(room, x.shape[-1], dtype=x.dtype, device=x.device) for x in models)
        for new, old in zip(grown, state.pending, strict=False):  # none at first
            new[: state.waiting] = old[: state.waiting]
        state.pending = grown
    for x, waiting in zip(models, state.pending, strict=True):
        waiting[state.waiting : needed].view(x.shape).copy_(x)
    state.waiting = needed
    if needed >= PENDING:
        state.add_pending()
