"""The solver that reads whole rows: up to millions of entries, most matrices need few reads, and lists would cost more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fastmatch._internal.checks import check_type
from fastmatch.assignment._compile import prepared
from fastmatch.assignment.problem import (
    Infeasible,
    LapProblem,
    LapSolution,
    TooLarge,
    check_entries,
)
from fastmatch.assignment.reading import for_kernels
from fastmatch.assignment.schedule import check_fields
from fastmatch_kernels.lap.schedule import CROWDED_FROM, SmallSchedule
from fastmatch_kernels.lap.state import (
    CROWDED,
    DOUBTFUL,
    INFEASIBLE,
    LAST,
    LISTED,
    LONG,
    RECTANGLE,
    RESUMED,
    SOLVED,
    SQUARE,
    TOO_LARGE,
    WARM,
    WIDE,
    ZEROS,
    is_nearly_square,
    room_for,
)

__all__ = ["SmallDense", "is_loaded"]


_KERNELS: dict[np.dtype, Callable[..., int]] = {}
"""The compiled kernels that were used already, by the type of the entries."""

_NONE = np.empty(0)

DEFAULT = SmallSchedule()


def is_loaded() -> bool:
    """Whether this process has loaded or compiled the kernel for some type of entries."""
    return bool(_KERNELS)


def solve_small(
    matrix: np.ndarray, maximize: bool, *, proof: bool, listed: bool = False, start: np.ndarray | None = None
) -> tuple[int, tuple[np.ndarray, ...]]:
    """Solve a matrix in one compiled call, by the default schedule.

    It is for problems that take less time than the pipeline of :func:`fastmatch.assignment.solve`.

    Args:
        matrix: (n, m) float32 or float64, not empty.
        maximize: look for the largest total.
        proof: whether more than the indices is wanted.
        listed: whether to stop, LONG, where candidate lists are quicker.
        start: column duals of the minimisation to start from, for a square matrix whose rows are contiguous. If paths from
            them are long, they are dropped.

    Returns:
        The state, SOLVED, DOUBTFUL, LONG or another one of ``fastmatch_kernels.lap.state``, and (pairs, u, v, numbers), which count
        with the first two: pairs (2, min(n, m)) are rows and columns, and numbers are the objective, the gap, its bound,
        reads, bids, pops and searches. Without ``proof``, there are only pairs.
    """
    rows, columns = matrix.shape
    flags = matrix.flags
    transposed = rows > columns or (rows == columns and flags.f_contiguous and not flags.c_contiguous)
    given = matrix.T if transposed else matrix
    if not given.flags.c_contiguous:
        given = np.ascontiguousarray(given)
    given = for_kernels(given)
    kernel = _KERNELS.get(matrix.dtype) or _kernel(matrix.dtype)
    pairs = np.empty((2, min(rows, columns)), np.int64)
    found = np.empty(rows + columns + 7) if proof else _NONE
    sign = -1.0 if maximize else 1.0
    n, m = given.shape
    kind, room = SQUARE if is_nearly_square(n, m) else RECTANGLE, _NONE
    if start is not None:
        state = kernel(given, sign, transposed, pairs, found, start, WARM, kind, listed)
        if state != LONG:
            return state, _results(rows, pairs, found)
    while True:
        if kind == SQUARE and n >= CROWDED_FROM:
            room = np.empty(room_for(m))
        state = kernel(given, sign, transposed, pairs, found, room, ZEROS, kind, listed)
        if state == CROWDED:
            _crowded_kernel(matrix.dtype)(given, room)
            state = kernel(given, sign, transposed, pairs, found, room, RESUMED, kind, listed)
        if state == WIDE:
            kind = SQUARE
        elif state == LONG and not (listed and given.size >= LISTED):
            kind = LAST
        else:
            return state, _results(rows, pairs, found)


def _results(rows: int, pairs: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return what :func:`solve_small` does, beside the state; ``found`` is empty without a proof."""
    return (pairs, found[:rows], found[rows:-7], found[-7:]) if len(found) else (pairs,)


