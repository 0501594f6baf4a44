"""``out = beta out + alpha a b^T``, by torch's own product and by oneDNN's, whatever processor runs the tests."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastmatch_kernels import matrix_product
from fastmatch_kernels.matrix_product import addmm_nt, goes_to_numpy, goes_to_onednn
from helpers.networks import fresh_seed

LAYOUTS = {
    "contiguous": lambda n, d: torch.randn(n, d),
    "transposed": lambda n, d: torch.randn(d, n).T,
    "prefix": lambda n, d: torch.randn(n, d + 30)[:, :d],
    "every second": lambda n, d: torch.randn(n, 2 * d)[:, ::2],
    "one row": lambda n, d: torch.randn(1, d).expand(n, d),
}


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def is_onednn(request, monkeypatch):
    if request.param and not matrix_product._is_right():
        pytest.skip("this torch has no product of oneDNN")
    monkeypatch.setattr(matrix_product, "_mkl_is_slow", lambda: request.param)
    monkeypatch.setattr(matrix_product, "LEAST_WORK", 0)
    return request.param


@pytest.mark.parametrize(("beta", "alpha"), [(0, 1), (1, 1), (1, -1), (0.5, -2)])
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_it_is_the_product_for_every_layout(is_onednn, left, right, beta, alpha, monkeypatch):
    """In blocks of rows and of terms that divide nothing evenly."""
    monkeypatch.setattr(matrix_product, "BLOCK", 200 * 67)
    monkeypatch.setattr(matrix_product, "COPIED", 100 * 67)
    monkeypatch.setattr(matrix_product, "LEAST_TERMS", 70)
    torch.manual_seed(fresh_seed())
    a, b, out = LAYOUTS[left](301, 150), LAYOUTS[right](67, 150), torch.randn(301, 90)[:, 5:72]
    assert goes_to_onednn(out, a, b) == is_onednn
    exact = beta * out.double() + alpha * (a.double() @ b.double().T)
    if beta == 0:
        out.fill_(torch.nan)
    assert addmm_nt(out, a, b, beta=beta, alpha=alpha) is out
    size = out.double().abs().nan_to_num() + abs(alpha) * (a.double().abs() @ b.double().abs().T)
    error = (out.double() - exact).abs() / size
    assert error.max() <= 160 * torch.finfo(torch.float32).eps / 2


@pytest.mark.parametrize(("beta", "alpha"), [(0, 1), (0, -2), (1, 1), (0.5, -2)])
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("gaps", [True, False])
def test_products_of_float64_go_to_numpy(left, right, beta, alpha, gaps, monkeypatch):
    monkeypatch.setattr(matrix_product, "_mkl_is_slow", lambda: True)
    monkeypatch.setattr(matrix_product, "_numpy_has_openblas", lambda: True)
    monkeypatch.setattr(matrix_product, "_numpy_threads", lambda: 1)
    monkeypatch.setattr(matrix_product, "LEAST_WORK_BY_NUMPY", 0)
    monkeypatch.setattr(matrix_product, "BLOCK", 400 * 67)
    torch.manual_seed(fresh_seed())
    a, b = LAYOUTS[left](301, 50).double(), LAYOUTS[right](67, 50).double()
    out = torch.randn(301, 90, dtype=torch.float64)[:, 5:72]
    out = out if gaps else out.contiguous()
    assert goes_to_numpy(out, a, b)
    exact = beta * out + alpha * (a @ b.T)
    if beta == 0:
        out.fill_(torch.nan)
    assert addmm_nt(out, a, b.requires_grad_(), beta=beta, alpha=alpha) is out
    torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)


def test_numbers_that_are_not_finite_go_to_numpy_without_a_warning(monkeypatch):
    monkeypatch.setattr(matrix_product, "_mkl_is_slow", lambda: True)
    monkeypatch.setattr(matrix_product, "_numpy_has_openblas", lambda: True)
    monkeypatch.setattr(matrix_product, "_numpy_threads", lambda: 1)
    a, b = (torch.randn(k, 200, dtype=torch.float64) for k in (80, 90))
    a[3, 4], b[5, 6], a[7] = torch.nan, torch.inf, 1e200
    b[8] = 1e200
    out = torch.zeros(80, 90, dtype=torch.float64)
    assert goes_to_numpy(out, a, b)
    with np.errstate(all="raise"):
        found = addmm_nt(out, a, torch._neg_view(b))
    torch.testing.assert_close(found, a @ -b.T, equal_nan=True)


@pytest.mark.parametrize(
    ("environment", "threads"),
    [({"OMP_NUM_THREADS": "3"}, 3), ({"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "5"}, 2), ({"OMP_NUM_THREADS": "4,2"}, 4)],
)  # fmt: skip
def test_a_process_of_one_thread_keeps_its_products(environment, threads, monkeypatch):
    for name in ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    every = matrix_product._numpy_threads.__wrapped__()
    assert 1 <= every <= (os.cpu_count() or 1)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert matrix_product._numpy_threads.__wrapped__() == threads
    monkeypatch.setattr(matrix_product, "_mkl_is_slow", lambda: True)
    monkeypatch.setattr(matrix_product, "_numpy_has_openblas", lambda: True)
    a = torch.zeros(128, 128, dtype=torch.float64)
    for told, numpys, goes in ((1, threads, False), (2, threads, True), (1, 1, True)):
        monkeypatch.setattr(torch, "get_num_threads", lambda told=told: told)
        monkeypatch.setattr(matrix_product, "_numpy_threads", lambda numpys=numpys: numpys)
        assert goes_to_numpy(a, a, a) == goes


@pytest.mark.parametrize(("n", "m", "d"), [(0, 8, 8), (8, 0, 8), (8, 8, 0)])
def test_products_of_nothing(n, m, d, monkeypatch):
    monkeypatch.setattr(matrix_product, "_mkl_is_slow", lambda: True)
    monkeypatch.setattr(matrix_product, "LEAST_WORK_BY_NUMPY", 0)
    a, b = (torch.randn(k, d, dtype=torch.float64) for k in (n, m))
    out = torch.full((n, m), torch.nan, dtype=torch.float64)
    assert torch.equal(addmm_nt(out, a, b, beta=0), torch.zeros(n, m, dtype=torch.float64))


@pytest.mark.parametrize(
    ("config", "is_openblas"),
    [
        ({"Build Dependencies": {"blas": {"name": "scipy-openblas"}}}, True),
        ({"Build Dependencies": {"blas": {"name": "mkl-dynamic-lp64"}}}, False),
        ({"Build Dependencies": {"blas": {"name": "blas"}}}, False),
        ({}, False),
        (None, False),
    ],
)
def test_the_library_of_numpy_decides(config, is_openblas, monkeypatch):
    monkeypatch.setattr(np, "show_config", lambda mode: config)
    assert matrix_product._numpy_has_openblas.__wrapped__() == is_openblas


def test_numbers_that_are_not_finite_stay_where_they_are(is_onednn):
    a, b = torch.randn(80, 100), torch.randn(90, 100)
    a[3, 4], b[5, 6] = torch.nan, torch.inf
    found, expected = addmm_nt(torch.zeros(80, 90), a, b), a @ b.T
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


def test_no_gradient_is_recorded_and_inference_mode_changes_nothing(is_onednn):
    a = torch.randn(80, 100, requires_grad=True)
    with torch.inference_mode():
        inside = addmm_nt(torch.zeros(80, 80), a, a)
    found = addmm_nt(torch.zeros(80, 80), a, a)
    assert not found.requires_grad
    assert torch.equal(found, inside)


@pytest.mark.parametrize(
    ("n", "m", "d", "dtype"),
    [(63, 80, 80, torch.float32), (80, 80, 0, torch.float32), (0, 80, 80, torch.float32), (80, 80, 80, torch.float64)],
)  # fmt: skip
def test_small_sides_and_float64_stay_with_torch(is_onednn, n, m, d, dtype):
    a, b, out = torch.randn(n, d, dtype=dtype), torch.randn(m, d, dtype=dtype), torch.ones(n, m, dtype=dtype)
    assert not goes_to_onednn(out, a, b)
    torch.testing.assert_close(addmm_nt(out, a, b), 1 + a @ b.T)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch says so wherever its flags are set
def test_little_work_stays_with_torch_and_so_does_all_where_onednn_is_switched_off(monkeypatch):
    monkeypatch.setattr(matrix_product, "_mkl_is_slow", lambda: True)
    small, large = torch.ones(100, 100), torch.ones(400, 400)
    assert not goes_to_onednn(small, small, small)
    assert goes_to_onednn(large, large, large)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not goes_to_onednn(large, large, large)


@pytest.mark.parametrize(
    ("vendor", "capability", "slow"),
    [
        ("vendor_id : AuthenticAMD", "AVX512", True),
        ("vendor_id : GenuineIntel", "AVX512", False),
        ("vendor_id : AuthenticAMD", "AVX2", False),
        ("BogoMIPS : 50", "DEFAULT", False),
    ],
)
def test_the_processor_decides(vendor, capability, slow, monkeypatch):
    monkeypatch.setattr(matrix_product, "_processor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert matrix_product._mkl_is_slow.__wrapped__() == slow


@pytest.mark.parametrize(
    "answer", [AttributeError("no such operator"), RuntimeError("other arguments"), "wrong"]
)
def test_an_operator_that_has_changed_is_not_used(answer, monkeypatch):
    def changed(a, b):
        if isinstance(answer, Exception):
            raise answer
        return a @ b.T + 1

    monkeypatch.setattr(matrix_product, "_onednn", changed)
    assert not matrix_product._is_right.__wrapped__()
    monkeypatch.setattr(matrix_product, "_mkl_is_slow", lambda: True)
    monkeypatch.setattr(matrix_product, "_is_right", matrix_product._is_right.__wrapped__)
    large = torch.ones(400, 400)
    assert not goes_to_onednn(large, large, large)
    assert torch.equal(addmm_nt(large.clone(), large, large), torch.full((400, 400), 401.0))


def test_tensors_without_entries_stay_with_torch(monkeypatch):
    monkeypatch.setattr(matrix_product, "_mkl_is_slow", lambda: True)
    with FakeTensorMode():
        large = torch.ones(400, 400)
        assert not goes_to_onednn(large, large, large)
        assert addmm_nt(large.clone(), large, large).shape == (400, 400)


def test_the_processor_is_known_without_a_list_of_them(monkeypatch):
    monkeypatch.setattr(Path, "open", lambda self: (_ for _ in ()).throw(FileNotFoundError(self)))
    monkeypatch.setattr(platform, "processor", lambda: "AMD64 Family 26, AuthenticAMD")
    assert "AuthenticAMD" in matrix_product._processor()
