"""GPUs that the Triton kernels do not run on: plain torch takes their place, with one warning."""

from __future__ import annotations

import re
import sys
import warnings
from unittest import mock

import pytest
import torch

import fastmatch as fm
from fastmatch_kernels import ops as kernels
from helpers.networks import fresh_seed, mlp
from helpers.pretended import pretended_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="pretends to have other GPUs")

REASONS = {
    "older": "triton 3.5.1 is older than 3.6",
    "missing": "triton is not installed",
    "no tensor cores": "device: expected one of .* got sm_7x",
}


@pytest.fixture(params=REASONS)
def bare_gpu(request):
    """A GPU without kernels, and the reason."""
    import triton

    capability = (7, 5) if request.param == "no tensor cores" else (9, 0)
    with pretended_cuda(capability) as gpu:
        if request.param == "older":
            with mock.patch.object(triton, "__version__", "3.5.1"):
                yield gpu, REASONS[request.param]
        elif request.param == "missing":
            with mock.patch.dict(sys.modules, {"triton": None}):
                yield gpu, REASONS[request.param]
        else:
            yield gpu, REASONS[request.param]


def test_every_call_runs_and_warns_once(bare_gpu):
    gpu, reason = bare_gpu
    torch.manual_seed(fresh_seed())
    a, b = mlp().eval(), mlp().eval()
    x, data = torch.randn(2, 12), [torch.randn(8, 12) for _ in range(2)]
    ga, gb, gx = gpu.module(a), gpu.module(b), gpu.tensor(x)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        by_weights = fm.align(ga, gb, gx)
        fm.align(ga, gb, gx, fm.ActivationMatching(data))
        merged = fm.merge([ga, by_weights.apply(gb)])
        for mode in ("joint", "sequential"):
            fm.renormalize(merged, [ga, by_weights.apply(gb)], data, fm.Renormalization("repair", mode=mode))
        factors = [(gpu.tensor(torch.randn(40, 6)), gpu.tensor(torch.randn(40, 6)))]
        cost = fm.assignment.FactorCost(factors)
        assert fm.solve(cost, solver=fm.assignment.CandidateLists()).is_certified
    assert not gpu.traffic.launches
    told = [str(w.message) for w in seen]
    assert len(told) == 1, told
    assert "cuda:0 runs plain torch in place of the Triton kernels" in told[0]
    assert re.search(reason, told[0])
    expected = fm.align(a, b, x)
    assert all(torch.equal(p, expected.permutations[g]) for g, p in by_weights.permutations.items())


def test_kernels_that_are_asked_for_are_an_error_on_such_a_gpu():
    with pretended_cuda((7, 5)) as gpu:
        x = gpu.tensor(torch.randn(4, 3))
        with pytest.raises(ValueError, match=r"device: expected one of .* got sm_7x"):
            kernels.gain([(x, x)], backend="triton")