def _kernel(dtype: np.dtype) -> Callable[..., int]:
    """Load or compile the kernel that solves one matrix."""
    from fastmatch_kernels.lap.small import solve_matrix

    prepared(
        f"the kernel for small matrices of {dtype}",
        ("matrix", dtype.char),
        lambda: solve_matrix(
            np.ones((2, 2), dtype),
            1.0,
            False,
            np.empty((2, 2), np.int64),
            np.empty(11),
            _NONE,
            ZEROS,
            SQUARE,
            False,
        ),
    )
    _KERNELS[dtype] = solve_matrix
    return solve_matrix


def _crowded_kernel(dtype: np.dtype) -> Callable[..., None]:
    """Load or compile the kernel that looks for other first duals."""
    from fastmatch_kernels.lap.small import crowded_duals

    few = CROWDED_FROM
    prepared(
        f"the kernel for crowded matrices of {dtype}",
        ("crowded", dtype.char),
        lambda: crowded_duals(np.ones((few, few), dtype), np.ones(room_for(few))),
    )
    return crowded_duals


def _by_default(problem: LapProblem, matrix: np.ndarray, listed: bool) -> tuple[int, LapSolution]:
    """Solve by the kernel of :func:`solve_small`, so that warm starts compile no other one."""
    sign = problem.sign
    state, found = solve_small(matrix, sign < 0, proof=True, listed=listed, start=problem.finite_start)
    (_, col_of), u, v, numbers = found
    if state not in (SOLVED, DOUBTFUL):  # duals and counts were not written
        return state, LapSolution(col_of, u, v, np.zeros(4, np.int64))
    return state, LapSolution(col_of, sign * u, sign * v, numbers[3:].astype(np.int64))


@dataclass(frozen=True)
class SmallDense:
    """Solve a matrix over whole rows on one core: the first choice up to 2^23 entries.

    Most matrices of that size are solved in a read or two. It takes factor costs too, whose matrix is computed in float64. +inf
    (-inf for a maximisation) forbids an entry.

    Example:
        >>> fm.solve(np.random.rand(50, 50), solver=fm.assignment.SmallDense()).is_certified
        True

    Args:
        schedule: when its phases run, a :class:`SmallSchedule`. Its numbers are checked here.
        hands_over: return None for a matrix of 2^18 entries or more whose paths turn out long, so that
            :func:`fastmatch.assignment.solve` begins again with :class:`DenseShortlists`.
    """

    schedule: SmallSchedule = field(default_factory=SmallSchedule)
    hands_over: bool = False

    def __post_init__(self) -> None:
        check_type("schedule", self.schedule, SmallSchedule)
        check_type("hands_over", self.hands_over, bool)
        check_fields("schedule", self.schedule._asdict(), SmallSchedule._field_defaults)

    def solve(self, problem: LapProblem) -> LapSolution | None:
        """Solve the problem: see :meth:`Solver.solve`."""
        matrix = problem.matrix(self)
        is_default = self.schedule == DEFAULT and matrix.size
        state, found = (
            _by_default(problem, matrix, self.hands_over)
            if is_default
            else self._scheduled(problem, for_kernels(matrix))
        )
        if state == LONG:
            return None
        if state == INFEASIBLE:
            raise Infeasible("cost: no assignment avoids the forbidden entries")
        if state == TOO_LARGE:
            raise TooLarge
        if state not in (SOLVED, DOUBTFUL):
            check_entries(matrix, problem.sign)
        return found

    def _scheduled(self, problem: LapProblem, matrix: np.ndarray) -> tuple[int, LapSolution]:
        """Solve by a schedule that is not a constant of the compiled code."""
        from fastmatch_kernels.lap.small import solve_one

        def run(costs: np.ndarray, duals: np.ndarray | None) -> tuple[int, LapSolution]:
            n, m = costs.shape
            v, u, counts = np.zeros((m + 7) // 8 * 8), np.empty(n), np.zeros(4, np.int64)
            row_of, col_of = np.empty(m, np.int64), np.empty(n, np.int64)
            if duals is not None:
                v[:m] = duals
            state = solve_one(
                costs.reshape(-1),
                n,
                m,
                problem.sign,
                self.schedule,
                duals is not None,
                self.hands_over,
                v,
                u,
                row_of,
                col_of,
                counts,
            )
            return state, LapSolution(col_of, u, v[:m], counts)

        prepared(
            f"the kernels for small matrices of {matrix.dtype} and another schedule",
            ("small", matrix.dtype.char),
            lambda: run(np.ones((2, 2), matrix.dtype), None),
        )
        return run(matrix, problem.finite_start)
