"""Small networks are aligned without compiled kernels, and nothing else about the result changes."""

from __future__ import annotations

import pytest
import torch

import fastmatch as fm
from fastmatch.matching import small_network
from helpers.networks import fresh_seed, mlp

ALIGN = """
import sys, torch
import fastmatch as fm
from torch import nn
a, b = (nn.Sequential(nn.Linear(20, {width}), nn.ReLU(), nn.Linear({width}, 10)) for _ in range(2))
alignment = fm.align(a, b, torch.randn(4, 20))
print(alignment.matching.sweeps > 0, "numba" in sys.modules, "torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize(("width", "numba"), [(100, False), (150, True)])
def test_only_larger_networks_load_compiled_kernels(programs, width, numba):
    done = programs.run(ALIGN.format(width=width), check=True)
    assert done.stdout.split() == ["True", str(numba), "False"]


def test_the_permutations_are_those_of_the_compiled_solver(monkeypatch):
    torch.manual_seed(fresh_seed())
    a, b = mlp(32), mlp(32)
    x = torch.randn(64, 12)
    small = fm.align(a, b, x)
    monkeypatch.setattr(small_network, "SMALL", 0)
    other = fm.align(a, b, x)
    for name, permutation in small.permutations.items():
        assert torch.equal(permutation, other.permutations[name])
    assert all(gap <= bound for gap, bound in small.matching.gaps.values())
