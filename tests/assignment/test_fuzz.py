"""Random problems of every family, type, layout, scale and warm start: what judges them, and 200,000 of them at night."""

from __future__ import annotations

import runpy
from dataclasses import replace

import numpy as np
import pytest

import helpers.fuzz.judge
from bench.lib.families import FAMILIES
from helpers.fuzz import rehearsal
from helpers.fuzz.draw import problem
from helpers.fuzz.judge import judge
from helpers.fuzz.problems import Problem
from helpers.fuzz.run import findings, run
from helpers.networks import fresh_seed


def kinds(problem: Problem) -> set[str]:
    return {told[0] for told in judge(problem, 0) if not isinstance(told, float)}


def test_problems_come_again_and_are_of_every_kind():
    told = set()
    for number in range(400):
        first, again = problem(3, number, 20), problem(3, number, 20)
        assert first.told == again.told
        assert max(first.base.shape) <= 20
        np.testing.assert_array_equal(first.base, again.base)
        told |= set(first.told.split(", "))
    assert {"float64", "float32", "int64", "float16", "bool", "maximized", "columns", "solve_batched"} <= told
    assert any("warm start" in word for word in told)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_what_is_wrong_is_found(monkeypatch, maximize, dtype):
    base = np.array([[1, 2, 3], [2, 4, 6], [3, 6, 9]])
    given = Problem("products", (-base if maximize else base).astype(dtype), maximize, base.astype(float))
    assert kinds(given) == set()
    right = helpers.fuzz.judge.answer(given, None)[0]
    diagonal = np.arange(3)

    def answers(found, pairs):
        monkeypatch.setattr(helpers.fuzz.judge, "answer", lambda problem, warm: (found, pairs))
        return kinds(given)

    # The diagonal costs 14, the optimum 10.
    wrong = replace(right, row_ind=diagonal, col_ind=diagonal)
    assert answers(None, (diagonal, diagonal)) == {"wrong"}
    assert {"wrong, and said to be proved", "certificate above its bound"} <= answers(
        wrong, (diagonal, diagonal)
    )
    best = (right.row_ind, right.col_ind)
    assert answers(replace(right, gap=1.0), best) == {"gap above its bound"}
    assert answers(replace(right, gap_bound=np.inf), best) == {"no proof"}
    assert answers(replace(right, objective=11.0), best) == {"objective"}
    assert answers(replace(right, u=right.u + 1, v=right.v * 2 - 1), best) == {"certificate above its bound"}
    assert answers(None, (diagonal, np.array([0, 1, 1]))) == {"no matching"}
    assert answers(None, (diagonal, np.array([0, 1, 3]))) == {"no matching"}
    assert answers(None, (diagonal[:2], diagonal[:2])) == {"no matching"}


def test_integers_beyond_float64_are_compared_exactly(monkeypatch):
    base = np.array([[1, 0], [1, 1]])
    given = Problem("large", base + 2**60, False, base.astype(float))
    for columns, expected in (([1, 0], set()), ([0, 1], {"wrong"})):
        pairs = (np.arange(2), np.array(columns))
        monkeypatch.setattr(helpers.fuzz.judge, "answer", lambda *_, pairs=pairs: (None, pairs))
        assert kinds(given) == expected
        assert kinds(replace(given, cost=given.cost.astype(float))) == set(), "float64 cannot tell them apart"


def test_errors_count_unless_they_refuse_by_name():
    cost = np.array([[2**60, 1], [1, 2**60 + 1]])
    given = Problem("beyond", cost, False, cost.astype(float), may_refuse=("2^53",))
    assert kinds(given) == set()
    assert kinds(replace(given, cost=cost.astype(complex))) == {"raised"}


def test_a_process_that_crashes_or_does_not_end_is_replaced():
    found = list(findings(1, 6, work=rehearsal.work, loading=1.0))
    assert [(number, kind) for number, kind, _, _ in found] == [
        (1, "wrong"),
        (2, "crash (5)"),
        (4, "no end"),
        (6, "done"),
    ]


def test_a_short_run(capsys):
    """The kinds of problems that have no known fault, a hundred of them."""
    seed = fresh_seed()
    for number in range(300):
        given = problem(seed, number, 30)
        plain = given.warm is None and "largest" not in given.told and "sentinels" not in given.told
        if plain and "smallest normal" not in given.told:
            assert kinds(given) <= {"slow"}, f"seed {seed}, problem {number}: {given.told}"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_two_hundred_thousand_random_problems(part):
    assert len(FAMILIES) >= 90
    assert not run(fresh_seed(), 10_000)


@pytest.mark.slow
def test_no_index_leaves_its_array(monkeypatch, tmp_path):
    """Kernels compiled with bounds checks raise an IndexError where they would read or write out of range."""
    monkeypatch.setenv("NUMBA_BOUNDSCHECK", "1")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert not run(fresh_seed(), 20_000, largest=150)


@pytest.mark.filterwarnings("ignore:'helpers.fuzz.run' found in sys.modules")
def test_the_part_that_is_no_command_names_the_command():
    with pytest.raises(SystemExit, match=r"run python -m helpers\.fuzz with these options"):
        runpy.run_module("helpers.fuzz.run", run_name="__main__")
