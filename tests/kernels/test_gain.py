import pytest
import torch

from fastmatch_kernels.gain.reference import gathered, rank_update
from fastmatch_kernels.ops import gain
from helpers.kernel_cases import BACKENDS, DEVICE, fresh_generator, normal, strided

SHAPES = [(1, 1, (1,)), (70, 45, (33,)), (33, 65, (7, 40, 1)), (5, 3, (100,)), (0, 4, (3,)), (4, 3, (0,))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pairs(generator, n, m, depths, dtype=torch.float32):
    return [(normal(generator, n, d, dtype=dtype), normal(generator, m, d, dtype=dtype)) for d in depths]


def exact(factors, b_index=None, contractions=None):
    """(gain, sum |a||b|) in float64."""
    contractions = contractions or [None] * len(factors)
    parts = [
        (a.double(), gathered(b.double(), b_index, c))
        for (a, b), c in zip(factors, contractions, strict=True)
    ]
    return sum(a @ b.T for a, b in parts), sum(a.abs() @ b.abs().T for a, b in parts)


def within(got, factors, *indices, unit=0.0):
    wanted, scale = exact(factors, *indices)
    terms = sum(a.shape[1] for a, _ in factors) + 4
    assert got.shape == wanted.shape
    assert torch.all((got.double() - wanted).abs() <= (terms * 2.0**-24 + unit) * scale)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m", "depths"), SHAPES)
def test_every_shape_against_float64(backend, dtype, n, m, depths):
    factors = pairs(fresh_generator(), n, m, depths, dtype)
    got = gain(factors, backend=backend)
    assert got.dtype == torch.float32
    within(got, factors)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reordered_rows_and_contraction_axes(backend, dtype):
    generator = fresh_generator()
    factors = pairs(generator, 40, 50, (33, 6), dtype)
    rows = torch.randint(50, (37,), generator=generator).to(DEVICE)
    inner = torch.randperm(33, generator=generator).to(DEVICE)
    within(gain(factors, b_index=rows, backend=backend), factors, rows)
    within(gain(factors, contraction_index=[inner, None], backend=backend), factors, None, [inner, None])
    both = gain(factors, b_index=rows, contraction_index=[inner, None], backend=backend)
    within(both, factors, rows, [inner, None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    generator = fresh_generator()
    ((a, b),) = pairs(generator, 35, 20, (12,))
    within(gain([(strided(a), b.T.contiguous().T)], backend=backend), [(a, b)])
    out = strided(torch.zeros(35, 20, device=DEVICE))
    assert gain([(a, b)], out=out, backend=backend) is out
    within(out, [(a, b)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rank_update_equals_a_fresh_gain(backend):
    generator = fresh_generator()
    ((a, b),) = pairs(generator, 40, 30, (25,))
    old = torch.randperm(25, generator=generator).to(DEVICE)
    new = old.clone()
    new[[3, 9, 11]] = old[[9, 11, 3]]
    matrix = gain([(a, b)], contraction_index=old, backend=backend)
    factors = rank_update(a, b, old, new)
    assert factors[0].shape == (40, 3)
    gain([factors], out=matrix, accumulate=True, backend=backend)
    wanted, scale = exact([(a, b)], None, [new])
    assert torch.all((matrix.double() - wanted).abs() <= 40 * 2.0**-24 * (scale + 30))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["fp16", "fp16x3"])
def test_named_precisions_hold_their_bound(backend, precision):
    factors = pairs(fresh_generator(), 40, 40, (50,))
    within(gain(factors, precision=precision, backend=backend), factors, unit=2.0**-8.9)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy inside the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_stay_in_their_row_and_column(backend):
    ((a, b),) = pairs(fresh_generator(), 40, 33, (12,))
    a[3, 2], b[5, 1] = float("nan"), float("inf")
    got = gain([(a, b)], backend=backend)
    bad = torch.zeros(40, 33, dtype=torch.bool, device=DEVICE)
    bad[3] = bad[:, 5] = True
    assert not got[bad].isfinite().any()
    assert got[~bad].isfinite().all()


def test_float64_on_cpu():
    generator = fresh_generator()
    a, b = (torch.randn(20, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    got = gain([(a, b)], backend="cpu")
    torch.testing.assert_close(got, a @ b.T, rtol=1e-13, atol=1e-13)
    with pytest.raises(TypeError, match=r"factors\[0\]: expected"):
        gain([(a, b)], out=None, backend="triton")


def test_compiles_without_a_graph_break():
    ((a, b),) = pairs(fresh_generator(), 9, 8, (7,))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def doubled(a, b):
        return gain([(a, b)]) * 2

    torch.testing.assert_close(doubled(a, b), 2 * a @ b.T, rtol=1e-4, atol=1e-4)


A, B = torch.ones(3, 2), torch.ones(4, 2)


@pytest.mark.parametrize(
    ("factors", "options", "error", "match"),
    [
        ([], {}, ValueError, "factors: expected at least one"),
        ([(A, A.T)], {}, ValueError, r"factors\[0\]: expected \(n, d\)"),
        ([(A, B), (B, A)], {}, ValueError, r"factors\[1\]: expected 3 and 4 rows"),
        ([(A, B.double())], {}, TypeError, r"factors\[0\]: expected torch.float32"),
        ([(A, B)], {"b_index": torch.tensor([4])}, ValueError, "b_index: expected entries of 0..3"),
        (
            [(A, B)],
            {"contraction_index": torch.tensor([1])},
            ValueError,
            r"contraction_index\[0\]: expected 2",
        ),
        ([(A, B)], {"contraction_index": []}, ValueError, "contraction_index: expected 1"),
        ([(A, B)], {"accumulate": True}, ValueError, "out: expected the gain"),
        ([(A, B)], {"out": torch.ones(2, 2)}, ValueError, r"out: expected \(3, 4\)"),
        ([(A, B)], {"precision": "fp8"}, ValueError, "precision: expected"),
    ],
)
def test_bad_input_is_named(factors, options, error, match):
    with pytest.raises(error, match=match):
        gain(factors, **options)


def test_wide_products_and_reduced_rows_have_tiles_of_their_own():
    from fastmatch_kernels._triton.tiles import MATMUL, TARGETS, matmul_tiles

    target, table = TARGETS["sm_90"], MATMUL["sm_90"]
    assert matmul_tiles(64, 4096, "half", target) == table["half"][0]
    assert matmul_tiles(4096, 4096, "fp16", target) == table["half"][1]
    assert matmul_tiles(4096, 4096, "fp16", target, "reduced") == table["fp16, reduced"][1]
    assert matmul_tiles(4096, 4096, "fp16", TARGETS["gfx942"], "reduced") == MATMUL["gfx942"]["half"][1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_column_of_a_matrix_is_written_in_place(backend):
    ((a, b),) = pairs(fresh_generator(), 9, 1, (7,))
    whole = torch.zeros(9, 4, device=DEVICE)
    gain([(a, b)], out=whole[:, 2:3], backend=backend)
    flat = torch.zeros(9, 1, device=DEVICE).as_strided((9, 1), (1, 9))
    gain([(a, b)], out=flat, backend=backend)
    torch.testing.assert_close(whole[:, 2:3], a @ b.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(flat, a @ b.T, rtol=1e-5, atol=1e-5)
