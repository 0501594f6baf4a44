"""The models between the ends of a curve, or inside a triangle: plain merges, or corrected ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from fastmatch._internal.batches import Forward
from fastmatch.merging.average import merge
from fastmatch.renorm.endpoints import EndpointStatistics
from fastmatch.renorm.options import Method, Renormalization, renormalization_of
from fastmatch.renorm.renormalize import renormalize_many

__all__ = ["Between", "Renormalized", "check_between", "merges_between"]


@dataclass(frozen=True)
class Renormalized:
    """Renormalize every merge of a curve or triangle; all of them are calibrated in one read of ``data``.

    Example:
        >>> between = fm.Renormalized(loader, fm.Renormalization("repair", samples=256))
        >>> curve = fm.interpolate(model_a, model_b, test_loader, points=5, between=between)

    Attributes:
        data: a loader of inputs or (inputs, targets) to calibrate on; read once for the endpoints, unless
            ``statistics`` are given, and once for all merges.
        method: a method's word, or a :class:`fastmatch.Renormalization`.
        statistics: those of the models, if they are measured already.

    Raises:
        ValueError, TypeError: no data, or an unknown method.

    Memory: all merges at once.
    """

    data: Iterable[Any]
    method: Method | Renormalization = "auto"
    statistics: EndpointStatistics | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.data, Iterable):
            raise TypeError(f"data: expected a loader to calibrate on; got {type(self.data).__name__}")
        if self.statistics is not None and not isinstance(self.statistics, EndpointStatistics):
            raise TypeError(
                f"statistics: expected an EndpointStatistics or None; got {type(self.statistics).__name__}"
            )
        renormalization_of(self.method)


Between: TypeAlias = Renormalized | Callable[[nn.Module, tuple[float, ...]], nn.Module]
"""How a merge is corrected: a :class:`Renormalized`, or ``between(merged, weights)``, which returns a module."""


def check_between(between: object) -> None:
    """Raise TypeError unless ``between`` is None, a :class:`Renormalized` or callable."""
    if not (between is None or isinstance(between, Renormalized) or callable(between)):
        raise TypeError(
            "between: expected None, a fm.Renormalized(data, method) or a callable (merged, weights) -> module; "
            f"got {between!r}"
        )


def merges_between(
    models: Sequence[nn.Module],
    rows: Sequence[tuple[float, ...]],
    between: Between | None,
    forward: Forward,
    progress: bool | None,
) -> Iterator[nn.Module]:
    """Return the merges of ``models`` at the rows of weights, corrected by ``between``.

    Merges are made one at a time, except for :class:`Renormalized`, which needs all of them at once.
    """
    merges = (merge(models, row) for row in rows)
    if isinstance(between, Renormalized):
        found = renormalize_many(
            list(merges), between.statistics or models, between.data, between.method,
            forward=forward, progress=progress,
        )  # fmt: skip
        return iter(found)
    if between is None:
        return merges
    return (between(merged, row) for merged, row in zip(merges, rows, strict=True))
