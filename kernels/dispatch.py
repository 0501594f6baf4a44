"""Picks a backend for each operation: by the tensors' device, or as asked. Registered with torch.library.

``backend=None`` takes "triton" for CUDA and HIP tensors and "cpu" for CPU tensors; "reference" is the plain
torch form, on any device. What is asked for explicitly is used or fails, it is never replaced by another.
Arguments are checked here, once, and trusted below. Every operation is a ``torch.library`` custom op with a
fake implementation, so ``torch.compile`` traces through it.

Backends are imported on first use: importing this module loads neither triton nor numba.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from types import ModuleType

import torch
from fastmatch.kernels.reference.moments import CROSS, Moments
from torch import Tensor

__all__ = ["BACKENDS", "backend_of", "moments"]

BACKENDS = ("triton", "cpu", "reference")
PRECISIONS = ("ieee", "tf32", "bf16x3")

Factors = Sequence[tuple[Tensor, Tensor]]


def backend_of(*tensors: Tensor, backend: str | None = None) -> str:
    """The backend that ``tensors`` go to.

    Raises:
        ValueError: an unknown backend, tensors on several devices, or a device without a backend.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise ValueError(f"tensors: expected one device, got {sorted(map(str, devices))}")
    device = next(iter(devices))
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend: 'cpu' needs CPU tensors, got {device}")
    if backend is not None:
        return backend
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device}; backend='reference' runs anywhere")
    return "cpu" if device.type == "cpu" else "triton"


def _module(backend: str, op: str) -> ModuleType:
    return importlib.import_module(f"fastmatch.kernels.{backend}.{op}")


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {PRECISIONS}, got {precision!r}")


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating point tensor, got {tensor.dtype}")


# ---------------------------------------------------------------------------------------------- moments


@torch.library.custom_op("fastmatch::moments_update", mutates_args=("stats_a", "stats_b", "ab", "aa", "bb"))
def _moments_update(
    a: Tensor,
    b: Tensor | None,
    dim: int,
    shift_a: Tensor,
    shift_b: Tensor | None,
    stats_a: Tensor,
    stats_b: Tensor | None,
    ab: Tensor | None,
    aa: Tensor | None,
    bb: Tensor | None,
    precision: str,
    backend: str,
) -> None:
    _module(backend, "moments").update(a, b, dim, shift_a, shift_b, stats_a, stats_b, ab, aa, bb, precision)


@_moments_update.register_fake
def _(a, b, dim, shift_a, shift_b, stats_a, stats_b, ab, aa, bb, precision, backend) -> None:
    return None


def moments(
    a: Tensor,
    b: Tensor | None = None,
    *,
    dim: int = 1,
    cross: Iterable[str] | None = None,
    state: Moments | None = None,
    precision: str = "ieee",
    backend: str | None = None,
) -> Moments:
    """Adds a batch of one or two models' activations to ``state``, in one read, and returns it.

    Example:
        >>> state = None
        >>> for a, b in batches:
        ...     state = moments(a, b, state=state)
        >>> state.correlation(), state.mean(0), state.variance(1), state.off(0)

    Args:
        a, b: (B, C, *spatial) activations of the two models on the same samples, channels at ``dim``; any
            strides; float32, bfloat16, float16 (float64 not on "triton"). Channel counts may differ. NaN and
            inf reach the statistics of their own channel only (its row and column of a cross product).
        dim: where the channels lie.
        cross: cross products to keep, of "ab", "aa", "bb"; "ab" where there are two models. Fixed by the
            first batch.
        state: what earlier calls returned; changed in place. None starts anew.
        precision: of float32 products: "ieee", "tf32", "bf16x3". On CPU always float32.
        backend: see :func:`backend_of`.

    Returns:
        The :class:`Moments`, float64.

    Raises:
        ValueError: sample counts, channel counts or options do not fit.
        TypeError: activations that are not floating point.
    """
    _check_precision(precision)
    models = {"a": a} if b is None else {"a": a, "b": b}
    for name, x in models.items():
        _check_floating(name, x)
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
    _moments_update(
        a.detach(),
        None if b is None else b.detach(),
        dim,
        state.shifts[0],
        state.shifts[1] if b is not None else None,
        state.stats[0],
        state.stats[1] if b is not None else None,
        state.cross.get("ab"),
        state.cross.get("aa"),
        state.cross.get("bb"),
        precision,
        chosen,
    )
    state.count += count
    return state
