"""What a report says, as data: the templates and the terminal's text show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from fastmatch.report.measures import Layer
from fastmatch.report.pictures import Chart
from fastmatch.report.structure import Structure

__all__ = ["Content", "LayerTable", "Matrix", "Tile"]

Mood: TypeAlias = Literal["good", "bad", ""]


@dataclass(frozen=True)
class Tile:
    """One number of the first screen.

    Attributes:
        label: what it is.
        value: the number as text.
        before: what it was before; empty if there is no before.
        note: what a reader should know about it.
        mood: ``"good"`` or ``"bad"`` colours it; empty does not.
    """

    label: str
    value: str
    before: str = ""
    note: str = ""
    mood: Mood = ""


@dataclass(frozen=True)
class LayerTable:
    """Numbers layer by layer, each as a place on one scale.

    Attributes:
        title, caption: what is measured, and how to read it.
        rows: in the order of the forward pass.
        low, high: the ends of the scale.
        mark: a value that a good layer has; None if there is none.
        kind: what a row is.
        words: names of the value before and after.
    """

    title: str
    caption: str
    rows: tuple[Layer, ...]
    low: float
    high: float
    mark: float | None = None
    kind: str = "group"
    words: tuple[str, str] = ("before", "after")

    def place(self, value: float) -> float:
        """Return where a value is on the scale, in percent."""
        return round(100 * min(max((value - self.low) / (self.high - self.low), 0.0), 1.0), 2)

    @property
    def worst(self) -> list[Layer]:
        """The measured rows, the lowest first; those farthest from the mark if there is one."""
        found = [row for row in self.rows if row.after is not None]
        if self.mark is None:
            return sorted(found, key=lambda row: row.after or 0.0)
        return sorted(found, key=lambda row: -abs((row.after or 0.0) - (self.mark or 0.0)))


@dataclass(frozen=True)
class Matrix:
    """Similarities of some units of two models, as images, before and after."""

    name: str
    note: str
    before: str
    after: str


@dataclass(frozen=True, eq=False)
class Content:
    """The parts of a :class:`fastmatch.Report`, which says what they are; those that are empty are left out."""

    title: str
    subtitle: str
    sentences: tuple[str, ...]
    tiles: tuple[Tile, ...]
    charts: tuple[Chart, ...] = ()
    tables: tuple[LayerTable, ...] = ()
    matrices: tuple[Matrix, ...] = ()
    matrices_caption: str = ""
    structure: Structure | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    recipe: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
