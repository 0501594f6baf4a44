"""A matrix that stays on its device: candidate lists are read there, and a few numbers per row come to the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment as scipy_lsa
from torch.overrides import TorchFunctionMode

from bench.lib.problems import KINDS, problem
from fastmatch.assignment import CandidateLists, DenseShortlists, DeviceCost, certificate, solve
from helpers.costs import check_rows
from helpers.kernel_cases import DEVICE
from helpers.networks import fresh_seed


def check(matrix: torch.Tensor, maximize: bool, **options):
    found = solve(matrix, maximize=maximize, solver=CandidateLists(), **options)
    values = matrix.double().cpu().numpy()
    rows, cols = scipy_lsa(values, maximize)
    size = np.abs(values[rows, cols]).sum()
    assert abs(found.objective - values[rows, cols].sum()) <= 1e-12 * size + found.gap_bound
    assert found.objective == pytest.approx(values[found.row_ind, found.col_ind].sum(), rel=1e-12, abs=1e-300)
    assert found.gap <= found.gap_bound
    gap, bound = certificate(matrix, found, maximize=maximize)
    assert -bound <= gap <= bound
    return found


@pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=pytest.mark.slow) if kind.startswith(("log-normal", "machol-wien", "dead", "duplicated")) else kind
    for kind in KINDS
])  # fmt: skip
def test_every_kind_ends_at_the_optimum(kind):
    g = np.random.default_rng(fresh_seed())
    for n, m in ((1, 1), (40, 40), (70, 30), (150, 260), (300, 300)):
        matrix = torch.from_numpy(np.ascontiguousarray(problem(kind, n, m, int(g.integers(2**31)))))
        matrix = matrix if matrix.is_floating_point() else matrix.double()
        maximize = bool(torch.isfinite(matrix).all()) and bool(g.random() < 0.5)
        check(matrix.to(DEVICE), maximize)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_lists_of_every_type_prove_the_optimum_and_leave_the_matrix_alone(dtype):
    g = torch.Generator().manual_seed(fresh_seed())
    matrix = torch.randn(400, 400, generator=g).to(dtype).to(DEVICE)
    given = matrix.clone()
    for cost, maximize in ((matrix, True), (matrix, False), (matrix.T, False), (matrix[::2], True)):
        found = check(cost, maximize)
        if dtype not in (torch.bfloat16, torch.float16):  # whose ties may send it to the other solver
            assert found.stats["solver"] == "CandidateLists"
    assert torch.equal(matrix, given)
    warm = check(matrix, True, warm_start=solve(matrix, maximize=True))
    assert warm.objective == pytest.approx(float(solve(matrix, maximize=True).objective), rel=1e-12)


class Crossings(TorchFunctionMode):
    """Records how many numbers each call hands to numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("numpy", "tolist", "item", "__array__"):
            self.sizes.append(args[0].numel())
        return function(*args, **(kwargs or {}))


def test_only_lists_come_to_the_host():
    n = 500
    g = torch.Generator().manual_seed(fresh_seed())
    matrix = torch.randn(n, n, generator=g, dtype=torch.float64).to(DEVICE)
    with Crossings() as seen:
        found = solve(matrix, solver=CandidateLists())
    assert found.stats["solver"] == "CandidateLists"
    assert 0 < max(seen.sizes) <= 48 * n
    with Crossings() as seen:
        solve(matrix, solver=DenseShortlists())
    assert max(seen.sizes) == n * n


@pytest.mark.parametrize("batch", [1, 700, 1 << 25])
def test_rows_are_exact_whatever_the_batch(monkeypatch, batch):
    monkeypatch.setattr("fastmatch.assignment.device_cost.BATCH_ENTRIES", batch)
    g = np.random.default_rng(fresh_seed())
    values = np.rint(4 * g.standard_normal((23, 60)))
    v = g.standard_normal(60)
    cost = DeviceCost(torch.from_numpy(values).to(DEVICE))
    check_rows(cost, values, v)


def test_what_lists_do_not_suit_goes_to_the_dense_solver():
    for matrix in (torch.zeros(200, 200), torch.rand(300, 300).sort(1).values):
        assert check(matrix.to(DEVICE), False).stats["solver"] == "DenseShortlists"
    forbidden = torch.rand(60, 60).to(DEVICE)
    forbidden[0, 1:] = torch.inf
    assert check(forbidden, False).stats["solver"] == "DenseShortlists"
    with pytest.raises(ValueError, match="cost: holds NaN"):
        solve(torch.full((3, 3), torch.nan, device=DEVICE), solver=CandidateLists())
    with pytest.raises(ValueError, match="cost: expected a matrix, got 3 dimensions"):
        solve(torch.zeros(3, 3, 3, device=DEVICE), solver=CandidateLists())
    for other in (np.zeros((3, 3), np.float32), torch.zeros(3, 3, dtype=torch.int64)):
        with pytest.raises(
            ValueError, match="CandidateLists takes a FactorCost, a floating-point torch tensor"
        ):
            solve(other, solver=CandidateLists())


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_large_matrices_stay_on_the_gpu():
    matrix = torch.randn(4200, 4200, device=DEVICE)
    with Crossings() as seen:
        found = solve(matrix, maximize=True)
    assert found.stats["solver"] == "CandidateLists"
    assert max(seen.sizes) <= 48 * 4200
