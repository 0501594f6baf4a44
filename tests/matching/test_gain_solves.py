"""The first gains of a process are solved without compiled kernels, and nothing else about the result changes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import fastmatch as fm
from fastmatch.assignment import small_dense
from fastmatch.matching import gain_solves
from helpers.networks import fresh_seed, mlp

ALIGN = """
import sys, torch
import fastmatch as fm
from torch import nn
a, b = (nn.Sequential(nn.Linear(20, {width}), nn.ReLU(), nn.Linear({width}, 10)) for _ in range(2))
with torch.no_grad():
    for model in (a, b):
        model[0].weight[{zeros}] = 0
        model[0].bias[{zeros}] = 0
        model[2].weight[:, {zeros}] = 0
alignment = fm.align(a, b, torch.randn(4, 20), fm.{matcher})
from fastmatch.assignment.small_dense import is_loaded
print(is_loaded(), "numba" in sys.modules, "torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize("matcher", ["WeightMatching()", "ActivationMatching([torch.randn(64, 20)])"])
@pytest.mark.parametrize(
    ("width", "zeros", "loaded"), [(100, ":0", False), (300, ":0", False), (300, ":9", True)]
)
def test_kernels_are_loaded_where_many_assignments_are_best(programs, width, zeros, loaded, matcher):
    done = programs.run(ALIGN.format(width=width, zeros=zeros, matcher=matcher), check=True)
    has_numba = loaded or "Activation" in matcher  # whose statistics are compiled
    assert done.stdout.split() == [str(loaded), str(has_numba), "False"]


def aligned(patience: gain_solves._Patience, monkeypatch, *arguments, **options) -> fm.Alignment:
    monkeypatch.setattr(gain_solves, "_patience", patience)
    monkeypatch.setattr(small_dense, "_KERNELS", {})  # as in a process that begins
    return fm.align(*arguments, **options)


def patience(pops: int, *, is_longest: bool = True) -> gain_solves._Patience:
    found = gain_solves._Patience()
    found.pops, found.is_longest = pops, is_longest
    return found


@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("width", [32, 160])
@pytest.mark.parametrize("pops", [10**9, 500])
def test_the_permutations_are_those_of_the_compiled_solver(monkeypatch, width, pops, by):
    torch.manual_seed(fresh_seed())
    a, b = mlp(width), mlp(width)
    x = torch.randn(256, 12)
    matcher = fm.WeightMatching() if by == "weights" else fm.ActivationMatching([x])
    monkeypatch.setattr(gain_solves, "FEW_UNITS", 0)
    first = aligned(patience(pops), monkeypatch, a, b, x, matcher=matcher)
    other = aligned(patience(0), monkeypatch, a, b, x, matcher=matcher)
    for name, permutation in other.permutations.items():
        assert torch.equal(permutation, first.permutations[name])
    assert all(gap <= bound for gap, bound in first.matching.gaps.values())


def test_dead_units_are_matched_as_by_the_compiled_solver(monkeypatch):
    torch.manual_seed(fresh_seed())
    a, b = mlp(160), mlp(160)
    with torch.no_grad():
        for model in (a, b):
            for before, after in itertools.pairwise(m for m in model if isinstance(m, nn.Linear)):
                before.weight[:7] = 0
                before.bias[:7] = 0
                after.weight[:, :7] = 0
    x = torch.randn(64, 12)
    first, other = (aligned(patience(pops), monkeypatch, a, b, x) for pops in (10**9, 0))
    for name, permutation in other.permutations.items():
        assert torch.equal(permutation, first.permutations[name])


def test_patience_ends_and_is_longer_where_kernels_must_be_compiled(monkeypatch):
    for kept, more in ((True, 0), (False, gain_solves.COMPILING)):
        monkeypatch.setattr(small_dense, "_KERNELS", {})
        monkeypatch.setattr("fastmatch_kernels._numba.cache.is_kept", lambda kernel, kept=kept: kept)
        start = patience(1, is_longest=False)
        monkeypatch.setattr(gain_solves, "_patience", start)
        assert start.left() == 1
        gain = torch.randn(150, 150, generator=torch.Generator().manual_seed(fresh_seed()))
        found = gain_solves.solve_gain(gain)
        assert start.is_longest
        assert found.stats["solver"] == ("SmallDense" if kept else "ShortestPaths")
        assert start.pops == 0 if kept else 0 < start.pops < more
        assert found.is_certified


def test_kernels_that_are_loaded_are_used(monkeypatch):
    gain = torch.randn(150, 150, generator=torch.Generator().manual_seed(fresh_seed()))
    fm.solve(np.ones((3, 3), np.float32))
    monkeypatch.setattr(gain_solves, "_patience", patience(10**9))
    assert gain_solves.solve_gain(gain).stats["solver"] == "SmallDense"


def on_a_grid(width: int) -> nn.Module:
    """A network whose second layer has few different weights, so that its gains tie once its neighbours have moved."""
    model = mlp(width)
    layers = [m for m in model if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for parameter in layers[1].parameters():
            parameter.copy_((parameter * 12).round() / 8)
    return model


@pytest.mark.parametrize("init", ["identity", "greedy"])
def test_ties_that_come_later_are_broken_as_by_kernels_from_the_start(monkeypatch, init):
    monkeypatch.setattr(gain_solves, "FEW_UNITS", 0)
    x, seed = torch.randn(8, 12), fresh_seed()
    for k in range(20):
        torch.manual_seed(seed + k)
        a, b = on_a_grid(50), on_a_grid(50)
        matcher = fm.WeightMatching(init=init, seed=k)
        first, other = (
            aligned(patience(pops), monkeypatch, a, b, x, matcher, verify=False) for pops in (10**9, 0)
        )
        for name, permutation in other.permutations.items():
            assert torch.equal(permutation, first.permutations[name]), k


def test_gains_that_numpy_has_solved_are_solved_again_before_one_with_ties(monkeypatch):
    g = torch.Generator().manual_seed(fresh_seed())
    for _ in range(40):
        gains = [torch.randn(30, 30, generator=g), torch.randint(4, (30, 30), generator=g).float()]
        found = []
        for pops in (10**9, 0):
            monkeypatch.setattr(gain_solves, "_patience", patience(pops))
            monkeypatch.setattr(small_dense, "_KERNELS", {})
            solver, last = gain_solves.GainSolver(None, waits=True), None
            for gain in gains:
                last = solver.solve("group", gain, last)
            assert last is not None
            found.append(last)
            assert not solver.recorded
            assert solver.room == gain_solves.RECORDED
        assert found[0].col_ind.tolist() == found[1].col_ind.tolist()
        assert found[0].gap == found[1].gap


def test_numpy_stops_where_its_gains_would_take_much_memory(monkeypatch):
    monkeypatch.setattr(gain_solves, "_patience", patience(10**9))
    monkeypatch.setattr(small_dense, "_KERNELS", {})
    monkeypatch.setattr(gain_solves, "RECORDED", 2 * 4 * 30 * 30)
    g = torch.Generator().manual_seed(fresh_seed())
    solver = gain_solves.GainSolver(None, waits=True)
    gains = [torch.randn(30, 30, generator=g) for _ in range(4)]
    by = [solver.solve(name, gain, None).stats["solver"] for name, gain in zip("abcd", gains, strict=True)]
    assert by == ["ShortestPaths", "ShortestPaths", "SmallDense", "SmallDense"]
