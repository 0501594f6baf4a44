"""Replacing other libraries' solvers: everywhere, with their conventions, and taken out again."""

from __future__ import annotations

import sys
import textwrap
import types

import lap
import numpy as np
import ot
import pytest
import scipy.optimize
import torch
from scipy.optimize import linear_sum_assignment

import fastmatch.backends
from fastmatch.assignment import solve
from fastmatch.backends import LIBRARIES, installed, patch_target
from helpers.networks import fresh_seed

lapjv = pytest.importorskip("lapjv", reason="it has no wheel for this version of Python")

ORIGINALS = {
    "scipy": scipy.optimize.linear_sum_assignment,
    "lapjv": lapjv.lapjv,
    "lap": lap.lapjv,
    "ot": ot.emd,
}


def current() -> dict[str, object]:
    return {
        "scipy": scipy.optimize.linear_sum_assignment,
        "lapjv": lapjv.lapjv,
        "lap": lap.lapjv,
        "ot": ot.emd,
    }


@pytest.fixture
def generator():
    return np.random.default_rng(fresh_seed())


@pytest.fixture
def any_size(monkeypatch):
    """Small matrices go to ours as well, so that conventions show on them."""
    monkeypatch.setattr(patch_target, "LEAST_SIZE", 0)


def test_names_imported_earlier_and_later_are_replaced_and_put_back():
    later = types.ModuleType("imported_while_installed")
    with installed():
        assert linear_sum_assignment is scipy.optimize.linear_sum_assignment  # this test's own name
        assert ot.lp.emd is ot.emd
        assert scipy.optimize._lsap.linear_sum_assignment is linear_sum_assignment  # pyright: ignore
        for name, function in current().items():
            assert function.__wrapped__ is ORIGINALS[name]
        sys.modules[later.__name__] = later
        exec("from scipy.optimize import linear_sum_assignment as solver", later.__dict__)
        assert later.solver is linear_sum_assignment
    del sys.modules[later.__name__], later.solver
    assert current() == ORIGINALS
    assert linear_sum_assignment is ORIGINALS["scipy"]
    assert ot.lp.emd is ORIGINALS["ot"]


def test_a_module_imported_while_installed_gets_the_original_back(tmp_path, monkeypatch):
    (tmp_path / "imports_by_name.py").write_text(
        "from scipy.optimize import linear_sum_assignment as solver\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with installed("scipy"):
        import imports_by_name  # pyright: ignore[reportMissingImports]

        assert imports_by_name.solver.__wrapped__ is ORIGINALS["scipy"]
    assert imports_by_name.solver is ORIGINALS["scipy"]
    del sys.modules["imports_by_name"]


def test_exceptions_nesting_and_reentry_leave_nothing_behind():
    finders = list(sys.meta_path)
    with pytest.raises(KeyError), installed():
        raise KeyError
    assert current() == ORIGINALS
    context = installed()
    with context, context:
        replacement = scipy.optimize.linear_sum_assignment
        with installed("scipy"):
            assert scipy.optimize.linear_sum_assignment is replacement  # replaced once
        assert scipy.optimize.linear_sum_assignment is replacement
    assert current() == ORIGINALS
    with context:
        assert current() != ORIGINALS

    @installed("lap")
    def decorated():
        return lap.lapjv

    assert decorated() is not ORIGINALS["lap"]
    assert current() == ORIGINALS
    assert sys.meta_path == finders


def test_some_libraries_only_and_unknown_ones():
    with installed("lapjv"):
        assert lapjv.lapjv is not ORIGINALS["lapjv"]
        assert current()["scipy"] is ORIGINALS["scipy"]
    with pytest.raises(ValueError, match=r"libraries: expected some of .*got 'hungarian'"):
        installed("hungarian")
    assert set(LIBRARIES) == {"scipy", "lapjv", "lap", "ot", "rebasin", "ogkalu2", "sdnext", "sd-meh"}


def test_libraries_loaded_while_installed_are_replaced_and_importing_us_loads_none(programs):
    done = programs.run(
        textwrap.dedent("""
            import sys, warnings
            warnings.simplefilter("error")
            import fastmatch.backends
            assert not {"scipy", "ot", "lap", "lapjv", "rebasin", "numba", "triton"} & set(sys.modules)
            with fastmatch.backends.installed():
                import lap, lapjv, ot
                from scipy.optimize import linear_sum_assignment
                for f in (lap.lapjv, lapjv.lapjv, ot.emd, linear_sum_assignment):
                    assert f.__wrapped__
                from rebasin import PermutationCoordinateDescent as P
                assert P.calculate_permutations.__wrapped__
            for f in (lap.lapjv, lapjv.lapjv, ot.emd, linear_sum_assignment, P.calculate_permutations):
                assert not hasattr(f, "__wrapped__"), f
        """)
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda g: g.standard_normal((7, 7)),
        lambda g: g.standard_normal((7, 9)).astype(np.float32),
        lambda g: g.integers(0, 9, (9, 6)),
        lambda g: g.random((5, 5)) < 0.5,
        lambda g: g.standard_normal((4, 6)).tolist(),
        lambda g: np.zeros((0, 3)),
        lambda g: torch.randn(6, 6),
    ],
)
@pytest.mark.usefixtures("any_size")
def test_scipys_results(generator, make, maximize):
    cost = make(generator)
    expected = linear_sum_assignment(cost, maximize=maximize)
    with installed("scipy"):
        got = linear_sum_assignment(cost, maximize)
    values = np.asarray(cost)
    assert values[got].sum() == pytest.approx(values[expected].sum(), rel=1e-12)
    for ours, theirs in zip(got, expected, strict=True):
        assert type(ours) is type(theirs)
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
    assert (np.diff(got[0]) > 0).all()


