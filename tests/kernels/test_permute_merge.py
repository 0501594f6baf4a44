import importlib
import math
import struct

import pytest
import torch

from fastmatch_kernels.ops import permute_merge
from fastmatch_kernels.permute_merge.reference import MergeArguments, expand_blocks
from helpers.kernel_cases import BACKENDS, DEVICE, fresh_generator, normal, strided

CASES = [  # shape, dims, blocks
    ((37,), (0, 1), (1, 1)),
    ((19, 70), (0, 1), (1, 1)),
    ((70, 19), (0, 1), (5, 1)),
    ((8, 6, 3, 3), (0, 1), (1, 2)),
    ((4, 6 * 49), (0, 1), (1, 49)),
    ((3, 5, 4, 6), (1, 3), (1, 3)),
    ((2, 7, 3), (0, 2), (2, 1)),
    ((3, 2100), (0, 1), (1, 1)),
    ((1, 1), (0, 1), (1, 1)),
    ((0, 4), (0, 1), (1, 1)),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def permutation(generator, size):
    return torch.randperm(size, generator=generator).to(DEVICE)


def expected(weights, alphas, first, second, dims, blocks):
    total = torch.zeros(weights[0].shape, dtype=torch.float64, device=DEVICE)
    for weight, alpha, *indices in zip(weights, alphas, first, second, strict=True):
        for dim, block, index in zip(dims, blocks, indices, strict=True):
            if index is not None:
                weight = weight.index_select(dim, expand_blocks(index, block))
        total += alpha * weight.double()
    return total


@pytest.mark.grid
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dims", "blocks"), CASES)
def test_every_shape_against_float64(backend, dtype, shape, dims, blocks):
    generator = fresh_generator()
    weights = [normal(generator, *shape, dtype=dtype) for _ in range(3)]
    alphas = [0.5, -1.25, 0.125]
    none = [None] * 3
    moved = [
        [None, *(permutation(generator, shape[d] // block) for _ in range(2))] if d < len(shape) else none
        for d, block in zip(dims, blocks, strict=True)
    ]
    rounding = torch.finfo(dtype).eps / 2
    if backend == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16:
        rounding *= 2  # Triton's interpreter cuts bfloat16 off where a GPU rounds to nearest
    for first, second in ((none, none), (moved[0], none), (none, moved[1]), (moved[0], moved[1])):
        got = permute_merge(weights, alphas, first, second, dims=dims, blocks=blocks, backend=backend)
        wanted = expected(weights, alphas, first, second, dims, blocks)
        scale = expected([w.abs() for w in weights], [0.5, 1.25, 0.125], first, second, dims, blocks)
        assert got.dtype == dtype
        error = (got.double() - wanted).abs()
        assert torch.all(error <= rounding * wanted.abs() * 1.01 + 4 * 2.0**-24 * scale + 1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_permuted_weight_comes_back_bit_for_bit(backend, dtype):
    generator = fresh_generator()
    weight = normal(generator, 12, 33, dtype=dtype)
    rows, columns = permutation(generator, 12), permutation(generator, 33)
    got = permute_merge([weight], [1.0], [rows], [columns], backend=backend)
    assert torch.equal(got, weight[rows][:, columns])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_numbers_survive_the_cpu_twin(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    kept = permute_merge([every], [1.0], backend="cpu")
    numbers = ~every.isnan()
    assert torch.equal(kept[numbers].view(torch.int16), every[numbers].view(torch.int16))
    assert kept[~numbers].isnan().all()
    generator = fresh_generator()
    left, right = (every[torch.randperm(2**16, generator=generator)] for _ in range(2))
    got = permute_merge([left, right], [0.75, 0.5], backend="cpu")
    wanted = (0.75 * left.double() + 0.5 * right.double()).float().to(dtype)
    assert torch.equal(got.isnan(), wanted.isnan())
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("shape", "dims", "blocks"), CASES)
def test_what_is_stored_past_the_caches_is_what_is_stored_in_them(monkeypatch, dtype, shape, dims, blocks):
    from fastmatch_kernels.permute_merge import cpu as twin

    generator = fresh_generator()
    a, b = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    first, second = (
        torch.randperm(shape[d] // block, generator=generator) if d < len(shape) else None
        for d, block in zip(dims, blocks, strict=True)
    )
    options = {"dims": dims, "blocks": blocks, "backend": "cpu"}
    for weights, alphas in (([a, b], [0.75, -0.5]), ([b], [1.0])):
        for rows, columns in ((None, None), (first, None), (None, second), (first, second)):
            indices = ([None, rows][-len(weights) :], [None, columns][-len(weights) :])
            wanted = permute_merge(weights, alphas, *indices, **options)
            # Room before and after each run's aligned part, which begins anywhere.
            room = torch.full((wanted.numel() + 3,), 7.0, dtype=dtype)
            out = room[1:-2].view(shape)
            with monkeypatch.context() as patch:
                patch.setattr(twin, "NONTEMPORAL_BYTES", 0)
                permute_merge(weights, alphas, *indices, out=out, **options)
            torch.testing.assert_close(out, wanted, rtol=torch.finfo(dtype).eps, atol=1e-7)
            assert (room[:1] == 7).all()
            assert (room[-2:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_cpu_twin_rounds_halves_to_even_as_torch_does(monkeypatch, dtype):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    other = every.flip(0).roll(int(torch.randint(1 << 16, (), generator=fresh_generator())))
    for partner, past in (
        (torch.roll(every, 1), False),
        (other, False),
        (torch.roll(every, 1), True),
        (other, True),
    ):
        # Means of neighbours are exact halfway points of the type; means of strangers are anything.
        monkeypatch.setattr("fastmatch_kernels.permute_merge.cpu.NONTEMPORAL_BYTES", 0 if past else 1 << 40)
        got = permute_merge([every, partner], [0.5, 0.5], backend="cpu")
        wanted = (0.5 * every.float() + 0.5 * partner.float()).to(dtype)
        assert torch.equal(got.isnan(), wanted.isnan())
        whole = ~wanted.isnan()
        assert torch.equal(got.view(torch.int16)[whole], wanted.view(torch.int16)[whole])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [math.inf, math.nan, struct.unpack("d", b"\xff" * 8)[0]])
def test_a_factor_that_is_no_number_follows_arithmetic_too(monkeypatch, dtype, factor):
    # The last NaN has every bit set: to round it as if it were a number would give zero.
    monkeypatch.setattr("fastmatch_kernels.permute_merge.cpu.NONTEMPORAL_BYTES", 0)
    a = torch.tensor([0.0, 1.0, -2.0, math.inf]).to(dtype).repeat(25)
    got = permute_merge([a, torch.ones_like(a)], [factor, 0.5], backend="cpu")
    torch.testing.assert_close(got, (factor * a.float() + 0.5).to(dtype), equal_nan=True)


def test_float64_sums_in_float64_on_cpu():
    generator = fresh_generator()
    a, b = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    rows = torch.randperm(5, generator=generator)
    got = permute_merge([a, b], [0.3, 0.7], [None, rows], backend="cpu")
    torch.testing.assert_close(got, 0.3 * a + 0.7 * b[rows], rtol=1e-15, atol=1e-15)
    with pytest.raises(TypeError, match="expected one of"):
        permute_merge([a], [1.0], backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_gaps_are_followed(backend):
    generator = fresh_generator()
    weight = normal(generator, 9, 14)
    rows = permutation(generator, 9)
    for view in (strided(weight), weight.T.contiguous().T):
        assert torch.equal(permute_merge([view], [1.0], [rows], backend=backend), weight[rows])
    out = strided(torch.zeros(9, 14, device=DEVICE))
    assert permute_merge([weight], [2.0], [rows], out=out, backend=backend) is out
    assert torch.equal(out, 2 * weight[rows])


@pytest.mark.parametrize("backend", BACKENDS)
def test_merging_in_place(backend):
    generator = fresh_generator()
    a, b = normal(generator, 10, 20), normal(generator, 10, 20)
    rows, columns = permutation(generator, 10), permutation(generator, 20)
    wanted = 0.5 * a + 0.5 * b[rows][:, columns]
    got = permute_merge([a, b], [0.5, 0.5], [None, rows], [None, columns], out=a, backend=backend)
    assert got is a
    torch.testing.assert_close(a, wanted, rtol=1e-6, atol=1e-6)
    kept, into = a.clone(), b.clone()
    permute_merge([a, into], [0.25, 0.75], [rows, None], [columns, None], out=into, backend=backend)
    torch.testing.assert_close(into, 0.25 * kept[rows][:, columns] + 0.75 * b, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="out: shares memory"):
        permute_merge([a, b], [0.5, 0.5], [None, rows], out=b, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_follow_arithmetic(backend):
    a = torch.tensor([[1.0, float("nan"), float("inf")]], device=DEVICE)
    got = permute_merge([a, torch.ones_like(a)], [1.0, 1.0], backend=backend)
    torch.testing.assert_close(got, a + 1, equal_nan=True)


def test_compiles_without_a_graph_break():
    generator = fresh_generator()
    a, b = normal(generator, 6, 8), normal(generator, 6, 8)
    rows = permutation(generator, 6)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def merged(a, b):
        return permute_merge([a, b], [0.5, 0.5], [None, rows]) * 2

    torch.testing.assert_close(merged(a, b), a + b[rows])


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"weights": []}, ValueError, "weights: expected at least one"),
        ({"weights": [torch.ones(2, 3), torch.ones(3, 2)]}, ValueError, r"weights\[1\]: expected \(2, 3\)"),
        ({"alphas": [1.0, 2.0]}, ValueError, "alphas: expected 1"),
        ({"first": [torch.tensor([0, 2])]}, ValueError, r"first\[0\]: expected entries of 0..1, got 0..2"),
        ({"first": [torch.tensor([0])]}, ValueError, r"first\[0\]: expected 2 entries"),
        ({"second": [torch.tensor([0.0, 1, 2])]}, TypeError, r"second\[0\]: expected int64"),
        ({"first": [torch.tensor([0])], "blocks": (3, 1)}, ValueError, "blocks: expected a divisor"),
        ({"out": torch.ones(3, 3)}, ValueError, "out: expected a tensor like"),
    ],
)
def test_bad_input_is_named(options, error, match):
    arguments = {"weights": [torch.ones(2, 3)], "alphas": [1.0], **options}
    with pytest.raises(error, match=match):
        permute_merge(**arguments)


def test_more_parts_of_a_run_than_a_grids_second_dimension_takes(monkeypatch):
    """All programs of a launch are along the first dimension, of which CUDA takes 2^31."""
    launcher, grids = importlib.import_module("fastmatch_kernels.permute_merge.triton"), []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **options: None

    monkeypatch.setattr(launcher, "_permute_merge_kernel", Kernel())
    # No memory for 300 million numbers is needed.
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "is_contiguous", lambda self: True)
    weight = torch.empty(1, dtype=torch.float16, device=DEVICE).expand(300_000_000)
    launcher.permute_merge(MergeArguments([weight], [1.0], [None], [None], (0, 1), (1, 1), weight))
    ((programs,),) = grids
    assert 65535 < programs < 2**31


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [4, 24])
def test_an_axis_of_one_row_is_reordered(backend, length):
    weights = [torch.randn(1, length, device=DEVICE) for _ in range(2)]
    only = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    got = permute_merge(weights, [0.5, 0.5], [only, None], backend=backend)
    torch.testing.assert_close(got, (weights[0] + weights[1]) / 2)
