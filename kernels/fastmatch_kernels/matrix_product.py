"""``out = beta out + alpha a b^T`` by the fastest library for the processor.

On a CPU torch multiplies float32 matrices with MKL, which uses no AVX-512 on AMD's processors. oneDNN, which torch contains too,
does: 441 instead of 211 GFLOP/s on two cores of a Zen 5, for matrices of 2048 x 2048. So large products go there on such
processors, if torch has both.
Large float64 products go to numpy's OpenBLAS there, which does use it. Its number of threads is its own (``OPENBLAS_NUM_THREADS``). So where
torch was told to use one thread, as in worker processes, they stay with torch unless numpy was told too.
Which library multiplies is decided by the processor and the shapes, never by a clock: the same call gives the same bits.

torch offers oneDNN's float32 product by an operator of its compiler only, ``mkldnn::_linear_pointwise``. It makes a new matrix.
So ``out`` is worked on in blocks of rows that stay in the caches. Of factors that are contiguous neither as they are nor
transposed it may take a plain loop, hundreds of times slower: they are copied.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

import numpy as np
import torch

__all__ = ["addmm_nt", "goes_to_numpy", "goes_to_onednn"]

LEAST_SIDE = 64
"""The least number of rows, columns and terms of a product that goes to oneDNN."""

LEAST_WORK = 1 << 25
"""The least number of multiplications: a new shape takes oneDNN half a millisecond more, once in a process."""

LEAST_WORK_BY_NUMPY = 1 << 20
"""The least number of multiplications of a product that goes to numpy, whose call takes some microseconds more."""

BLOCK = 1 << 21
"""Entries of a block of ``out``: 8 MB, which the C library uses again instead of asking the system for pages. Rows of more than
16,384 columns make larger blocks."""

LEAST_ROWS = 128
"""Rows of a block at least: each block reads all of b."""

COPIED = 1 << 23
"""Entries of a factor with gaps that are copied at a time."""

LEAST_TERMS = 512
"""Terms of a product at least, where factors are copied: each reads and writes all of ``out``."""

LARGEST = 2**31
"""Entries from which on a factor stays with torch's own product: 32 bits count them."""


