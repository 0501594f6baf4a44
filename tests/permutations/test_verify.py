"""Verification names the group that changes the function."""

from __future__ import annotations

from math import comb

import pytest
import torch
from torch import nn

import fastmatch as fm
from fastmatch.permutations.disturb import RoundedSums
from fastmatch.spec import Axis, Group
from helpers.networks import build, fresh_seed


def test_a_wrong_spec_is_an_error_that_names_the_group():
    model, x = build("mlp", fresh_seed())
    spec = fm.PermutationSpec.trace(model, x)
    good = spec.groups["0"]
    bad = Group("broken", 24, (Axis("2.weight", 0), Axis("2.bias", 0)))
    wrong = fm.PermutationSpec({"0": good, "broken": bad}, spec.shapes)
    with pytest.raises(ValueError, match="'broken'") as error:
        fm.verify(model, wrong, x)
    assert "'0'" not in str(error.value)
    with pytest.raises(ValueError, match="'broken'"):
        fm.align(model, model, x, spec=wrong)
    assert fm.align(model, model, x, spec=wrong, verify=False).spec is wrong


def test_the_model_is_left_alone_and_dtype_too():
    model, x = build("resnet", fresh_seed())
    model.train().half()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    spec = fm.PermutationSpec.trace(model.float(), x)
    model.half()
    assert fm.verify(model, spec, x).error < 1e-10
    assert model.training
    assert all(
        torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items()
    )


def test_a_network_that_makes_nan_of_a_permutation_is_caught():
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(12, 8), torch.nn.Linear(8, 3)

        def forward(self, x):
            return self.second(self.first(x)) / (self.first.weight[0, 0] == self.start)

    model = Net().eval()
    model.start = model.first.weight[0, 0].item()  # type: ignore[assignment]
    spec = fm.PermutationSpec(
        {"h": Group("h", 8, (Axis("first.weight", 0), Axis("first.bias", 0), Axis("second.weight", 1)))},
        {k: tuple(v.shape) for k, v in model.state_dict().items()},
    )
    with pytest.raises(ValueError, match="'h'"):
        fm.verify(model, spec, torch.randn(2, 12), seed=1)


class Returns(nn.Module):
    """A network with its output handed on through a function."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.first, self.second, self.wrap = nn.Linear(12, 8), nn.Linear(8, 5), wrap

    def forward(self, x):
        return self.wrap(self.second(torch.relu(self.first(x))))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: torch.cat([y, torch.full((len(y), 1), float("nan"), dtype=y.dtype)], 1),
        lambda y: torch.cat([y, torch.full((len(y), 1), float("inf"), dtype=y.dtype)], 1),
        lambda y: (y * 1000).long(),
        lambda y: torch.complex(y, y),
    ],
    ids=["nan beside numbers", "inf beside numbers", "integers", "complex"],
)
def test_a_wrong_spec_is_caught_whatever_the_output_holds(wrap):
    model, x = Returns(wrap), torch.randn(4, 12)
    right = fm.PermutationSpec.trace(model, x)
    assert fm.verify(model, right, x).groups == ("first",)
    wrong = fm.PermutationSpec({"first": Group("first", 8, (Axis("first.weight", 0),))}, right.shapes)
    with pytest.raises(ValueError, match="group 'first'"):
        fm.verify(model, wrong, x)


def test_an_output_without_a_finite_number_proves_nothing():
    model, x = Returns(lambda y: y * float("nan")), torch.randn(4, 12)
    with pytest.raises(ValueError, match="no finite number"):
        fm.verify(model, fm.PermutationSpec.trace(model, x), x)


class Jumping(nn.Module):
    """A network whose outputs are a sign that rounding decides, where an input is zero; and units in order if asked."""

    def __init__(self, ordered: bool = False) -> None:
        super().__init__()
        self.a, self.c, self.ordered = nn.Linear(6, 64), nn.Linear(64, 3), ordered

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        balance = h.sum(1) - (h * 3).sum(1) / 3
        jump = torch.where(x[:, 0] == 0, (balance * 1e13).tanh(), 0)
        return self.c(h.cumsum(1) if self.ordered else h) + jump[:, None]


def test_where_rounding_alone_makes_outputs_jump_other_rounds_are_the_proof():
    torch.manual_seed(fresh_seed())
    x = torch.randn(8, 6)
    x[:, 0] = 0
    model = Jumping()
    spec = fm.PermutationSpec.trace(model, x)
    assert list(spec.groups) == ["a"]
    found = fm.verify(model, spec, x)
    assert found.error < 1e-10
    assert (found.compared, found.jumps) == (3, 1)
    with pytest.raises(ValueError, match="changes the network"):
        fm.verify(Jumping(ordered=True), spec, x)


class Doubtful(Jumping):
    """One whose outputs rounding decides with all weights but its own, whose last bias is zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        # Of 64 sums that are zero but for rounding, some come out otherwise even where a batch has one row.
        several = h[:, None] * torch.arange(1.0, 65.0, dtype=h.dtype)[:, None]
        balance = several.sum(2) - (several * 3).sum(2) / 3
        jump = torch.where(self.c.bias[0] != 0, (balance * 1e13).tanh().sum(1), 0)
        return self.c(h.cumsum(1) if self.ordered else h) + jump[:, None]


