"""Norms are known by what they compute."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import fastmatch as fm
from fastmatch.renorm.norms import batch_norms, is_norm
from helpers.networks import fresh_seed


class LN(nn.Module):
    """Layer norm over channels (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.randn(channels)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(1, keepdim=True)
        z = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return z * self.gamma[:, None, None] + self.beta[:, None, None]


class RMS(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.scale)


class Running(nn.Module):
    """Batch norm with an own class and fixed gains."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)
        self.register_buffer("gain", torch.rand(channels) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = (x - self.running_mean[:, None, None]) * (self.running_var + 1e-5).rsqrt()[:, None, None]
        return z * self.gain[:, None, None]


class Supernorm(nn.Module):
    """A gain, whatever its name says."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.view(-1, *[1] * (x.ndim - 2))


class Watched(nn.Module):
    """Keeps statistics that it does not use."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()


class Constant(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.token.expand_as(x)


class Plain(nn.Module):
    """RMS norm without a gain."""

    def __init__(self, *_: int) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()


class OneGain(Plain):
    def __init__(self, *_: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.3]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * super().forward(x)


class FixedGain(Plain):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("gain", torch.rand(channels) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.gain.view(-1, *[1] * (x.ndim - 2))


class Active(LN):
    """A norm with its activation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Dropout(0.5), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x[..., None])[..., 0]))


class Swish(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


class Block(nn.Module):
    """A scaled branch, as of ConvNeXt. Its output does not grow with its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.norm, self.linear = nn.LayerNorm(channels), nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gamma * self.linear(self.norm(x))

    def __deepcopy__(self, memo: object) -> nn.Module:
        pytest.fail("a block was copied")


@pytest.mark.parametrize("module", [
    Plain(), OneGain(), FixedGain(6), Active(6), LN(6), RMS(6), RMS(6).half(), nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.BatchNorm2d(6), nn.RMSNorm(6),
    nn.InstanceNorm2d(6, affine=True), nn.SyncBatchNorm(6),
], ids=lambda m: type(m).__name__)  # fmt: skip
def test_norms_are_found_under_any_name(module):
    assert is_norm(module)


@pytest.mark.parametrize(
    "module",
    [
        Supernorm(6),
        Constant(6),
        Swish(),
        Block(6),
        nn.Sequential(Plain()),
        nn.Sigmoid(),
        nn.PReLU(),
        nn.Linear(6, 6),
        nn.PReLU(6),
        nn.Conv2d(6, 6, 1),
        nn.ReLU(),
        nn.Embedding(6, 6),
        nn.GRU(6, 6),
    ],
    ids=lambda m: type(m).__name__,
)
def test_other_modules_are_no_norms(module):
    assert not is_norm(module)


def network(norm: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3), norm(6), nn.ReLU(), nn.Conv2d(6, 6, 3), norm(6), nn.ReLU())


def test_blocks_are_neither_run_nor_copied():
    ran = []

    def forward(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        ran.append(x)
        return x

    model = nn.Sequential(Block(6), nn.Linear(6, 6))
    model[0].forward = forward.__get__(model[0])
    plan = fm.plan_renormalization(model)
    assert plan.layers == ("0.linear", "1")
    assert plan.left_alone == {"0.gamma": "is a parameter of Block, no linear or convolution layer"}
    assert batch_norms(model) == {}
    assert ran == []


@pytest.mark.parametrize("norm", [Plain, OneGain, FixedGain])
def test_a_norm_without_a_vector_of_gains_is_told_of_where_biases_are_normalized(norm):
    ends = [network(norm) for _ in range(2)]
    assert fm.plan_renormalization(ends[0]).left_alone == {}
    with pytest.warns(UserWarning, match="without norms"):
        fm.merge(ends, biases="normalize")


def test_looking_for_norms_draws_no_random_numbers():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gain * nn.functional.dropout(x, 0.5)

    other, norm = Noisy(), Active(6).train()
    before = torch.get_rng_state()
    assert not is_norm(other)
    assert is_norm(norm)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_own_layer_norm_is_not_reported_and_a_gain_is():
    assert fm.plan_renormalization(network(LN)).left_alone == {}
    assert set(fm.plan_renormalization(network(Supernorm)).left_alone) == {"1", "4"}
    torch.manual_seed(fresh_seed())
    ends = [network(LN) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fm.renormalize(fm.merge(ends), ends, [torch.randn(8, 1, 8, 8)])
    with pytest.warns(UserWarning, match="without norms"):
        fm.merge(ends, biases="normalize")


def test_running_statistics_of_an_own_class_are_reset_if_it_normalizes_by_them():
    torch.manual_seed(fresh_seed())
    model, data = network(Running), [torch.randn(64, 1, 8, 8)]
    assert list(batch_norms(model)) == ["1", "4"]
    assert batch_norms(network(Watched)) == {}
    new = fm.renormalize(model, None, data, "reset")
    z = model[0](data[0])
    torch.testing.assert_close(new[1].running_mean, z.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new[1].running_var, z.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="needs batch norm"):
        fm.renormalize(network(Watched), None, data, "reset")


def test_looking_for_norms_changes_nothing():
    model = network(Running)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    batch_norms(model)
    is_norm(LN(6).train())
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