def addmm_nt(
    out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    """Set ``out = beta out + alpha a b^T``, and return it.

    No gradient is recorded. On a CPU, products are summed in their own type: their error is at most ``gamma_d |a| |b|^T``,
    whichever library multiplies.

    Example:
        >>> import torch
        >>> from fastmatch_kernels.matrix_product import addmm_nt
        >>> addmm_nt(torch.ones(1, 2), torch.tensor([[1.0, 2.0]]), torch.eye(2), alpha=10)
        tensor([[11., 21.]])

    Args:
        out: (n, m), written to; it shares no memory with a and b. With ``beta`` 0, what it holds counts for nothing, not even
            NaN.
        a: (n, d), of out's dtype.
        b: (m, d), of out's dtype.
    """
    a, b = a.detach(), b.detach()
    if goes_to_numpy(out, a, b):
        _add_by_numpy(out, a, b, beta, alpha)
        return out
    if not goes_to_onednn(out, a, b):
        return out.addmm_(a, b.T, beta=beta, alpha=alpha)
    whole = all(_has_no_gaps(x) for x in (a, b))
    terms = b.shape[1] if whole else max(COPIED // max(len(a), len(b)), LEAST_TERMS)
    for left, right in zip(a.split(terms, 1), b.split(terms, 1), strict=True):
        _add_by_rows(out, left, _without_gaps(right), beta, alpha)
        beta = 1
    return out


def _add_by_rows(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: float, alpha: float) -> None:
    """The same for a ``b`` without gaps, by oneDNN."""
    step = max(BLOCK // len(b), LEAST_ROWS)
    for rows, into in zip(a.split(step), out.split(step), strict=True):
        product = _onednn(_without_gaps(rows), b)
        _put(product, into, beta, alpha)


def _add_by_numpy(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: float, alpha: float) -> None:
    """The same by numpy's BLAS, in blocks of rows unless it can write to ``out`` at once."""
    if beta == 0 and out.is_contiguous():
        _by_numpy(a, b, out.numpy())
        if alpha != 1:
            out.mul_(alpha)
        return
    step = max(BLOCK // 2 // max(len(b), 1), LEAST_ROWS)
    for rows, into in zip(a.split(step), out.split(step), strict=True):
        product = torch.from_numpy(_by_numpy(rows, b))
        _put(product, into, beta, alpha)


def _put(product: torch.Tensor, into: torch.Tensor, beta: float, alpha: float) -> None:
    """Set ``into = beta into + alpha product``; with ``beta`` 0, what it holds counts for nothing."""
    if beta == 0:
        torch.mul(product, alpha, out=into)
    else:
        (into if beta == 1 else into.mul_(beta)).add_(product, alpha=alpha)


def _by_numpy(a: torch.Tensor, b: torch.Tensor, out: np.ndarray | None = None) -> np.ndarray:
    """Return ``a b^T``; like torch, without a warning of what is not finite."""
    left, right = (_without_gaps(x.resolve_neg()).numpy() for x in (a, b))
    with np.errstate(all="ignore"):
        return np.matmul(left, right.T, out=out)


def goes_to_numpy(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether numpy's BLAS multiplies them."""
    return (
        out.device.type == a.device.type == b.device.type == "cpu"
        and out.dtype == a.dtype == b.dtype == torch.float64
        and len(a) * len(b) * a.shape[1] >= LEAST_WORK_BY_NUMPY
        and type(out) is torch.Tensor
        and _mkl_is_slow()
        and _numpy_has_openblas()
        and (torch.get_num_threads() > 1 or _numpy_threads() == 1)
    )


def goes_to_onednn(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether oneDNN multiplies them."""
    n, m, d = len(a), len(b), a.shape[1]
    return (
        min(n, m, d) >= LEAST_SIDE
        and n * m * d >= LEAST_WORK
        and out.device.type == a.device.type == b.device.type == "cpu"
        and out.dtype == a.dtype == b.dtype == torch.float32
        and max(n, m) * d < LARGEST
        and type(out) is torch.Tensor  # and not one without entries, of torch's tracing modes
        and torch.backends.mkldnn.enabled
        and _mkl_is_slow()
        and _is_right()
    )


@cache
def _mkl_is_slow() -> bool:
    """Whether this is a processor of AMD with AVX-512, and torch has MKL and oneDNN."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and "AuthenticAMD" in _processor()
    )


@cache
def _numpy_has_openblas() -> bool:
    """Whether numpy's products are OpenBLAS's, and not those of MKL or of a plain reference library."""
    config = np.show_config(mode="dicts")
    blas = config.get("Build Dependencies", {}).get("blas", {}) if isinstance(config, dict) else {}
    return "openblas" in str(blas.get("name", "")).lower()


@cache
def _numpy_threads() -> int:
    """Return how many threads OpenBLAS uses, by the environment it was loaded in."""
    for name in ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"):
        given = os.environ.get(name, "").split(",")[0].strip()
        if given.isdecimal() and int(given) > 0:
            return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _is_right() -> bool:
    """Whether torch's operator, which may change from version to version, multiplies as it is expected to."""
    a, b = torch.arange(6.0, device="cpu").view(2, 3), torch.arange(12.0, device="cpu").view(4, 3)
    with torch.no_grad():
        try:
            return torch.equal(_onednn(a, b), a @ b.T)
        except (AttributeError, RuntimeError, TypeError):  # it is gone, or takes other arguments
            return False


def _onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return ``a b^T``, of factors without gaps."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open() as file:
            return file.read(1000)
    except OSError:
        return platform.processor()


def _has_no_gaps(x: torch.Tensor) -> bool:
    """Whether it is contiguous, as it is or transposed."""
    return x.is_contiguous() or x.T.is_contiguous()


def _without_gaps(x: torch.Tensor) -> torch.Tensor:
    if _has_no_gaps(x):
        return x
    # A transposed matrix is copied as it lies: oneDNN transposes while it packs.
    return x.T.contiguous().T if x.stride(0) == 1 else x.contiguous()