def test_where_no_more_rounds_agree_than_jump_a_warning_tells():
    torch.manual_seed(fresh_seed())
    x, model = torch.randn(8, 6), Doubtful()
    nn.init.zeros_(model.c.bias)
    spec = fm.PermutationSpec.trace(model, x)
    with pytest.warns(
        UserWarning, match="in 8 of 9 comparisons rounding alone .* the proof rests on 1 other"
    ):
        found = fm.verify(model, spec, x)
    assert (found.compared, found.jumps) == (1, 8)
    nn.init.ones_(model.c.bias)
    with pytest.raises(ValueError, match=r"cannot be shown: in all comparisons \(9\) .*'a'.* rounding alone"):
        fm.verify(model, spec, x)
    wrong = Doubtful(ordered=True)
    nn.init.zeros_(wrong.c.bias)
    with pytest.raises(ValueError, match="changes the network"):
        fm.verify(wrong, spec, x)


class Inverting(nn.Module):
    """A layer, the inverse of a matrix of Pascal, and a layer. No sum and no weight rounds the matrix: it holds integers."""

    def __init__(self, size: int, *, ordered: bool = False, semidefinite: bool = False) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(6, size), nn.Linear(size, 5)
        self.register_buffer(
            "table", torch.tensor([[comb(i + j, i) for j in range(size)] for i in range(size)])
        )
        self.ordered, self.semidefinite = ordered, semidefinite

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x) @ torch.linalg.inv(self.table.double()).to(x.dtype)
        if self.semidefinite:
            matrix = torch.ones(2, 2, dtype=torch.float64)
            matrix[1, 1] += torch.finfo(torch.float64).eps  # one rounding error from no factor
            h = h * torch.linalg.cholesky(matrix)[0, 0]
        return self.c(h.cumsum(1) if self.ordered else h)


@pytest.mark.parametrize("size", [8, 10, 12])
def test_rounding_that_an_inverse_magnifies_is_no_change(size):
    torch.manual_seed(fresh_seed())
    model, x = Inverting(size), torch.randn(5, 6)
    spec = fm.PermutationSpec.trace(model, x)
    assert list(spec.groups) == ["a", "table"]
    assert fm.verify(model, spec, x).compared >= 3
    with pytest.raises(ValueError, match="permuting changes"):
        fm.verify(Inverting(size, ordered=True), spec, x)


def test_a_factorization_that_rounding_refuses_ends_no_proof():
    torch.manual_seed(fresh_seed())
    model, x = Inverting(10, semidefinite=True), torch.randn(5, 6)
    spec = fm.PermutationSpec.trace(model, x)
    assert fm.verify(model, spec, x).compared == 3


@pytest.mark.parametrize(
    "function",
    [
        lambda matrix: torch.linalg.eigh(matrix).eigenvectors,
        lambda matrix: torch.linalg.eig(matrix).eigenvectors,
        lambda matrix: torch.linalg.svd(matrix).U,
    ],
    ids=["eigh", "eig", "svd"],
)
def test_vectors_that_rounding_chooses_are_others_with_other_rounding(function):
    generator = torch.Generator().manual_seed(fresh_seed())
    matrix = torch.ones(4, 4, dtype=torch.float64)  # three of its eigenvalues are equal
    before = function(matrix)
    with RoundedSums(torch.finfo(torch.float64).eps, generator) as sums:
        others = [function(matrix) for _ in range(8)]
    assert sums.decided
    assert max(float((other - before).abs().max()) for other in others) > 0.01
    assert torch.equal(matrix, torch.ones_like(matrix))


def test_constants_that_no_state_dict_carries_keep_their_values():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)
            self.register_buffer("scale", torch.full((5,), 2.0), persistent=False)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x) * self.scale))

    model, x = Scaled(), torch.randn(4, 3)
    spec = fm.PermutationSpec.trace(model, x)
    assert [group.size for group in spec.groups.values()] == [5]
    assert fm.verify(model, spec, x).error < 1e-9
