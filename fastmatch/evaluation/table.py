"""Tables of plain records, which analyses return."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmatch._internal.files import writing
from fastmatch.evaluation.plots import drawing, framed, legend_beside

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

__all__ = ["Table"]


@dataclass(frozen=True)
class Table:
    """Rows with the same columns, as plain dictionaries. :meth:`to_pandas` makes a data frame.

    Example:
        >>> table = fm.Table(({"x": 1, "y": 0.5}, {"x": 2, "y": 0.25}))
        >>> table.column("y")
        [0.5, 0.25]

    Attributes:
        rows: column name -> value, one mapping per row.
    """

    rows: tuple[dict[str, Any], ...]

    def __hash__(self) -> int:
        """A hash of the size and the columns, whatever their order; values may have none."""
        return hash((len(self.rows), frozenset(self.columns)))

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        return list(self.rows[0]) if self.rows else []

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list[Any]:
        """Return the values of one column; ValueError if there is none of that name."""
        if name not in self.columns:
            raise ValueError(f"name: expected one of {self.columns}, got {name!r}")
        return [row[name] for row in self.rows]

    def where(self, **values: Any) -> Table:
        """Return the rows that have these values in the named columns."""
        unknown = [name for name in values if self.rows and name not in self.columns]
        if unknown:
            raise ValueError(f"values: expected columns among {self.columns}, got {unknown[0]!r}")
        return Table(tuple(row for row in self.rows if all(row[k] == v for k, v in values.items())))

    def to_pandas(self) -> pandas.DataFrame:
        """Return a data frame; ImportError if pandas is not installed."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("a data frame needs pandas: pip install 'fastmatch[frames]'") from error
        return pandas.DataFrame(list(self.rows), columns=self.columns)

    def to_csv(self, path: str | Path, *, force: bool = False) -> None:
        """Write a CSV file in UTF-8. FileExistsError if it exists, unless ``force`` replaces it.

        A text that a spreadsheet would take for a formula gets a quote in front.
        """
        with (
            writing(path, force=force) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file)
            writer.writerow([_plain(name) for name in self.columns])
            writer.writerows([[_plain(row.get(name, "")) for name in self.columns] for row in self.rows])

    def plot(
        self,
        x: str,
        *columns: str,
        path: str | Path | None = None,
        by: str | None = None,
        ax: Axes | None = None,
    ) -> Axes:
        """Draw columns against the column ``x`` (needs matplotlib).

        Example:
            >>> table = fm.layer_table({"a": model_a, "b": model_b}, loader)
            >>> ax = table.plot("depth", "variance", by="model")

        Args:
            x: the column along the horizontal axis.
            columns: the columns to draw, one line each.
            path: a .png, .svg or .pdf file to write; an existing one is replaced.
            by: draw one line for each value of this column.
            ax: matplotlib axes to draw on; None makes new ones.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed (``pip install fastmatch[plot]``).
            ValueError: no column to draw, an unknown column, or a file of another format.
        """
        if not columns:
            raise ValueError(f"columns: expected at least one of {self.columns}")
        parts = [None] if by is None else list(dict.fromkeys(self.column(by)))
        with drawing(path, ax) as axes:
            for part in parts:
                rows = self if by is None else self.where(**{by: part})
                for column in columns:
                    names = [column] if len(columns) > 1 or part is None else []
                    names += [str(part)] if by else []
                    axes.plot(rows.column(x), rows.column(column), marker=".", label=", ".join(names))
            axes.set_xlabel(x)
            axes.set_ylabel(columns[0] if len(columns) == 1 else "")
            framed(axes, ", ".join(columns) + f" by {x}")
            if len(axes.lines) > 1:
                legend_beside(axes)
        return axes

    def __str__(self) -> str:
        """The table as Markdown, with its bars escaped."""
        cells = [[_text(v) for v in line] for line in (self.columns, *(row.values() for row in self.rows))]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells.insert(1, ["-" * w for w in widths])
        lines = [" | ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)) for line in cells]
        return "\n".join(f"| {line} |" for line in lines)


def _plain(value: Any) -> Any:
    """Return the value of a cell, with a text that begins as a formula quoted: names of tensors come from files."""
    is_formula = isinstance(value, str) and value.lstrip().startswith(("=", "+", "-", "@"))
    return f"'{value}" if is_formula else value


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", r"\|")
