"""The entries of ``row_softmin`` and of the iteration made of it, ``sinkhorn_duals``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmatch_kernels._dispatch import check_precision, module_of, run
from fastmatch_kernels._factors import Factors, check_duals, check_factors

__all__ = ["row_softmin", "sinkhorn_duals"]

RELAXED = 0.3
"""Part of Sinkhorn's first temperature below which its steps may be over-relaxed."""


def _row_softmin(
    a: Sequence[Tensor], b: Sequence[Tensor], v: Tensor, temperature: float, precision: str, backend: str
) -> Tensor:
    return module_of(backend, "row_softmin").row_softmin(
        list(zip(a, b, strict=True)), v, temperature, precision=precision
    )


_row_softmin_op = torch.library.custom_op("fastmatch::row_softmin", mutates_args=())(_row_softmin)


@_row_softmin_op.register_fake
def _(a, b, v, temperature, precision, backend) -> Tensor:
    dtype = torch.float64 if a[0].dtype == torch.float64 else torch.float32
    return a[0].new_empty(a[0].shape[0], dtype=dtype)


def row_softmin(
    factors: Factors, v: Tensor, temperature: float, *, precision: str = "ieee", backend: str | None = None
) -> Tensor:
    """Per row the soft minimum ``-t log sum_j exp((v_j - c_ij) / t)``, ``c = -gain(factors)``: (n,).

    Never above the row's minimum, and within ``t log m`` of it. The n x n matrix is never stored.

    Args:
        factors, precision, backend: as for :func:`gain`. Entries of NaN or +inf are left out.
        v: (m,) column duals.
        temperature: t, in the unit of the costs, above 0.

    Raises:
        ValueError, TypeError: shapes, types or options that do not fit.
    """
    check_precision(precision)
    a, b, _, (_, m), chosen = check_factors(factors, None, None, backend)
    check_duals(v, m, a[0].device)
    _check_temperature("temperature", temperature)
    return run(_row_softmin_op, _row_softmin, a, b, v, temperature, precision, chosen)


def _check_temperature(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def sinkhorn_duals(
    factors: Factors,
    temperatures: Sequence[float],
    *,
    v: Tensor | None = None,
    relaxation: float = 1.0,
    precision: str = "tf32",
    backend: str | None = None,
) -> Tensor:
    """Column duals near an assignment's, by Sinkhorn's iteration (Cuturi 2013) in the log domain at falling temperatures.

    At each temperature ``u_i = softmin_j (c_ij - v_j)``, then ``v_j = softmin_i (c_ij - u_i)``: two products. They are to
    start an exact solver from, which proves its result without them; so TF32 will do where there is one.

    Example:
        >>> v = sinkhorn_duals([(w_a, w_b)], [1.0, 0.3, 0.1])

    Args:
        factors, precision, backend: as for :func:`gain`; as many rows as columns.
        temperatures: in the unit of the costs, above 0; see ``bench/results/initial_duals.md``.
        v: (n,) where to start; zeros by default.
        relaxation: below 2; at temperatures under RELAXED of the first, each half step goes so many times as far. About
            1.8 saves half of the steps and more (Thibault et al. 2017); at high temperatures it diverges.

    Returns:
        (n,) float32 (float64 for float64 factors).

    Raises:
        ValueError, TypeError: shapes, types or options that do not fit.
    """
    for k, temperature in enumerate(temperatures):
        _check_temperature(f"temperatures[{k}]", temperature)
    if not 0 < relaxation < 2:
        raise ValueError(f"relaxation: expected a number between 0 and 2, got {relaxation}")
    a, b, _, (n, m), _ = check_factors(factors, None, None, backend)
    if n != m:
        raise ValueError(f"factors: expected as many rows as columns, got {n} and {m}")
    dtype = torch.float64 if a[0].dtype == torch.float64 else torch.float32
    duals = torch.zeros(m, device=b[0].device) if v is None else v
    check_duals(duals, m, a[0].device)
    duals = duals.to(dtype)
    turned = list(zip(b, a, strict=True))
    rows = None
    for temperature in temperatures:
        reach = relaxation if temperature < RELAXED * temperatures[0] else 1.0
        fresh = row_softmin(factors, duals, temperature, precision=precision, backend=backend)
        rows = fresh if rows is None else torch.lerp(rows, fresh, reach)
        fresh = row_softmin(turned, rows, temperature, precision=precision, backend=backend)
        duals = torch.lerp(duals, fresh, reach)
    return duals
