"""The assignment engine reading its rows through the Triton kernel: in the interpreter, or on the GPU there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment as scipy_lsa

from fastmatch.assignment import CandidateLists, FactorCost, certificate, solve
from fastmatch_kernels import row_topk as kernels
from helpers.kernel_cases import DEVICE
from helpers.networks import fresh_seed


def pair(g: np.random.Generator, kind: str, n: int, m: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = g.standard_normal((n, d)), g.standard_normal((m, d))
    if kind == "sibling":
        b = a[g.permutation(n)][np.arange(m) % n] + 0.3 * b
    elif kind == "dead":
        a[g.random(n) < 0.2], b[g.random(m) < 0.2] = 0, 0
    return torch.from_numpy(a).float().to(DEVICE), torch.from_numpy(b).float().to(DEVICE)


@pytest.mark.grid
@pytest.mark.parametrize("metric", ["dot", "l2"])
@pytest.mark.parametrize("kind", ["gaussian", "sibling", "dead"])
@pytest.mark.parametrize(("n", "m"), [(48, 48), (30, 50), (50, 30)])
def test_the_kernel_drives_the_list_solver_to_the_dense_optimum(kind, n, m, metric, monkeypatch):
    g = np.random.default_rng(fresh_seed())
    maximize = bool(g.random() < 0.5)
    factors = [pair(g, kind, n, m, d) for d in (12, 3)]
    cost = FactorCost(factors, metric, backend="triton")
    backends, crossed = set(), []
    real = kernels.row_topk

    def seen(given, v, k, **options):
        backends.add(options["backend"])
        found = real(given, v, k, **options)
        crossed.append(found[0].shape)
        return found

    monkeypatch.setattr(kernels, "row_topk", seen)
    found = solve(cost, maximize=maximize, solver=CandidateLists())
    # Only exact ties are read once more, in float64, by the plain form.
    assert "triton" in backends
    assert crossed
    matrix = FactorCost(factors, metric).dense()
    best = matrix[scipy_lsa(matrix, maximize)].sum()
    assert found.objective == pytest.approx(best, rel=1e-11)
    assert found.gap <= found.gap_bound
    gap, bound = certificate(cost, found, maximize=maximize)
    assert abs(gap) <= bound


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_row_minima_of_the_certificate_are_exact_on_every_backend(backend):
    if backend == "cpu" and DEVICE != "cpu":
        pytest.skip("CPU twins take CPU tensors")
    g = np.random.default_rng(fresh_seed())
    a, b = pair(g, "dead", 50, 60, 9)
    v = np.rint(4 * g.standard_normal(60))
    cost = FactorCost([(a, b)], backend=backend)
    for sign in (1.0, -1.0):
        np.testing.assert_allclose(
            cost.row_min(v, sign), (sign * cost.dense() - v).min(1), rtol=0, atol=1e-12
        )


def test_refills_come_in_batches_and_never_as_the_whole_matrix():
    g = np.random.default_rng(fresh_seed())
    a, b = pair(g, "sibling", 60, 80, 8)
    cost = FactorCost([(a, b)], backend="triton")
    rows = np.array([3, 17, 18, 59])
    items, costs, bound = cost.row_topk(np.zeros(80), 5, rows, -1.0)
    assert items.shape == costs.shape == (4, 5)
    assert bound.shape == (4,)
    whole = -cost.dense()[rows]
    np.testing.assert_allclose(costs, np.take_along_axis(whole, items.astype(int), 1), rtol=1e-12, atol=1e-12)
    np.put_along_axis(whole, items.astype(int), np.inf, 1)
    assert (bound <= whole.min(1)).all()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_factors_and_matrices_on_the_gpu(dtype):
    g = np.random.default_rng(fresh_seed())
    a, b = (x.to(dtype) for x in pair(g, "gaussian", 300, 300, 20))
    cost = FactorCost([(a, b)])
    assert cost.pairs[0][0].device.type == "cuda"
    matrix = cost.dense()
    best = matrix[scipy_lsa(matrix, True)].sum()
    assert solve(cost, maximize=True, solver=CandidateLists()).objective == pytest.approx(best, rel=1e-11)
    assert solve(torch.from_numpy(matrix).to(DEVICE), maximize=True).objective == pytest.approx(
        best, rel=1e-11
    )
    l1 = FactorCost([(a, b)], "l1")
    assert solve(l1, solver=CandidateLists()).gap <= 1e-6


def test_factors_on_two_devices_and_backends_that_do_not_fit_are_named():
    a, meta = torch.ones(3, 2), torch.ones(3, 2, device="meta")
    with pytest.raises(ValueError, match="tensors: expected one device"):
        FactorCost([(a, meta)])
    with pytest.raises(ValueError, match="backend: expected one of"):
        FactorCost([(a, a)], backend="cuda")
