"""Tables of plain records: what analyses return."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmatch.files import writing

if TYPE_CHECKING:
    import pandas

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

    def __str__(self) -> str:
        """The table as Markdown."""
        cells = [self.columns, *([_text(v) for v in row.values()] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells.insert(1, ["-" * w for w in widths])
        lines = [" | ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)) for line in cells]
        return "\n".join(f"| {line} |" for line in lines)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
