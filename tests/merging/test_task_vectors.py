"""Task vectors, carried from one base model to another."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastmatch as fm
from helpers.networks import build, fresh_seed


def tuned_copy(model: nn.Module) -> nn.Module:
    """A copy with other parameters and running statistics."""
    new = {
        n: t + 0.1 * torch.rand_like(t) if t.is_floating_point() else t + 7
        for n, t in model.state_dict().items()
    }
    other = copy.deepcopy(model)
    other.load_state_dict(new)
    return other


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_a_task_reaches_the_same_model_in_another_order(name):
    seed = fresh_seed()
    base, x = build(name, seed)
    spec = fm.PermutationSpec.trace(base, x)
    plant = fm.Alignment(spec.random(torch.Generator().manual_seed(seed)), spec)
    target, tuned = plant.apply(base), tuned_copy(base)
    found = fm.move_task(target, tuned, base, plant)
    expected = plant.apply(tuned).state_dict()
    for key, tensor in found.state_dict().items():
        own = target.state_dict()[key] if "running" in key or "batches" in key else expected[key]
        torch.testing.assert_close(tensor, own, msg=key)
    half = fm.move_task(target.state_dict(), tuned.state_dict(), base.state_dict(), plant, scale=0.5)
    for key, tensor in half.items():
        mean = (target.state_dict()[key] + found.state_dict()[key].double()) / 2
        torch.testing.assert_close(tensor.double(), mean.double(), msg=key, atol=1e-6, rtol=1e-5)
    back = fm.move_task(found, tuned, base, plant, scale=-1.0)
    for key, tensor in back.state_dict().items():
        torch.testing.assert_close(tensor, target.state_dict()[key], msg=key, atol=1e-6, rtol=1e-5)


def test_a_task_vector_is_the_difference_of_what_is_learned():
    base = build("resnet", fresh_seed())[0].half()
    tuned = tuned_copy(base)
    found = fm.task_vector(tuned, base)
    assert set(found) == {n for n, _ in base.named_parameters()}
    for key, tensor in found.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, tuned.state_dict()[key].float() - base.state_dict()[key].float())


def test_what_does_not_fit_is_named():
    base, x = build("mlp", 0)
    other = nn.Linear(3, 2)
    alignment = fm.align(base, base, x)
    with pytest.raises(TypeError, match=r"alignment: expected what fm\.align"):
        fm.move_task(base, base, base, alignment.permutations)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="base"):
        fm.move_task(base, base, other, alignment)
    with pytest.raises(ValueError, match="scale"):
        fm.move_task(base, base, base, alignment, scale=float("nan"))
