"""Pictures drawn as SVG text from what the library finds. They follow the reader's palette, light or dark."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

import fastmatch as fm

__all__ = ["assignment", "tracing"]

STYLE = """<style>
.ground{fill:#fff}.ink{fill:#1b1f23}.quiet{fill:#c9d1d9}.line{stroke:#57606a;fill:none}.cell{fill:#f2f4f8;stroke:#c9d1d9}
.heat{fill:#0969da}.box{stroke:#d1242f;fill:none}.one{fill:#0969da}.two{fill:#e08214}
@media (prefers-color-scheme:dark){.ground{fill:#121416}.ink{fill:#e7e9eb}.quiet{fill:#484f58}.line{stroke:#a0a8b0}
.cell{fill:#1d2125;stroke:#484f58}.heat{fill:#58a6ff}.box{stroke:#ff7b72}.one{fill:#58a6ff}.two{fill:#f0a04b}}
</style>"""


class Residual(nn.Module):
    """A small network with a residual stream: two groups, one of which four matrices share."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down, self.head = (
            nn.Linear(n, m) for n, m in ((5, 6), (6, 9), (9, 6), (6, 3))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        stream = self.stem(x)
        return self.head(stream + self.down(torch.relu(self.up(stream))))


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="14">'
    ground = '<rect class="ground" width="100%" height="100%" rx="8"/>'
    return "\n".join([start, f"<title>{title}</title>", STYLE, ground, *parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, more: str = 'text-anchor="middle"') -> str:
    return f'<text class="ink" x="{x:g}" y="{y:g}" {more}>{text}</text>'


def _rect(kind: str, x: float, y: float, width: float, height: float, more: str = "") -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"{more}/>'


def tracing() -> str:
    """Draw the matrices of a residual network, with the rows and columns that tracing found to move together."""
    model = Residual()
    spec = fm.PermutationSpec.trace(model, torch.zeros(2, 5))
    colours = dict(zip(spec.groups, ("one", "two"), strict=True))
    group_at = {
        (axis.parameter, axis.dim): name for name, group in spec.groups.items() for axis in group.axes
    }
    unit, band, middle, x = 12, 8, 120, 50.0
    parts, steps = [], {"stem": "", "up": "ReLU", "down": "+", "head": ""}
    for layer, after in steps.items():
        rows, columns = spec.shapes[f"{layer}.weight"]
        height, width, top = unit * rows, unit * columns, middle - unit * rows / 2
        for k in range(rows):
            colour = colours.get(group_at.get((f"{layer}.weight", 0), ""), "quiet")
            parts.append(_rect(colour, x - band - 3, top + unit * k + 1, band, unit - 2))
            parts.append(_rect("cell", x + width + 6, top + unit * k, unit, unit))
        for k in range(columns):
            colour = colours.get(group_at.get((f"{layer}.weight", 1), ""), "quiet")
            parts.append(_rect(colour, x + unit * k + 1, top - band - 3, unit - 2, band))
            parts += [_rect("cell", x + unit * k, top + unit * j, unit, unit) for j in range(rows)]
        end = x + width + unit + 6
        parts.append(_text((x + end) / 2, middle + height / 2 + 22, f"{layer} {rows} × {columns}"))
        if layer != "head":
            parts.append(f'<path class="line" d="M{end + 8:g} {middle}h34m-6 -4l6 4l-6 4"/>')
        if after:
            parts.append(_text(end + 25, middle - 9, after))
        if layer == "stem":
            start = end + 14
        if layer == "down":
            shortcut = f"M{start:g} {middle - 4}V28H{end + 25:g}V{middle - 24}m-4 -6l4 6l4 -6"
            parts.append(f'<path class="line" stroke-dasharray="4 3" d="{shortcut}"/>')
            parts.append(_text((start + end + 25) / 2, 22, "shortcut"))
        x = end + 66
    said = [(f"{name}: {group.size} units", colours[name]) for name, group in spec.groups.items()]
    said.append(("input and classes stay", "quiet"))
    for number, (text, colour) in enumerate(said):
        parts.append(_rect(colour, 40 + 215 * number, 222, 12, 12))
        parts.append(_text(58 + 215 * number, 233, text, ""))
    return _svg(720, 250, "Rows and columns that move together", parts)


def assignment() -> str:
    """Draw gains with the assignment of largest sum, the gains in the found order, and the proof that no other is better."""
    rng = np.random.default_rng(1)
    size, cell, left, top = 14, 14, 20, 40
    a = rng.standard_normal((size, 24))
    b = a[rng.permutation(size)] + 0.6 * rng.standard_normal((size, 24))
    gain = a @ b.T
    found = fm.solve(gain, maximize=True)
    assert found.is_certified
    columns = np.asarray(found.col_ind)
    lacking = np.asarray(found.u)[:, None] + np.asarray(found.v)[None, :] - gain
    chosen, diagonal = list(enumerate(columns)), [(k, k) for k in range(size)]
    shades = (gain - gain.min()) / np.ptp(gain)
    near = np.clip(1 - lacking / np.quantile(lacking, 0.5), 0, 1)
    panels = (
        ("gain of each pair", shades, chosen, ("boxes: one per row and", "column, of largest sum")),
        ("B in the found order", shades[:, columns], diagonal, ("the same gains,", "columns reordered")),
        (
            "what a pair lacks",
            near,
            chosen,
            ("u + v − gain: never below 0,", "and 0 in the boxes: the proof"),
        ),
    )
    parts = []
    for number, (title, values, boxes, caption) in enumerate(panels):
        x = left + number * (size * cell + 32)
        parts.append(_text(x + size * cell / 2, top - 14, title, 'text-anchor="middle" font-weight="bold"'))
        parts.append(_rect("cell", x, top, size * cell, size * cell))
        parts += [
            _rect("heat", x + cell * j, top + cell * i, cell, cell, f' fill-opacity="{values[i, j]:.2f}"')
            for i in range(size)
            for j in range(size)
            if values[i, j] >= 0.005
        ]
        parts += [
            _rect("box", x + cell * j + 1, top + cell * i + 1, cell - 2, cell - 2, ' stroke-width="2"')
            for i, j in boxes
        ]
        parts += [
            _text(x + size * cell / 2, top + size * cell + 22 + 18 * k, line)
            for k, line in enumerate(caption)
        ]
    return _svg(692, 290, "An assignment and its proof", parts)
