"""The models between the ends of a curve, or inside a triangle: plain merges, or corrected ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import nn

from fastmatch._internal.batches import Forward, check_data
from fastmatch.merging.average import merge
from fastmatch.renorm.endpoints import EndpointStatistics
from fastmatch.renorm.options import Method, Renormalization, renormalization_of
from fastmatch.renorm.renormalize import renormalize_many

__all__ = ["Between", "Renormalized", "check_between", "merges_between"]


@dataclass(frozen=True, eq=False)
class Renormalized:
    """Renormalize every merge of a curve or triangle; all of them are calibrated in one read of ``data``.

    Example:
        >>> between = fm.Renormalized(loader, fm.Renormalization("repair", samples=256))
        >>> curve = fm.interpolate(model_a, model_b, test_loader, points=5, between=between)

    Attributes:
        data: a loader of inputs or (inputs, targets) to calibrate on; read once for the endpoints, unless
            ``statistics`` are given or the method is ``"reset"``, and once for all merges.
        method: a method's word, or a :class:`fastmatch.Renormalization`.
        statistics: those of the models, if they are measured already; not for ``"reset"``, which does not use them.

    Raises:
        ValueError: an unknown method, or statistics for ``"reset"``.
        TypeError: ``data`` is not an iterable of batches that can be read as often as needed, or an argument has
            another type.

    Memory: all merges at once.
    """

    data: Iterable[Any] = field(repr=False)
    method: Method | Renormalization = "auto"
    statistics: EndpointStatistics | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        is_reset = renormalization_of(self.method).method == "reset"
        check_data(self.data, reads=1 if is_reset or self.statistics is not None else 2)
        if self.statistics is not None and not isinstance(self.statistics, EndpointStatistics):
            raise TypeError(
                f"statistics: expected an EndpointStatistics or None; got {type(self.statistics).__name__}"
            )
        if is_reset and self.statistics is not None:
            raise ValueError('statistics: method "reset" does not use those of the models')


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
