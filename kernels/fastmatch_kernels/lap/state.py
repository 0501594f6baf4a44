"""The arrays of one solve, shared by the kernels of this folder. No numba here.

All kernels minimise ``c = sign * cost`` over n rows and m >= n columns, with sign 1 or -1, so that a maximisation needs
no negated copy. Column duals ``v`` (m,) are float64 and only fall. Row duals are implied: ``u_i = min_j c_ij - v_j``.

Each row has a candidate list: the columns of least ``c - v`` when the row was last read, and a bound on all other
columns. Because v only falls, ``c - v`` only rises, and the bound stays valid. A row is read again only if its list does
not settle a decision.

Lists are refilled in one of two ways, and ``C``, the first argument of the auction and of the augmentation, selects it
when they are compiled. If ``C`` is an (n, m) matrix, the kernel reads the row at once. If ``C`` is None, the kernel notes
the row in ``Refills`` and goes on with the next one; the caller then reads all noted rows in one product.

Kernels over whole rows take :class:`Costs` and :class:`State`. Kernels over lists take :class:`Lists`, :class:`Matching` and the others
below as plain tuples, and those that solve a small problem in one call take plain arrays: numba finds the type of a named tuple in
Python, which takes longer than a small solve.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = [
    "ACCEPTED",
    "ASIDE",
    "AUCTIONED",
    "BIDS",
    "CAPACITY",
    "CROWDED",
    "CROWDED_SHARE",
    "DOUBTFUL",
    "FEWER_PATHS",
    "FEW_PATHS",
    "FEW_ROWS",
    "FREE",
    "GROWING",
    "GROWN",
    "HUGE",
    "INFEASIBLE",
    "KEPT",
    "KEPT_FROM",
    "LARGEST",
    "LAST",
    "LISTED",
    "LISTS_AHEAD",
    "LONG",
    "NEARLY",
    "OPEN",
    "POPS",
    "READS",
    "RECTANGLE",
    "RECTANGLE_AHEAD",
    "RESUMED",
    "SEARCHES",
    "SLICES",
    "SOLVED",
    "SQUARE",
    "STRIDE",
    "TOO_LARGE",
    "WARM",
    "WARM_AHEAD",
    "WIDE",
    "WORST_SHARE",
    "WRONG",
    "ZEROS",
    "Best",
    "Costs",
    "Lists",
    "Matching",
    "Paths",
    "Refills",
    "State",
    "is_nearly_square",
    "matrix_lists",
    "new_best",
    "new_matching",
    "new_paths",
    "new_refills",
    "room_for",
]  # fmt: skip

FREE, ASIDE = -1, -3
"""Values of ``col_of`` for a row without a column: free, or left out for now."""

READS, BIDS, POPS, SEARCHES = range(4)
"""Places in ``counts`` (4,) int64: rows read again, bids, columns popped from the heap, path searches."""

SOLVED, WRONG, INFEASIBLE, TOO_LARGE, DOUBTFUL, CROWDED, LONG, WIDE, OPEN = range(9)
"""What became of a small problem. DOUBTFUL: solved, but rounding may have hidden a better solution. CROWDED, LONG and OPEN:
not yet. Many rows want the same columns, and other first duals are to be tried; paths are long, and candidate lists would shorten
them; so long that a problem of more columns than rows is better solved as a square one; or some rows are left."""

NEARLY = 8
"""A problem with up to 1/8 more columns than rows is solved as if rows of zeros made it square: see ``paths.level_columns``."""


def is_nearly_square(n: int, m: int) -> bool:
    """Whether a problem of n rows and m >= n columns is solved as a square one at once."""
    return m <= n + n // NEARLY


CROWDED_SHARE, GROWING, GROWN = 7 / 8, 0.5, 32
"""A wider problem is solved so too if row reduction leaves more than 7/8 of its rows free and then, after 32 paths or more, paths
have scanned, on average, at least half of the rows that had paths before them. So it goes on where all rows want the same columns, whatever their number.
A square problem has other first duals."""

WORST_SHARE = 8
"""The same if paths are expected to scan more than an eighth of the rows each. The square problem may take no more."""

RECTANGLE_AHEAD = 32
"""Scans per row that paths of crowded rows may be expected to take as those of a rectangle, before other first duals are looked for."""

LISTS_AHEAD = 24000
"""Scans per row that the paths which are left are expected to take, times the columns, above which candidate lists take over: these have
to be read first, and a step over them takes as long as a scan of few columns. What other paths have taken is spent either way."""

WARM_AHEAD = 8
"""The same for given duals, which are then dropped: those of another problem may be worse than none."""

LISTED = 1 << 18
"""Entries from which candidate lists may take over: in smaller matrices a scan of a row takes little more than one of a list."""

AUCTIONED = 5 << 22
"""Bytes up to which an auction bids over whole rows. Beyond 20 MB rows leave the caches, and bids over lists are quicker."""

RECTANGLE, SQUARE, LAST = range(3)
"""What a problem is solved as: one of more columns than rows, which may turn out WIDE; a square one, which is given up, LONG, if it is
not nearly square and takes as long as the rectangle may; or what is left after both, to the end."""

ZEROS, RESUMED, WARM = range(3)
"""What one matrix is solved from: duals of zero, what a crowded problem left, or given duals."""

HUGE = 2.0**940
"""Sums of absolute values up to which no sum of duals leaves float64. Larger costs are multiplied by a power of two."""

LARGEST = np.finfo(np.float64).max

FEW_ROWS = 16
"""Rows of a larger matrix that are read before their sizes are judged: huge ones are usually seen in these."""

FEW_PATHS = 16
"""Paths from whose lengths those of the others are estimated."""

FEWER_PATHS = 8
"""The same in a rectangle."""

SLICES = 4
"""Row reduction is judged after as many bids as a quarter of the rows."""

TURNS = 8
"""Turns that paths from two kinds of first duals take at most."""

ACCEPTED = 4.0
"""Paths from other first duals that leave few rows free go on unless they are expected to scan four times as many rows as those from
zeros, of which only the first ones have been seen."""

KEPT = 5
"""Numbers per row or column, beside the dual, that a crowded problem keeps."""

VECTOR = 8
"""Numbers in a vector, ``simd.WIDTH``: arrays of column duals are padded to whole ones."""

STRIDE = 4 * VECTOR
"""Columns that are alike modulo STRIDE are a set. One scan finds the minima of all sets."""

KEPT_FROM = 96
"""Columns from which the best columns of rows are kept. A shorter row is read as fast."""

CAPACITY = 24
"""Entries of a list that is filled from a matrix: three vectors. The cutoff is found by bisection, which lists a few
columns more than wanted."""


class Costs(NamedTuple):
    """The costs of one problem: entry (i, j) is ``sign * c[start + i * m + j]``, of n rows and m >= n columns."""

    c: np.ndarray  # flat, float32 or float64
    start: int | np.int64  # numba would compile everything once more for the literal 0
    n: int
    m: int
    sign: float  # 1 or -1, times a power of two


class Best(NamedTuple):
    """The best columns of each row, VECTOR of them: see ``best``. Without room for rows, nothing is kept."""

    items: np.ndarray  # (n * VECTOR,) int32: columns
    # (n * VECTOR + n + STRIDE,) float64, in one array because each takes time to pass: their c, inf where there are fewer; bounds by
    # row, which no other column's c - v is below, -inf where nothing is kept; and room for a read.
    numbers: np.ndarray


class State(NamedTuple):
    """What a solve over whole rows has found so far. Kernels write to it.

    Duals only fall, so ``seconds`` remains a bound.
    """

    v: np.ndarray  # (m in whole vectors,) float64: column duals, 0 beyond the columns
    row_of: np.ndarray  # (m,) int64: row of a column, -1 if the column is free
    col_of: np.ndarray  # (n,) int64: column of a row, -1 if the row is free
    least: np.ndarray  # (n,) float64: a row's least c - v when all rows were read; in the end its dual
    seconds: np.ndarray  # (n,) float64: a bound on a row's c - v in all columns but one
    columns: np.ndarray  # (n,) int64: that column
    stack: np.ndarray  # (n,) int64: the free rows, from the last to the first
    counts: np.ndarray  # (4,) int64: see READS
    best: Best


class Lists(NamedTuple):
    """Candidate lists in one pool: row i's are the ``length[i]`` entries from ``start[i]``.

    Lengths are whole numbers of vectors of eight. Unused entries have column 0 and cost inf.
    """

    start: np.ndarray  # (n,) int64
    length: np.ndarray  # (n,) int64
    cols: np.ndarray  # (pool,) int32
    costs: np.ndarray  # (pool,) c of those columns: float64, or the matrix's type
    bound: (
        np.ndarray
    )  # (n,) float64: least c - v outside the list when it was filled; inf if it holds every column


class Matching(NamedTuple):
    """Who is matched to whom."""

    row_of: np.ndarray  # (m,) int64: row of a column, -1 if the column is free
    col_of: np.ndarray  # (n,) int64: column of a row, FREE or ASIDE without one
    cost_of: np.ndarray  # (n,) float64: cost of a row's match


class Refills(NamedTuple):
    """Rows whose lists have to be filled again before they can go on."""

    pending: np.ndarray  # (n,) int64
    waiting: np.ndarray  # (n,) uint8: whether the augmentation has noted a row


class Paths(NamedTuple):
    """Workspace of the augmentation. Heap items are columns 0..m-1 and markers m..m+n-1, one per row."""

    key: np.ndarray  # (m + n,) float64: distance of an item; inf between searches
    heap: np.ndarray  # (m + n,) int64
    where: np.ndarray  # (m + n,) int64: an item's place on the heap; -1 between searches, -2 once popped
    touched: np.ndarray  # (2 (m + n),) int64: items to reset after the search
    came_from: np.ndarray  # (m,) int64: the row before a column on its path
    via: np.ndarray  # (m,) int64: the entry of that row's list
    scanned: np.ndarray  # (m,) int64: columns popped in this search
    base_of: np.ndarray  # (n,) float64: distance of a row
    read_in: np.ndarray  # (n,) int64: the search that last read a row; -1 at first


def new_best(n: int) -> Best:
    """Return room for the best columns of n rows, with nothing kept."""
    return Best(np.empty(n * VECTOR, np.int32), np.full(n * (VECTOR + 1) + STRIDE, -np.inf))


def matrix_lists(n: int, dtype: np.dtype) -> Lists:
    """Return n empty lists for a matrix. Their bounds say nothing yet."""
    return Lists(
        np.arange(n, dtype=np.int64) * CAPACITY,
        np.full(n, CAPACITY, np.int64),
        np.zeros(n * CAPACITY, np.int32),
        np.full(n * CAPACITY, np.inf, dtype),
        np.full(n, -np.inf),
    )


def new_matching(n: int, m: int) -> Matching:
    """Return an empty matching."""
    return Matching(np.full(m, -1, np.int64), np.full(n, FREE, np.int64), np.zeros(n))


def new_refills(n: int) -> Refills:
    """Return room for rows that wait."""
    return Refills(np.empty(n, np.int64), np.zeros(n, np.uint8))


def new_paths(n: int, m: int) -> Paths:
    """Return the augmentation's workspace."""
    return Paths(
        np.full(m + n, np.inf),
        np.empty(m + n, np.int64),
        np.full(m + n, -1, np.int64),
        np.empty(2 * (m + n), np.int64),
        np.empty(m, np.int64),
        np.empty(m, np.int64),
        np.empty(m, np.int64),
        np.empty(n),
        np.full(n, -1, np.int64),
    )


def room_for(m: int) -> int:
    """Return the size of the array in which a crowded problem of m columns waits for other first duals."""
    return 2 * (-(-m // VECTOR) * VECTOR + KEPT * m) + 7
