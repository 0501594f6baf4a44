import math

import numpy as np
import pytest
import torch

from fastmatch_kernels.ops import row_softmin, sinkhorn_duals
from fastmatch_kernels.row_topk.triton import product_error
from helpers.kernel_cases import BACKENDS, DEVICE, fresh_generator, normal, strided

ALL = pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
INF = float("inf")


def exact(factors, v, temperature):
    value = -sum(a.double() @ b.double().T for a, b in factors) - v.double()
    return -temperature * (-value.nan_to_num(INF, INF, -INF) / temperature).logsumexp(1)


def allowed(factors, v, temperature, precision="ieee"):
    return product_error(factors, v, precision) + 2.0**-18 * temperature * (1 + math.log(len(v)))


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1e-3, 0.7, 300.0])
@pytest.mark.parametrize(
    ("n", "m", "depths"), [(70, 45, (33,)), (33, 131, (7, 20)), (1, 1, (1,)), (2, 40, (0,))]
)
def test_against_float64(backend, dtype, temperature, n, m, depths):
    g = fresh_generator()
    factors = [(normal(g, n, d, dtype=dtype), strided(normal(g, m, d, dtype=dtype))) for d in depths]
    v = normal(g, m)
    got = row_softmin(factors, v, temperature, backend=backend)
    assert got.dtype == torch.float32
    error = (got.double() - exact(factors, v, temperature)).abs()
    assert torch.all(error <= allowed(factors, v, temperature))


def test_several_cpu_tiles_of_columns_agree_with_one(monkeypatch):
    from fastmatch_kernels.row_softmin import cpu

    if DEVICE != "cpu":
        pytest.skip("the CPU twin takes CPU tensors")
    g = fresh_generator()
    factors, v = [(normal(g, 50, 9), normal(g, 333, 9))], normal(g, 333)
    monkeypatch.setattr(cpu, "TILE", (16, 70))
    got = row_softmin(factors, v, 0.2, backend="cpu").double()
    assert torch.all((got - exact(factors, v, 0.2)).abs() <= allowed(factors, v, 0.2))


@ALL
def test_float64_or_a_word(backend):
    g = fresh_generator()
    factors, v = [(normal(g, 6, 4).double(), normal(g, 7, 4).double())], normal(g, 7)
    if backend == "triton":
        with pytest.raises(TypeError, match="expected"):
            row_softmin(factors, v, 0.5, backend=backend)
        return
    got = row_softmin(factors, v, 0.5, backend=backend)
    torch.testing.assert_close(got, exact(factors, v, 0.5), rtol=1e-12, atol=1e-12)


@ALL
def test_nan_and_infinities_stay_in_their_entries(backend):
    g = fresh_generator()
    a, b, v = normal(g, 40, 5), normal(g, 70, 5), normal(g, 70)
    v[3] = -INF
    clean = row_softmin([(a, b)], v, 0.5, backend=backend)
    b[3] = float("nan")
    assert torch.equal(row_softmin([(a, b)], v, 0.5, backend=backend), clean)
    a[7] = float("nan")
    got = row_softmin([(a, b)], v, 0.5, backend=backend)
    assert got[7] == INF
    assert torch.equal(torch.cat([got[:7], got[8:]]), torch.cat([clean[:7], clean[8:]]))
    v[11] = INF
    got = row_softmin([(a[:7], b)], v, 0.5, backend=backend)
    assert torch.all(got == -INF)


@ALL
def test_empty_axes(backend):
    a, b = torch.ones(3, 4, device=DEVICE), torch.ones(6, 4, device=DEVICE)
    v = torch.zeros(6, device=DEVICE)
    assert torch.all(row_softmin([(a, b[:0])], v[:0], 1.0, backend=backend) == INF)
    assert row_softmin([(a[:0], b)], v, 1.0, backend=backend).shape == (0,)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinkhorn_duals_are_the_plain_iteration(backend, dtype):
    g = fresh_generator()
    a, b = normal(g, 60, 12, dtype=dtype), normal(g, 60, 12, dtype=dtype)
    cost, start = -(a.double() @ b.double().T), normal(g, 60)
    temperatures = (4.0, 2.0, 1.0)
    v = start.double()
    for t in temperatures:
        u = -t * ((v - cost) / t).logsumexp(1)
        v = -t * ((u[:, None] - cost) / t).logsumexp(0)
    got = sinkhorn_duals([(a, b)], temperatures, v=start, precision="ieee", backend=backend)
    np.testing.assert_allclose(got.cpu(), v.cpu(), rtol=0, atol=1e-4)
    # What the last half step leaves: every column's weights sum to one.
    u = -temperatures[-1] * ((v - cost) / temperatures[-1]).logsumexp(1)
    assert float((((u[:, None] + got.double() - cost) / temperatures[-1]).exp().sum(1) - 1).abs().max()) < 0.1


@ALL
def test_relaxed_steps_go_further_the_same_way_and_arrive_sooner(backend):
    g = fresh_generator()
    a, b = normal(g, 50, 12), normal(g, 50, 12)
    temperatures = [3.0] + 8 * [0.6]
    steps = {}
    for relaxation in (1.0, 1.5):
        v = sinkhorn_duals([(a, b)], temperatures, relaxation=relaxation, precision="ieee", backend=backend)
        u = row_softmin([(a, b)], v, 0.6, backend=backend)
        again = row_softmin([(b, a)], u, 0.6, backend=backend)
        steps[relaxation] = float((again - v).abs().max())
    assert steps[1.5] < steps[1.0]


@ALL
def test_compiles_without_a_graph_break(backend):
    g = fresh_generator()
    a, b, v = (normal(g, *shape) for shape in ((9, 7), (9, 7), (9,)))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def duals(a, b, v):
        return sinkhorn_duals([(a * 1, b)], [1.0], v=v, backend=backend) + 0

    assert torch.equal(duals(a, b, v), sinkhorn_duals([(a, b)], [1.0], v=v, backend=backend))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda a, b, v: row_softmin([(a, b)], v, 0.0), "temperature: expected a finite number above 0, got 0.0"),
        (lambda a, b, v: row_softmin([(a, b)], v[:2], 1.0), "v: expected 4"),
        (lambda a, b, v: row_softmin([(a, b)], v, 1.0, precision="fp8"), "precision: expected one of"),
        (lambda a, b, v: sinkhorn_duals([(a, b)], [1.0]), "factors: expected as many rows as columns, got 3 and 4"),
        (lambda a, b, v: sinkhorn_duals([(b, b)], [1.0], relaxation=2.0), "relaxation: expected a number between 0 and 2"),
        (lambda a, b, v: sinkhorn_duals([(b, b)], [1.0, INF]), r"temperatures\[1\]: expected a finite number"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call(torch.ones(3, 2), torch.ones(4, 2), torch.zeros(4))
