"""Parameters that an example does not reach: refused by name, joined over several examples, or held."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import fastmatch as fm
from helpers.networks import fresh_seed


class Tasks(nn.Module):
    """One trunk and a head per task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 8)
        self.heads = nn.ParameterList([nn.Parameter(torch.randn(n, 8)) for n in (3, 4)])

    def forward(self, x: torch.Tensor, task: int = 0) -> torch.Tensor:
        return torch.relu(self.trunk(x)) @ self.heads[task].t()


class Experts(nn.Module):
    """A mixture of experts as people write it: a loop over those that get tokens."""

    def __init__(self, count: int = 8) -> None:
        super().__init__()
        self.inputs, self.gate, self.output = nn.Linear(6, 12), nn.Linear(12, count), nn.Linear(12, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12)) for _ in range(count)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inputs(x)
        weights, chosen = self.gate(h).softmax(1).topk(2, 1)
        mixed = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            rows, ranks = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                mixed.index_add_(0, rows, expert(h[rows]) * weights[rows, ranks, None])
        return self.output(h + mixed)


def keeps_function(model: nn.Module, spec: fm.PermutationSpec, *inputs) -> bool:
    model = model.double().eval()
    moved = fm.Alignment(spec.random(), spec).apply(model)
    return bool(torch.allclose(moved(*inputs), model(*inputs), rtol=0, atol=1e-10))


def test_a_head_of_another_task_is_refused_by_name():
    model, x = Tasks(), torch.randn(2, 6)
    with pytest.raises(ValueError, match=r"does not read all of 'heads\.1'.*Examples"):
        fm.PermutationSpec.trace(model, x)
    with pytest.raises(ValueError, match=r"heads\.1"):
        fm.align(model, Tasks(), x)


def test_several_examples_are_joined():
    model, x = Tasks(), torch.randn(2, 6)
    spec = fm.PermutationSpec.trace(model, fm.Examples(x, (x, 1)))
    axes = {axis.parameter for group in spec.groups.values() for axis in group.axes}
    assert axes == {"trunk.weight", "trunk.bias", "heads.0", "heads.1"}
    y = torch.randn(9, 6).double()
    assert keeps_function(model, spec, y)
    assert keeps_function(model, spec, y, 1)
    aligned = fm.align(model.float(), Tasks(), fm.Examples(x, {"x": x, "task": 1}))
    assert list(aligned.permutations) == ["trunk"]


def test_groups_that_could_be_shared_are_held_or_moved_as_the_caller_says():
    model, x = Tasks(), torch.randn(2, 6)
    held = fm.PermutationSpec.trace(model, x, unread="hold")
    assert not held.groups
    assert {p.reason for p in held.pins if p.parameter == "trunk.bias"} == {
        "could move with heads.1, which was not read"
    }
    assert list(fm.PermutationSpec.trace(model, x, unread="ignore").groups) == ["trunk"]
    with pytest.raises(ValueError, match="unread: expected one of 'refuse', 'hold', 'ignore'; got 'keep'"):
        fm.PermutationSpec.trace(model, x, unread="keep")  # type: ignore[arg-type]


def test_a_group_too_large_for_what_was_not_read_moves():
    model, x = Tasks(), torch.randn(2, 6)
    model.heads[1] = nn.Parameter(torch.randn(4, 5))
    for unread in ("refuse", "hold"):
        assert list(fm.PermutationSpec.trace(model, x, unread=unread).groups) == ["trunk"]


def test_experts_without_tokens_are_traced_all_the_same():
    torch.manual_seed(fresh_seed())
    model, x = Experts().eval(), torch.randn(1, 6)
    spec = fm.PermutationSpec.trace(model, x)
    moved = {axis.parameter for group in spec.groups.values() for axis in group.axes}
    assert {
        f"experts.{k}.{part}" for k in range(8) for part in ("0.weight", "0.bias", "2.weight", "2.bias")
    } <= moved
    assert keeps_function(model, spec, torch.randn(200, 6).double())
    assert fm.align(model.float(), Experts().eval(), x).matching is not None


def test_what_only_training_reads_moves_with_the_rest():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inputs, self.output = nn.Linear(6, 8), nn.Linear(8, 3)
            self.mask = nn.Parameter(torch.randn(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inputs(x)
            if self.training:
                h[torch.rand(len(x)) < 0.5] = self.mask
            return self.output(nn.functional.dropout(torch.relu(h), 0.1, self.training))

    model = Masked().eval()
    spec = fm.PermutationSpec.trace(model, torch.randn(4, 6))
    assert {axis.parameter for axis in spec.groups["inputs"].axes} >= {
        "inputs.weight",
        "mask",
        "output.weight",
    }
    assert not model.training


def test_half_of_a_parameter_that_was_not_read_is_refused():
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inputs, self.scales, self.output = (
                nn.Linear(6, 8),
                nn.Parameter(torch.rand(16)),
                nn.Linear(8, 3),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.output(self.inputs(x) * self.scales[:8])

    with pytest.raises(ValueError, match="does not read all of 'scales'"):
        fm.PermutationSpec.trace(Halves(), torch.randn(2, 6))


def test_examples_are_at_least_one():
    with pytest.raises(ValueError, match="inputs: expected at least one example"):
        fm.Examples()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("unread", ["refuse", "hold", "ignore"])
def test_a_look_at_training_mode_leaves_running_statistics_and_modes(unread, training):
    """Whether a parameter is read in training is tried on the model itself."""

    class Normed(Tasks):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x: torch.Tensor, task: int = 0) -> torch.Tensor:
            return self.norm(torch.relu(self.trunk(x))) @ self.heads[task].t()

    torch.manual_seed(fresh_seed())
    model = Normed().train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refused = pytest.raises(ValueError, match="does not read") if unread == "refuse" else nullcontext()
    with refused:
        fm.PermutationSpec.trace(model, torch.randn(5, 6), unread=unread)
    assert model.training == training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
