"""What every drawing does: import matplotlib, make axes if none are given, and write a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from fastmatch._internal.allowed import PICTURES
from fastmatch._internal.checks import check_choice, check_format
from fastmatch._internal.outputs import check_target, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "PICTURES",
    "TITLES",
    "Metric",
    "check_metric",
    "draw_panels",
    "drawing",
    "framed",
    "legend_beside",
]

Metric: TypeAlias = Literal["loss", "accuracy", "top5", "metric"]


TITLES: dict[str, str] = {
    "loss": "Loss",
    "accuracy": "Accuracy",
    "top5": "Top-5 accuracy",
    "metric": "Metric",
}
"""What a metric is called in a picture."""


def framed(axes: Axes, title: str) -> None:
    """Give axes a title on the left, a faint grid, and no lines above and on the right."""
    axes.set_title(title, loc="left", fontsize="medium")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def legend_beside(axes: Axes) -> None:
    """Show the names of the lines on the right of the axes, where they hide no line; nothing for lines without names."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, frameon=False, fontsize="small"
        )


def check_metric(metric: str) -> None:
    """Raise ValueError unless ``metric`` is one of the scores."""
    check_choice("metric", metric, Metric)


@contextmanager
def drawing(path: str | Path | None, ax: Axes | None, size: tuple[float, float] = (5, 3.5)) -> Iterator[Axes]:
    """Give the axes to draw on; afterwards write their figure to ``path`` if one is given.

    The file is written next to ``path`` and then renamed, so an interrupted run leaves no partial picture.

    Args:
        path: a .png, .svg or .pdf file; an existing one is replaced.
        ax: matplotlib axes; None makes new ones.
        size: width and height of a new figure in inches.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: another suffix.
        FileNotFoundError: the folder of ``path`` does not exist.
    """
    if path is not None:
        check_format(path, "path", PICTURES)
        check_target(path, force=True)
    axes = _new_axes(1, 1, size)[0] if ax is None else ax
    yield axes
    if path is not None:
        figure = axes.get_figure(root=True)
        assert figure is not None
        with writing(path, force=True) as temporary:
            figure.savefig(temporary, dpi=150, format=Path(path).suffix[1:])


def draw_panels(
    plot: Callable[..., Axes],
    metrics: Sequence[str],
    path: str | Path,
    size: tuple[float, float],
    *,
    is_row: bool,
) -> None:
    """Draw several metrics of one result into one picture, beside or below each other.

    Args:
        plot: draws one, as ``plot(metric=..., ax=...)``.
        metrics: what to draw.
        path: see :func:`drawing`.
        size: of one panel, in inches.
        is_row: beside each other.
    """
    rows, columns = (1, len(metrics)) if is_row else (len(metrics), 1)
    panels = _new_axes(rows, columns, (columns * size[0], rows * size[1]))
    with drawing(path, panels[0]):
        for metric, ax in zip(metrics, panels, strict=True):
            plot(metric=metric, ax=ax)
            ax.label_outer()


def _new_axes(rows: int, columns: int, size: tuple[float, float]) -> list[Axes]:
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'fastmatch[plot]'") from error
    # Axes that keep their shape are packed; and titles do not touch the edge, which is 0.08 inches away.
    layout = ConstrainedLayoutEngine(compress=True, w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=size, layout=layout)
    return [ax for row in figure.subplots(rows, columns, sharex="col", squeeze=False) for ax in row]
