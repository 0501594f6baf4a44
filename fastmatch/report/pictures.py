"""Geometry of the page's charts, and images of matrices. The templates draw them in the colours of the page."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from fastmatch.report.structure import Structure

__all__ = ["Chart", "Line", "Scale", "arcs_of", "chart", "matrix_image", "scale_of"]

Tone: TypeAlias = Literal["before", "after", "extra"]
"""Which colour of the page a line has."""

POSITIVE, NEGATIVE = (37, 99, 235), (217, 95, 2)
"""Colours of matrix entries. The value is the opacity, so that zero is the page's own background, light or dark."""


@dataclass(frozen=True)
class Scale:
    """Values ``low`` to ``high`` along ``start`` to ``end`` of a drawing."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return where a value is, inside the drawing."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + min(max(share, 0.0), 1.0) * (self.end - self.start), 2)

    def ticks(self, count: int = 4) -> list[tuple[float, str]]:
        """Return about ``count`` round values as (place, text)."""
        step = _round_step((self.high - self.low) / max(count, 1))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [(self(k * step), f"{k * step + 0.0:.{digits}f}") for k in range(first, last + 1)]


def _round_step(width: float) -> float:
    power = 10.0 ** math.floor(math.log10(width))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= width * 0.999)


def scale_of(values: Sequence[float], start: float, end: float, *, include: Sequence[float] = ()) -> Scale:
    """Return a scale that holds all finite values and those to include, with a little room."""
    found = [v for v in (*values, *include) if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(found), max(found)
    room = 0.04 * (high - low) or max(abs(high), 1.0) * 0.1
    return Scale(
        low if low in include else low - room,
        high if high in include and high > low else high + room,
        start,
        end,
    )


@dataclass(frozen=True)
class Line:
    """A line of a chart: what it shows, its tone, and (x, y) values."""

    label: str
    tone: Tone
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """A chart of lines, ready to draw.

    Attributes:
        title: what is measured.
        x, y: scales.
        lines: (line, its points as SVG text).
        x_label: what is along the horizontal axis.
    """

    title: str
    x: Scale
    y: Scale
    lines: tuple[tuple[Line, str], ...]
    x_label: str

    WIDTH = 480
    HEIGHT = 250


def chart(title: str, x_label: str, lines: Sequence[Line], *, include: Sequence[float] = ()) -> Chart:
    """Return the geometry of a chart; ``include`` are values that the vertical axis must show."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x = Scale(min(xs), max(xs), 52, Chart.WIDTH - 18)
    y = scale_of(ys, Chart.HEIGHT - 48, 10, include=include)
    drawn = tuple(
        (line, " ".join(f"{x(a)},{y(b)}" for a, b in line.points if math.isfinite(b))) for line in lines
    )
    return Chart(title, x, y, drawn, x_label)


def matrix_image(matrix: torch.Tensor) -> str:
    """Return a matrix of values from -1 to 1 as a PNG in a data URL: blue above zero, orange below, clear at zero."""
    values = matrix.nan_to_num(0.0).clamp(-1, 1).to(torch.float32)
    pixels = torch.empty(*values.shape, 4, dtype=torch.uint8, device="cpu")
    for channel in range(3):
        pixels[..., channel] = torch.where(values >= 0, POSITIVE[channel], NEGATIVE[channel]).to(torch.uint8)
    pixels[..., 3] = (values.abs() * 255).round().to(torch.uint8)
    return "data:image/png;base64," + base64.b64encode(_png(pixels)).decode()


def _png(pixels: torch.Tensor) -> bytes:
    """A (height, width, 4) image of bytes as a PNG file. Matplotlib can do so too, but it is not always installed."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.numpy().tobytes() for row in pixels.contiguous())

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + part(b"IHDR", header)
        + part(b"IDAT", zlib.compress(rows, 9))
        + part(b"IEND", b"")
    )


ROW = 26
"""Height of a row of the drawing of groups."""

ARCS_WIDTH = 190
"""Width of the arcs beside the names."""


def arcs_of(structure: Structure) -> list[tuple[str, float, str]]:
    """Return (SVG path, width of the line, names of the tensors) for every arc, the long ones first."""
    drawn = []
    for arc in sorted(structure.arcs, key=lambda arc: arc.first - arc.second):
        top, bottom = (ROW * k + ROW / 2 for k in (arc.first, arc.second))
        reach = min(ARCS_WIDTH - 12, 14 + 22 * math.sqrt(arc.second - arc.first))
        path = f"M0 {top} C{reach:.1f} {top} {reach:.1f} {bottom} 0 {bottom}"
        drawn.append((path, round(1 + math.log2(len(arc.tensors)), 1), "\n".join(arc.tensors)))
    return drawn
