"""Soft minima of the rows of a cost given by factors, and Sinkhorn's iteration: ``row_softmin`` and ``sinkhorn_duals``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmatch_kernels._dispatch import Backend, Operation, Precision, check_choice
from fastmatch_kernels._factors import Factors, check_duals, check_factors, result_dtype
from fastmatch_kernels.row_softmin.reference import SoftminArguments

__all__ = ["row_softmin", "sinkhorn_duals"]

RELAXED_BELOW = 0.3
"""Steps at temperatures below this fraction of the first one are over-relaxed."""


def _fake(arguments: SoftminArguments) -> Tensor:
    first = arguments.a[0]
    return first.new_empty(first.shape[0], dtype=result_dtype(first))


_row_softmin = Operation("row_softmin", SoftminArguments, _fake, returns=Tensor)


def row_softmin(
    factors: Factors,
    v: Tensor,
    temperature: float,
    *,
    precision: Precision = "ieee",
    backend: Backend | None = None,
) -> Tensor:
    """Return, per row, the soft minimum ``-t log sum_j exp((v_j - c_ij) / t)`` with ``c = -gain(factors)``.

    It is at most the row's minimum and at least the minimum less ``t log m``. The n x m matrix is never stored.
    Entries of NaN or +inf are omitted.

    Example:
        >>> from fastmatch_kernels.ops import row_softmin
        >>> a, b = torch.randn(3, 2), torch.randn(4, 2)
        >>> soft = row_softmin([(a, b)], torch.zeros(4), temperature=0.5)
        >>> torch.allclose(soft, -0.5 * (a @ b.T / 0.5).logsumexp(1), atol=1e-5)
        True

    Args:
        factors: as for :func:`gain`.
        v: (m,) column duals.
        temperature: t, above 0, in the unit of the costs.
        precision: as for :func:`gain`.
        backend: as for :func:`gain`.

    Returns:
        (n,) float32 (float64 for float64 factors).

    Raises:
        TypeError: factors of a wrong dtype.
        ValueError: shapes, devices or options that do not fit.
    """
    check_choice("precision", precision, Precision)
    a, b, _, _, (_, m), chosen = check_factors(factors, None, None, backend)
    check_duals(v, m, a[0].device)
    _check_temperature("temperature", temperature)
    return _row_softmin(SoftminArguments(a, b, v, temperature, precision), chosen)


def _check_temperature(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def sinkhorn_duals(
    factors: Factors,
    temperatures: Sequence[float],
    *,
    v: Tensor | None = None,
    relaxation: float = 1.0,
    precision: Precision = "fp16",
    backend: Backend | None = None,
) -> Tensor:
    """Return column duals near an assignment's, by Sinkhorn's iteration (Cuturi 2013) at falling temperatures.

    At each temperature, in the log domain, ``u_i = softmin_j (c_ij - v_j)`` and then ``v_j = softmin_i (c_ij - u_i)``:
    two products of the factors. The duals are a starting point for an exact solver, which proves its result without
    them, so 11 bits of the factors are enough.

    Example:
        >>> from fastmatch_kernels.ops import sinkhorn_duals
        >>> a, b = torch.randn(5, 3), torch.randn(5, 3)
        >>> sinkhorn_duals([(a, b)], [1.0, 0.3, 0.1]).shape
        torch.Size([5])

    Args:
        factors: as for :func:`gain`, with as many rows as columns.
        temperatures: above 0, in the unit of the costs; ``bench/results/initial_duals.md`` has measurements.
        v: (n,) starting duals; zeros by default.
        relaxation: above 0 and below 2. At temperatures under ``RELAXED_BELOW`` times the first, a half step goes this
            many times as far. About 1.8 saves half of the steps and more (Thibault et al. 2017); at high temperatures
            it diverges.
        precision, backend: as for :func:`gain`.

    Returns:
        (n,) column duals, float32 (float64 for float64 factors).

    Raises:
        TypeError, ValueError: as :func:`row_softmin`.
    """
    for k, temperature in enumerate(temperatures):
        _check_temperature(f"temperatures[{k}]", temperature)
    if not 0 < relaxation < 2:
        raise ValueError(f"relaxation: expected a number between 0 and 2, got {relaxation}")
    a, b, _, _, (n, m), _ = check_factors(factors, None, None, backend)
    if n != m:
        raise ValueError(f"factors: expected as many rows as columns, got {n} and {m}")
    duals = torch.zeros(m, device=b[0].device) if v is None else v
    check_duals(duals, m, a[0].device)
    duals = duals.to(result_dtype(a[0]))
    transposed = list(zip(b, a, strict=True))
    rows = None
    for temperature in temperatures:
        reach = relaxation if temperature < RELAXED_BELOW * temperatures[0] else 1.0
        fresh = row_softmin(factors, duals, temperature, precision=precision, backend=backend)
        rows = fresh if rows is None else torch.lerp(rows, fresh, reach)
        fresh = row_softmin(transposed, rows, temperature, precision=precision, backend=backend)
        duals = torch.lerp(duals, fresh, reach)
    return duals
