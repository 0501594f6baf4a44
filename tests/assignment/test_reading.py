"""What may be passed as a cost: memory of every kind, tensors of every kind, lists, and what is refused by name."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import linear_sum_assignment as scipy_lsa

from fastmatch.assignment import (
    CandidateLists,
    DenseCost,
    DenseShortlists,
    DeviceCost,
    FactorCost,
    LapJV,
    SmallDense,
    certificate,
    dense_shortlists,
    linear_sum_assignment,
    reading,
    solve,
    solve_batched,
)
from fastmatch.assignment.reading import EXACT32
from fastmatch_kernels.lap import lists, reduction, rows, small
from fastmatch_kernels.lap.narrow import BLOCK, narrow
from helpers.networks import fresh_seed

SOLVERS = [DenseShortlists(), SmallDense()]


def _read_only(a):
    view = a.view()
    view.flags.writeable = False
    return view


def _unaligned(a):
    raw = bytearray(a.nbytes + 1)
    raw[1:] = a.tobytes()
    return np.frombuffer(raw, a.dtype, offset=1).reshape(a.shape)


def _packed(a):
    table = np.zeros(a.shape, np.dtype([("flag", "u1"), ("cost", a.dtype)]))
    table["cost"] = a
    return table["cost"]


MEMORY = {
    "read-only": _read_only,
    "read-only, columns contiguous": lambda a: _read_only(np.asfortranarray(a)),
    "unaligned": _unaligned,
    "field of packed records": _packed,
    "reversed": lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
    "every other column": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "other byte order": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "matrix": lambda a: a.view(np.matrix),
    "nothing masked": np.ma.masked_array,
    "frame": pd.DataFrame,
    "memoryview": memoryview,
    "list": lambda a: a.tolist(),
    "fractions": lambda a: [[Fraction(float(x)) for x in row] for row in a],
    "decimals": lambda a: [[Decimal(float(x)) for x in row] for row in a],
    "words": lambda a: [[repr(float(x)) for x in row] for row in a],
}


@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_memory_of_every_kind_is_read_as_it_is(kind, dtype):
    plain = np.random.default_rng(fresh_seed()).standard_normal((23, 31)).astype(dtype)
    cost = MEMORY[kind](plain)
    best = plain[scipy_lsa(plain)].sum(dtype=np.float64)
    for solver in SOLVERS:
        found = solve(cost, solver=solver)
        assert found.objective == pytest.approx(best, rel=1e-6)
        assert certificate(cost, found)[0] <= certificate(cost, found)[1]
    assert solve_batched([cost] if isinstance(cost, list) else np.asarray(cost)[None])[0].tolist() == (
        found.col_ind.tolist()
    )
    assert np.array_equal(np.asarray(cost, dtype), plain)


def test_memory_that_repeats_one_row():
    row = np.random.default_rng(fresh_seed()).standard_normal(40)
    cost = np.broadcast_to(row, (30, 40))
    for solver in SOLVERS:
        assert solve(cost, solver=solver).objective == pytest.approx(np.sort(row)[:30].sum())


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])
@pytest.mark.parametrize("place", [0, -1], ids=["first row", "last row"])
def test_many_integers_become_float32_only_if_it_holds_all_of_them(dtype, place, monkeypatch):
    monkeypatch.setattr(reading, "MANY", 1999)
    cost = np.random.default_rng(fresh_seed()).integers(0, 100, (40, 50)).astype(dtype)
    assert DenseCost(cost[:-1]).matrix.dtype == np.float64, "few"
    cost[place, 3] = EXACT32
    assert DenseCost(cost).matrix.dtype == np.float32
    if dtype != np.uint32:
        assert DenseCost(-cost).matrix.dtype == np.float32
        assert DenseCost(-cost - 1).matrix.dtype == np.float64
    cost[place, 3] += 1
    kept = DenseCost(cost).matrix
    assert kept.dtype == np.float64
    assert np.array_equal(kept, cost)


@pytest.mark.parametrize("odd", [None, EXACT32 + 1, 0.1, 1e300, 1e-300, np.inf, np.nan], ids=repr)
@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_doubles_are_narrowed_only_if_float32_holds_all_of_them(odd, size):
    given = np.random.default_rng(fresh_seed()).integers(-1000, 1000, size).astype(np.float64)
    for place in (0, size // 2, size - 1):
        doubles = given.copy()
        if odd is not None:
            doubles[place] = odd
        narrowed = np.empty(size, np.float32)
        assert narrow(doubles, narrowed) == (odd is None or odd == np.inf)
        if odd is None:
            assert np.array_equal(narrowed, doubles)


@pytest.mark.parametrize("odd", [0.0, 1e-9])
@pytest.mark.parametrize("shape", [(80, 80), (80, 83), (60, 200)])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("forbidden", [False, True])
def test_what_is_narrowed_has_the_same_optimum(odd, shape, maximize, forbidden, monkeypatch):
    """The last entry is one that float32 holds, or not; the matrix that was given stays as it is."""
    narrowed, narrow = [], dense_shortlists._DensePhases.narrow

    def spy(phases):
        narrow(phases)
        if phases.m >= shape[1]:  # and not the tiny matrix that loads the kernels
            narrowed.append(phases.matrix.dtype == np.float32)

    monkeypatch.setattr(dense_shortlists._DensePhases, "narrow", spy)
    cost = np.random.default_rng(fresh_seed()).integers(0, 60, shape).astype(np.float64)
    cost[:, 20:] += -100 if maximize else 100  # many rows want few columns
    cost[-1, -1] += odd
    if forbidden:
        cost[::7, ::5] = -np.inf if maximize else np.inf
    kept = cost.copy()
    found = solve(cost, maximize=maximize, solver=DenseShortlists())
    assert narrowed, "most rows are free after the first read"
    assert all(x == (odd == 0.0) for x in narrowed)
    assert found.objective == pytest.approx(cost[scipy_lsa(cost, maximize=maximize)].sum(), rel=1e-15)
    assert found.is_certified
    assert np.array_equal(cost, kept)
    again = solve(cost, maximize=maximize, solver=DenseShortlists(), warm_start=found)
    assert again.objective == found.objective


@pytest.mark.parametrize("empty", [5, np.array(5), np.int32(5)], ids=repr)
def test_one_integer_is_no_matrix(empty):
    with pytest.raises(ValueError, match="cost: expected a matrix, got 0 dimensions"):
        solve(empty)


def test_lapjv_adds_integers_in_float64():
    """In float32 some of these came out one above the optimum."""
    for seed in range(60):
        g = np.random.default_rng(seed)
        cost = g.choice([-EXACT32, 1 - EXACT32, EXACT32 - 1, EXACT32, 0, 1, 3], (60, 60)).astype(np.float32)
        found = solve(cost, solver=LapJV())
        assert found.objective == cost[scipy_lsa(cost)].sum(dtype=np.float64)
        assert found.is_certified


def test_a_mapped_file_is_read_and_not_written(tmp_path):
    plain = np.random.default_rng(fresh_seed()).standard_normal((50, 50))
    np.save(tmp_path / "cost.npy", plain)
    cost = np.load(tmp_path / "cost.npy", mmap_mode="r")
    assert solve(cost).objective == pytest.approx(plain[scipy_lsa(plain)].sum())
    assert np.array_equal(np.load(tmp_path / "cost.npy"), plain)


def test_arrays_that_may_not_be_written_use_the_kernels_of_others():
    kernels = [getattr(module, name) for module in (lists, reduction, rows, small) for name in dir(module)]
    kernels = [k for k in kernels if hasattr(k, "signatures")]
    plain = np.random.default_rng(fresh_seed()).standard_normal((60, 60))
    for solver in SOLVERS:
        solve(plain, solver=solver)
    solve_batched(plain[None])
    before = [len(k.signatures) for k in kernels]
    for cost in (_read_only(plain), _unaligned(plain)):
        for solver in SOLVERS:
            solve(cost, solver=solver)
        solve_batched(cost[None])
    assert [len(k.signatures) for k in kernels] == before
    assert sum(before) > 4


TENSORS = {
    "negative view": lambda t: torch._neg_view(-t),
    "imaginary part of a conjugate": lambda t: torch.complex(t, -t).conj().imag,
    "real part": lambda t: torch.complex(t, t).real,
    "requires a gradient": lambda t: t.clone().requires_grad_(True) * 1,
    "parameter": torch.nn.Parameter,
    "expanded and sliced": lambda t: t[None].expand(3, -1, -1)[1],
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_of_every_kind(kind):
    plain = torch.from_numpy(np.random.default_rng(fresh_seed()).standard_normal((21, 34)))
    cost = TENSORS[kind](plain)
    best = plain.numpy()[scipy_lsa(plain.numpy())].sum()
    for given in (cost, DeviceCost(cost)):
        found = solve(given)
        assert found.objective == pytest.approx(best, rel=1e-12)
        assert certificate(given, found)[0] <= certificate(given, found)[1]
    row_ind, col_ind = linear_sum_assignment(cost)
    assert float(plain[row_ind, col_ind].sum()) == pytest.approx(best, rel=1e-12)
    assert solve_batched(cost[None])[0].tolist() == found.col_ind.tolist()


@pytest.mark.parametrize("kind", [*MEMORY, *TENSORS])
def test_factors_of_every_kind(kind):
    a, b = np.random.default_rng(fresh_seed()).standard_normal((2, 25, 6))
    make = MEMORY[kind] if kind in MEMORY else lambda x: TENSORS[kind](torch.from_numpy(x))
    gain = FactorCost([(make(a), make(b))])
    best = (a @ b.T)[scipy_lsa(a @ b.T, maximize=True)].sum()
    found = solve(gain, maximize=True, solver=CandidateLists())
    assert found.objective == pytest.approx(best, rel=1e-9)


def test_factors_are_refused_by_name():
    with pytest.raises(ValueError, match="factors: has masked entries"):
        FactorCost([(np.ma.masked_array(np.eye(3), np.eye(3)), np.eye(3))])
    with pytest.raises(TypeError, match="factors: expected floating-point matrices, got int64"):
        FactorCost([(np.eye(3, dtype=np.int64), np.eye(3))])
    with pytest.raises(TypeError, match="factors: expected floating-point matrices"):
        FactorCost([(np.eye(3, dtype=np.longdouble), np.eye(3))])


def test_narrow_floats_are_solved_as_stored():
    plain = torch.randn(30, 30).to(torch.float8_e4m3fn)
    wide = plain.double().numpy()
    assert solve(plain).objective == pytest.approx(wide[scipy_lsa(wide)].sum(), rel=1e-12)


REFUSED = {
    "sparse": (lambda: torch.eye(4).to_sparse(), TypeError, "expected a dense tensor"),
    "without memory": (lambda: torch.empty(4, 4, device="meta"), TypeError, "expected a dense tensor"),
    "complex": (lambda: torch.zeros(4, 4, dtype=torch.complex64), TypeError, "expected real numbers"),
    "wide floats": (lambda: np.eye(4, dtype=np.longdouble), TypeError, "expected real numbers"),
    "objects": (lambda: np.eye(4).astype(object), TypeError, "expected real numbers"),
    "words": (lambda: [["a", "b"], ["c", "d"]], TypeError, "expected real numbers"),
    "times": (lambda: np.zeros((2, 2), "m8[s]"), TypeError, "expected real numbers"),
    "ragged": (lambda: [[1.0, 2.0], [3.0]], ValueError, "expected a matrix of numbers"),
    "nothing": (lambda: [[1.0, None], [2.0, 3.0]], ValueError, "NaN"),
    "masked": (lambda: np.ma.masked_array(np.eye(3), np.eye(3, dtype=bool)), ValueError, "masked entries"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_solved_is_refused_by_name(kind):
    make, error, message = REFUSED[kind]
    with pytest.raises(error, match=rf"^cost: .*{message}"):
        solve(make())
    stack = [make()] if isinstance(make(), list) else make()[None]
    with pytest.raises(error, match=rf"^costs: .*{message}"):
        solve_batched(stack)


def test_scipys_contract_ignores_a_mask_and_says_so():
    plain = np.random.default_rng(fresh_seed()).standard_normal((5, 5))
    with pytest.warns(UserWarning, match="mask is ignored"):
        found = linear_sum_assignment(np.ma.masked_array(plain, np.eye(5, dtype=bool)))
    assert np.array_equal(found[1], scipy_lsa(plain)[1])


@pytest.mark.parametrize("kind", ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", ">i4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_entries_of_every_type_are_solved_as_float64_is(kind, order):
    high = 2 if kind == "?" else 100
    cost = np.random.default_rng(1).integers(0, high, (30, 40))
    given = np.asarray(cost, kind, order=order)
    found, best = solve(given), cost[scipy_lsa(cost)].sum()
    assert found.objective == best == cost[linear_sum_assignment(given)].sum()
    assert found.is_certified
    assert (
        cost[linear_sum_assignment(given, maximize=True)].sum() == cost[scipy_lsa(cost, maximize=True)].sum()
    )


def test_narrow_integers_at_their_ends_are_exact():
    ends = np.iinfo(np.int32)
    cost = np.array([[ends.max, ends.max - 1], [ends.min, ends.min + 2]], np.int32)
    assert solve(cost).objective == (ends.max - 1) + ends.min
    assert solve(cost, maximize=True).objective == ends.max + (ends.min + 2)
