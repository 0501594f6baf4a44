"""GPT-2's Conv1D, a linear layer whose weight is (inputs, outputs), is renormalized as a linear layer is."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import fastmatch as fm


class Conv1D(nn.Module):
    """The layer as transformers has it."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(0.3 * torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


def pair(width: int = 16) -> tuple[nn.Sequential, nn.Sequential]:
    """The same network with GPT-2's layers and with torch's."""
    theirs = nn.Sequential(
        Conv1D(width, 6), nn.GELU(), Conv1D(width, width), nn.GELU(), Conv1D(5, width)
    ).eval()
    plain = nn.Sequential(
        *(nn.Linear(*m.weight.shape) if isinstance(m, Conv1D) else m for m in theirs)
    ).eval()
    with torch.no_grad():
        for mine, other in zip(plain, theirs, strict=True):
            if isinstance(other, Conv1D):
                mine.weight.copy_(other.weight.T)
                mine.bias.copy_(other.bias)
    return theirs, plain


@pytest.mark.parametrize("mode", ["joint", "sequential"])
@pytest.mark.parametrize("method", ["repair", "rescale", "reshift"])
def test_it_is_renormalized_as_a_linear_layer(method, mode):
    (a, plain_a), (b, plain_b) = pair(), pair()
    data = [torch.randn(9, 4, 6) for _ in range(2)]
    options = fm.Renormalization(method, mode)
    found = fm.renormalize(fm.merge([a, b]), [a, b], data, options)
    expected = fm.renormalize(fm.merge([plain_a, plain_b]), [plain_a, plain_b], data, options)
    with torch.no_grad():
        torch.testing.assert_close(found(data[0]), expected(data[0]), rtol=1e-4, atol=1e-4)


def test_its_statistics_are_permuted_with_its_outputs():
    (a, _), (b, _) = pair(), pair()
    data = [torch.randn(40, 6)]
    alignment = fm.align(a, b, data[0][:2])
    assert alignment.moved > 0
    both = fm.endpoint_statistics([a, b], data).permuted(None, alignment)
    measured = fm.endpoint_statistics([a, alignment.apply(b)], data)
    for found, expected in zip(both.models, measured.models, strict=True):
        for name in expected:
            torch.testing.assert_close(found[name].mean, expected[name].mean, rtol=1e-4, atol=1e-5)


def test_gpt2_is_renormalized_whole():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    a, b = (transformers.GPT2LMHeadModel(config).eval() for _ in range(2))
    data = [{"input_ids": torch.randint(40, (8, 10))}]
    layers = [name for name, m in a.named_modules() if type(m).__name__ == "Conv1D"]
    before = copy.deepcopy(a.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # embeddings, and the head that is tied to them, are left alone
        new = fm.renormalize(fm.merge([a, b]), [a, b], data, "repair")
    ends, found = fm.endpoint_statistics([a, b], data), fm.endpoint_statistics([new], data)
    assert set(layers) <= found.models[0].keys()
    targets = ends.targets([0.5, 0.5])
    for name in layers:
        torch.testing.assert_close(found.models[0][name].mean, targets[name].mean, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(t, before[k]) for k, t in a.state_dict().items())
