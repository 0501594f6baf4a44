"""A cost whose rows are divided among ranks: one rank solves, and the others answer its questions about their rows."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from fastmatch._internal.ranks import Ranks, current
from fastmatch.assignment.cost import Cost
from fastmatch.assignment.problem import Solver
from fastmatch.assignment.solution import Assignment
from fastmatch.assignment.solve import solve

__all__ = ["ShardedCost"]

Question: TypeAlias = tuple[str, list[tuple[Any, ...]]]
"""A method of the cost, and its arguments for each rank."""

ASKED = "a question about rows"


class ShardedCost:
    """Rows of an (n, m) cost on the ranks of a torch.distributed process group: those of rank 0 first, then those of rank 1.

    No rank holds the rows of another. The rank that solves asks for the best columns of rows, and the others read theirs:
    the column duals go to them, k entries by row come back. All ranks call :meth:`solve`; only there is the cost read. In one
    process it is the cost that it is given.

    Example:
        >>> a, b = torch.randn(300, 16), torch.randn(300, 16)
        >>> mine = fm.assignment.FactorCost([(a, b)])  # of a's rows, those of this rank
        >>> fm.assignment.ShardedCost(mine).solve(maximize=True).is_certified
        True

    Args:
        local: the (r, m) cost of this rank's rows, such as a :class:`FactorCost` of some rows and all columns. Its
            :meth:`Cost.row_topk` and :meth:`Cost.row_min` must give a row a right answer whichever other rows it holds. Bounds
            may differ by rounding: then which of several optima is found may depend on the number of ranks.

    Raises:
        TypeError: ``local`` is not a :class:`Cost`.
        ValueError: the ranks have different numbers of columns, or more rows than columns.
    """

    def __init__(self, local: Cost) -> None:
        self._ranks: Ranks = current()
        with self._ranks.together():
            if not isinstance(local, Cost):
                raise TypeError(f"local: expected a Cost such as FactorCost, got {type(local).__name__}")
            shapes = self._ranks.exchange(local.shape, "a cost by rows")
            columns = {shape[1] for shape in shapes}
            if len(columns) > 1:
                raise ValueError(f"local: expected as many columns on every rank, got {sorted(columns)}")
            if sum(rows for rows, _ in shapes) > shapes[0][1]:
                raise ValueError(
                    f"local: expected at most as many rows on all ranks together as columns, "
                    f"{shapes[0][1]}, got {sum(rows for rows, _ in shapes)}; divide the transposed cost"
                )
        self._local = local
        self._ends = np.cumsum([rows for rows, _ in shapes])

    @property
    def shape(self) -> tuple[int, int]:
        """(rows of all ranks, columns)."""
        return int(self._ends[-1]), self._local.shape[1]

    @property
    def T(self) -> Cost:
        """A cost without answers: the rows of the transposed cost are on no rank."""
        return _Transposed(self)

    def solve(
        self, *, maximize: bool = False, warm_start: Assignment | None = None, solver: Solver | None = None
    ) -> Assignment:
        """Solve on rank 0, as :func:`fastmatch.solve` does, and return the assignment on all ranks.

        Args:
            maximize, warm_start, solver: see :func:`fastmatch.solve`. Those of rank 0 count.

        Raises:
            ValueError, TypeError: see :func:`fastmatch.solve`.
            RuntimeError: another rank failed or does not answer; the message names it.
        """

        def on_first() -> Assignment:
            found = solve(self, maximize=maximize, warm_start=warm_start, solver=solver)
            self._ranks.broadcast(lambda: None, ASKED)
            return found

        with self._ranks.together():
            if self._ranks.rank:
                self._answer()
            return self._ranks.broadcast(on_first, "the assignment of a cost by rows")

    def row_topk(
        self, v: np.ndarray, k: int, rows: np.ndarray | None = None, sign: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See :meth:`Cost.row_topk`."""
        rows = np.arange(self.shape[0]) if rows is None else np.asarray(rows)
        owners = self._owners(rows)
        parts = self._ask("row_topk", [(v, k, self._own(rows, owners, r), sign) for r in self._every()])
        items, costs, bound = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        back = np.argsort(np.argsort(owners, kind="stable"), kind="stable")
        return items[back], costs[back], bound[back]

    def row_min(self, v: np.ndarray, sign: float = 1.0) -> np.ndarray:
        """See :meth:`Cost.row_min`."""
        return np.concatenate(self._ask("row_min", [(v, sign) for _ in self._every()]))

    def entries(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """See :meth:`Cost.entries`."""
        rows, cols = np.asarray(rows), np.asarray(cols)
        owners = self._owners(rows)
        parts = self._ask("entries", [(self._own(rows, owners, r), cols[owners == r]) for r in self._every()])
        found = np.empty(len(rows))
        for rank, part in enumerate(parts):
            found[owners == rank] = part
        return found

    def entry_error(self) -> np.ndarray:
        """See :meth:`Cost.entry_error`."""
        return np.concatenate(self._ask("entry_error", [() for _ in self._every()]))

    def _every(self) -> range:
        return range(self._ranks.size)

    def _owners(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._ends, rows, side="right")

    def _own(self, rows: np.ndarray, owners: np.ndarray, rank: int) -> np.ndarray:
        """The rows of a rank, counted from its first one."""
        return rows[owners == rank] - (self._ends[rank - 1] if rank else 0)

    def _ask(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """Return the answers of all ranks to a question of the solving one."""
        if self._ranks.size > 1:
            self._ranks.broadcast(lambda: (method, arguments), ASKED)
        answers = [getattr(self._local, method)(*arguments[0])]
        if self._ranks.size > 1:
            self._ranks.exchange(None, f"the answers to {method}")  # an error of a rank is told here
            answers += [self._ranks.receive(rank) for rank in self._every() if rank]
        return answers

    def _answer(self) -> None:
        """Answer questions until there are no more."""
        while True:
            question: Question | None = self._ranks.broadcast(lambda: None, ASKED)
            if question is None:
                return
            method, arguments = question
            answer = getattr(self._local, method)(*arguments[self._ranks.rank])
            self._ranks.exchange(None, f"the answers to {method}")
            self._ranks.send(answer, 0)


class _Transposed:
    """Columns of a divided cost as rows, which no rank holds. No solver asks about them: there are at least as many."""

    def __init__(self, cost: ShardedCost) -> None:
        self.T: Cost = cost
        self.shape = cost.shape[1], cost.shape[0]

    def _refuse(self, *_args: Any, **_options: Any) -> Any:
        raise ValueError("ShardedCost: it is divided by rows; divide the transposed cost by its own rows")

    row_topk = row_min = entries = entry_error = _refuse