@pytest.mark.usefixtures("any_size")
def test_scipys_errors_stay_scipys():
    forbidden = [
        np.zeros(3),
        np.array([[np.nan, 1], [2, 3]]),
        np.full((2, 2), np.inf),
        np.array([[1j, 1], [1, 1]]),
        np.array([["a", "b"], ["c", "d"]]),
    ]
    for cost in forbidden:
        with pytest.raises((ValueError, TypeError)) as theirs:
            linear_sum_assignment(cost)
        with installed("scipy"), pytest.raises((ValueError, TypeError)) as ours:
            linear_sum_assignment(cost)
        assert (type(ours.value), str(ours.value)) == (type(theirs.value), str(theirs.value))


def test_small_problems_stay_with_the_original(monkeypatch, generator):
    monkeypatch.setattr(fastmatch.backends.scipy, "solve", lambda *a, **k: pytest.fail("not ours"))
    with installed("scipy"):
        assert len(linear_sum_assignment(generator.random((20, 30)))[0]) == 20


@pytest.mark.parametrize("force_doubles", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
@pytest.mark.usefixtures("any_size")
def test_lapjvs_results(generator, dtype, force_doubles):
    cost = (100 * generator.random((8, 8))).astype(dtype)
    expected = lapjv.lapjv(cost, force_doubles=force_doubles)
    with installed("lapjv"):
        got = lapjv.lapjv(cost, force_doubles=force_doubles)
    for ours, theirs in zip((*got[:2], *got[2][1:]), (*expected[:2], *expected[2][1:]), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
    columns, rows, (value, u, v) = got
    assert (columns[rows] == np.arange(8)).all()
    assert isinstance(value, float)
    assert value == pytest.approx(expected[2][0], rel=1e-6)
    assert value == pytest.approx(cost[np.arange(8), columns].sum(dtype=np.float64), rel=1e-12)
    assert (u[:, None] + v <= cost + 1e-4).all()
    assert float(u.sum(dtype=np.float64) + v.sum(dtype=np.float64)) == pytest.approx(value, rel=1e-5)


@pytest.mark.usefixtures("any_size")
def test_lapjvs_float64_is_solved_as_given_and_its_errors_stay():
    # The optimum shows only in float64: in float32 both assignments cost the same.
    cost = np.array([[1.0, 1.0], [1.0 + 1e-12, 1.0]])
    with installed("lapjv"):
        assert lapjv.lapjv(cost)[0].tolist() == [0, 1]
        for wrong in (np.zeros((2, 3)), np.zeros(3)):
            with pytest.raises(ValueError, match="must be a square 2D numpy array"):
                lapjv.lapjv(wrong)


@pytest.mark.parametrize("shape", [(6, 6), (4, 7), (7, 4)])
@pytest.mark.usefixtures("any_size")
def test_laps_results(generator, shape):
    cost = generator.standard_normal(shape)
    options = {"extend_cost": shape[0] != shape[1]}
    value, x, y = lap.lapjv(cost, **options)
    with installed("lap"):
        got = lap.lapjv(cost, **options)
        pair = lap.lapjv(cost, return_cost=False, **options)
        limited = lap.lapjv(cost, cost_limit=0.1)
        if options["extend_cost"]:
            with pytest.raises(ValueError, match="Square cost array expected"):
                lap.lapjv(cost)
        with pytest.raises(TypeError, match=r"expected numpy\.ndarray"):
            lap.lapjv(cost.tolist())
    assert got[0] == pytest.approx(value, rel=1e-12)
    assert isinstance(got[0], float)
    assert got[1].dtype == x.dtype
    assert got[2].dtype == y.dtype
    assert (got[1] == x).all()
    assert (got[2] == y).all()
    assert (pair[0] == x).all()
    assert (pair[1] == y).all()
    assert all(np.array_equal(o, t) for o, t in zip(limited, lap.lapjv(cost, cost_limit=0.1), strict=True))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("marginals", ["given", "empty"])
@pytest.mark.usefixtures("any_size")
def test_pots_plan(generator, kind, dtype, marginals):
    n = 9
    cost = generator.random((n, n)).astype(dtype)
    mass = np.full(n, 1 / n, dtype) if marginals == "given" else np.zeros(0, dtype)
    given = (mass, mass, cost) if kind == "numpy" else [torch.from_numpy(x) for x in (mass, mass, cost)]
    expected = ot.emd(*given)
    with installed("ot"):
        got = ot.emd(*given)
    assert type(got) is type(expected)
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=1e-6)
    # Row i goes to the column of its partner: the plan is not transposed.
    columns = solve(cost).col_ind
    assert (np.asarray(got).argmax(axis=1) == columns).all()


@pytest.mark.usefixtures("any_size")
def test_what_is_no_assignment_stays_with_pot(generator, monkeypatch):
    monkeypatch.setattr(fastmatch.backends.pot, "solve", lambda *a, **k: pytest.fail("not ours"))
    n = 6
    cost = generator.random((n, n))
    uniform, uneven = np.full(n, 1 / n), np.arange(1.0, n + 1) / 21
    rectangle = generator.random((n, 4))
    with installed("ot"):
        assert np.allclose(ot.emd(uneven, uniform, cost).sum(axis=1), uneven)
        assert ot.emd([], [], rectangle).shape == (n, 4)
        plan, log = ot.emd(uniform, uniform, cost, log=True)
        assert log["cost"] == pytest.approx((plan * cost).sum())


def test_the_package_of_backends_is_an_attribute_of_fastmatch(programs):
    code = "import fastmatch\nwith fastmatch.backends.installed('scipy'):\n    pass"
    programs.run(code, check=True)
