"""Functions of whole matrices: factorizations, triangles, diagonals, distances, Fourier transforms, cross products."""

from __future__ import annotations

from collections.abc import Sequence

from fastmatch.spec.labels import Label, pin, unify
from fastmatch.spec.operations import Call
from fastmatch.spec.record import Record, fresh
from fastmatch.spec.rules.registry import rule, set_saved, unite_broadcast

__all__: list[str] = []


@rule(
    "_linalg_eigh", "_linalg_svd", "cholesky", "cholesky_inverse", "linalg_cholesky_ex", "linalg_eig",
    "linalg_householder_product", "linalg_lu", "linalg_lu_factor_ex", "linalg_qr", "linalg_solve_triangular", "tril",
    "triu",
)  # fmt: skip
def _matrix(record: Record, call: Call) -> None:
    """Keep the batch axes; the last two are pinned."""
    first, *others = [record.labels(t) for t in call.inputs]
    batch = first[:-2]
    for labels in others:
        for mine, label in zip(batch, labels[: len(batch)], strict=True):
            unify(mine, label, call.name)
    for labels in (first, *others):
        for label in labels[len(batch) :]:
            pin(label, call.name)
    _mix_beside(record, batch)
    for tensor in call.outputs:
        if record.knows(tensor):
            continue
        record.set(tensor, [*batch, *fresh(tensor.shape[len(batch) :], call.name)])


def _mix_beside(record: Record, kept: Sequence[Label]) -> None:
    """Note that an operation mixes positions along every axis but ``kept``, which have one order for all of them."""
    for label in kept:
        record.contract(label, [x for x in kept if x is not label])


@rule("linalg_inv_ex", "_linalg_solve_ex")
def _solution(record: Record, call: Call) -> None:
    """Rows of the matrix move with those of the right side, columns with the rows of the solution; so of an inverse."""
    matrix, right = record.labels(call.first), call.get("B")
    *batch, rows, columns = matrix
    if right is None:
        result = [*batch, columns, rows]
    else:
        given = record.labels(right)
        if not call["left"] or [x.size for x in given[: len(batch) + 1]] != [x.size for x in (*batch, rows)]:
            raise NotImplementedError("other sides, or batches that are broadcast")
        for mine, label in zip((*batch, rows), given, strict=False):
            unify(mine, label, call.name)
        result = [*batch, columns, *given[len(batch) + 1 :]]
    _whole(record, call, matrix, result, 1)


@rule("_linalg_det", "_linalg_slogdet", "linalg_matrix_exp")
def _square(record: Record, call: Call) -> None:
    """Rows and columns move together. The logarithm of a determinant would let them move apart; its sign would not."""
    matrix = record.labels(call.first)
    *batch, rows, columns = matrix
    unify(rows, columns, call.name)
    count = 2 if call.base == "_linalg_slogdet" else 1
    _whole(record, call, matrix, matrix if call.base == "linalg_matrix_exp" else batch, count)


@rule("eye")
def _identity(record: Record, call: Call) -> None:
    """The same for every order that rows and columns share."""
    rows, columns = call.out.shape
    if rows != columns:
        raise NotImplementedError("more rows than columns, or fewer")
    record.set(call.out, [Label(rows)] * 2)


def _whole(record: Record, call: Call, matrix: list[Label], result: list[Label], count: int) -> None:
    """Label the first results, and the codes of errors. The others are factors, which depend on the order."""
    *batch, rows, columns = matrix
    for label in (rows, columns):
        record.contract(label, batch)
    for tensor in call.outputs[:count]:
        record.set(tensor, result)
    for tensor in call.outputs[count:]:
        if tensor.ndim == len(batch):
            record.set(tensor, batch)
        else:
            set_saved(record, call, [tensor], matrix)


@rule("_fft_c2c", "_fft_c2r", "_fft_r2c")
def _fourier(record: Record, call: Call) -> None:
    labels = record.labels(call["self"])
    dims = {d % len(labels) for d in call["dim"]}
    for d in dims:
        pin(labels[d], call.name)
    record.mix(labels, dims)
    kept = [
        Label(n, pinned=call.name) if d in dims else label
        for d, (label, n) in enumerate(zip(labels, call.out.shape, strict=True))
    ]
    record.set(call.out, kept)


@rule("linalg_cross")
def _cross(record: Record, call: Call) -> None:
    labels = unite_broadcast([record.labels(t) for t in call.inputs], call.out.shape, call.name)
    dim = call.dim(len(labels))
    pin(labels[dim], call.name)
    record.mix(labels, {dim})
    record.set(call.out, labels)


@rule("_cdist_forward", "_euclidean_dist")
def _distances(record: Record, call: Call) -> None:
    """Distances of all pairs of rows: symmetric in the columns."""
    a, b = record.labels(call["x1"]), record.labels(call["x2"])
    unify(a[-1], b[-1], call.name)
    for x, y in zip(a[:-2], b[:-2], strict=True):
        unify(x, y, call.name)
    for label in (a[-1], b[-1], a[-2], b[-2]):
        record.contract(label, a[:-2])
    record.set(call.out, [*a[:-1], b[-2]])


@rule("diagonal")
def _diagonal(record: Record, call: Call) -> None:
    """The two axes of a whole diagonal move together."""
    labels = record.labels(call["self"])
    first, second = call.dim(len(labels), "dim1"), call.dim(len(labels), "dim2")
    along = _paired(call, labels[first], labels[second], call.out.shape[-1])
    record.set(call.out, [*(x for d, x in enumerate(labels) if d not in (first, second)), along])


def _paired(call: Call, a: Label, b: Label, size: int) -> Label:
    if call["offset"] == 0 and a.size == b.size:
        unify(a, b, call.name)
        return a
    pin(a, call.name)
    pin(b, call.name)
    return Label(size, pinned=call.name)


@rule("diag_embed")
def _embedded_diagonal(record: Record, call: Call) -> None:
    labels = record.labels(call["self"])
    rank = len(labels) + 1
    along = _paired(call, labels[-1], labels[-1], labels[-1].size)
    ends = {call.dim(rank, "dim1"), call.dim(rank, "dim2")}
    rest = iter(labels[:-1])
    own = [Label(call.out.shape[d], pinned=along.pinned) if call["offset"] else along for d in sorted(ends)]
    inserted = iter(own)
    record.set(call.out, [next(inserted) if d in ends else next(rest) for d in range(rank)])


@rule("trace")
def _trace(record: Record, call: Call) -> None:
    rows, columns = record.labels(call["self"])
    if rows.size == columns.size:
        unify(rows, columns, call.name)
    else:
        pin(rows, call.name)
        pin(columns, call.name)
    record.set(call.out, [])


@rule("_trilinear")
def _trilinear(record: Record, call: Call) -> None:
    """The product of three operands, each with new axes, summed over some axes."""
    operands = []
    for number in (1, 2, 3):
        labels = record.labels(call[f"i{number}"])
        for d in sorted(call[f"expand{number}"]):
            labels.insert(d, Label(1))
        operands.append(labels)
    shape = [max(x.size for x in column) for column in zip(*operands, strict=True)]
    labels = unite_broadcast(operands, shape, call.name)
    summed = {d % len(labels) for d in call["sumdim"]}
    new = {d % len(labels) for number in (1, 2, 3) for d in call[f"expand{number}"]}
    kept = [label for d, label in enumerate(labels) if d not in summed | new]
    for label in labels:
        record.contract(label, [x for x in kept if x is not label])
    record.set(call.out, [label for d, label in enumerate(labels) if d not in summed])
