"""Tables of plain records: what analyses return."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmatch._internal.files import writing

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

__all__ = ["Table"]


@dataclass(frozen=True)
class Table:
    """Rows with the same columns, as plain dictionaries; :meth:`to_pandas` where pandas is installed.

    Example:
        >>> table.column("loss")
        >>> table.to_pandas().plot(x="position", y="loss")
    """

    rows: tuple[dict[str, Any], ...]

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.rows[0]) if self.rows else []

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list[Any]:
        """One column's values, row by row."""
        if name not in self.columns:
            raise ValueError(f"name: expected one of {self.columns}, got {name!r}")
        return [row[name] for row in self.rows]

    def where(self, **values: Any) -> Table:
        """The rows that hold these values."""
        return Table(tuple(row for row in self.rows if all(row[k] == v for k, v in values.items())))

    def to_pandas(self) -> pandas.DataFrame:
        """A data frame; ImportError without pandas."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("a data frame needs pandas: pip install 'fastmatch[frames]'") from error
        return pandas.DataFrame(list(self.rows), columns=self.columns)

    def to_csv(self, path: str | Path, *, force: bool = False) -> None:
        """Writes a CSV file; an existing one is replaced only with ``force``."""
        with writing(path, force=force) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)

    def plot(
        self,
        x: str,
        *columns: str,
        path: str | Path | None = None,
        by: str | None = None,
        ax: Axes | None = None,
    ) -> Axes:
        """Draws columns against ``x``, a line each, or a line for every value of the column ``by``.

        Example:
            >>> table.plot("depth", "variance ratio", by="model", path="variance.png")

        Args:
            x: the column along the horizontal axis.
            columns: what to draw.
            path: a .png, .svg or .pdf file to write; an existing one is replaced.
            by: a column to tell lines apart by.
            ax: matplotlib axes to draw into; new ones otherwise.
        """
        if not columns:
            raise ValueError(f"columns: expected at least one of {self.columns}")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("drawing needs matplotlib: pip install 'fastmatch[plot]'") from error
        if ax is None:
            ax = Figure(figsize=(5, 3.5), layout="constrained").add_subplot()
        parts = [None] if by is None else list(dict.fromkeys(self.column(by)))
        for part in parts:
            rows = self if by is None else self.where(**{by: part})
            for column in columns:
                names = ([column] if len(columns) > 1 or part is None else []) + ([str(part)] if by else [])
                ax.plot(rows.column(x), rows.column(column), marker=".", label=", ".join(names))
        ax.set_xlabel(x)
        ax.set_ylabel(columns[0] if len(columns) == 1 else "")
        ax.legend()
        if path is not None:
            figure = ax.get_figure(root=True)
            assert figure is not None
            figure.savefig(path, dpi=150)
        return ax

    def __str__(self) -> str:
        """The table as Markdown."""
        cells = [self.columns, *([_text(v) for v in row.values()] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells.insert(1, ["-" * w for w in widths])
        lines = [" | ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)) for line in cells]
        return "\n".join(f"| {line} |" for line in lines)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
