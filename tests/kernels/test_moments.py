import itertools

import pytest
import torch

from fastmatch_kernels.moments.reference import samples_by_channels
from fastmatch_kernels.ops import moments
from helpers.kernel_cases import BACKENDS, DEVICE, fresh_generator, normal, strided

SHAPES = [  # (shape of A, shape of B)
    ((5, 7), (5, 7)),
    ((70, 33), (70, 45)),
    ((3, 19, 5, 7), (3, 4, 5, 7)),
    ((2, 65, 11), (2, 65, 11)),
    ((1, 1), (1, 1)),
    ((2, 3, 4, 1, 5), (2, 2, 4, 1, 5)),
]


@pytest.fixture(params=[False, True], ids=["narrow", "packed"], autouse=True)
def packed(request, monkeypatch):
    """Triton's two ways: few channels read as they are, and packed for any number of channels."""
    from fastmatch_kernels.moments import triton

    monkeypatch.setattr(triton, "PACKED_CHANNELS", 1 if request.param else 10**6)


def layouts(x):
    yield x
    yield strided(x)
    if x.ndim == 4:
        yield x.to(memory_format=torch.channels_last)
        yield torch.nn.functional.pad(x, (1, 2, 3, 1))[:, :, 3:-1, 1:-2]


def exact(a, b, dim=1):
    """Means, variances, off-counts and the three covariances in float64, two-pass."""
    rows = [samples_by_channels(x.double(), dim) for x in (a, b)]
    centred = [r - r.mean(dim=0) for r in rows]
    count = len(rows[0])
    pairs = {"ab": (0, 1), "aa": (0, 0), "bb": (1, 1)}
    return (
        [r.mean(dim=0) for r in rows],
        [c.square().mean(dim=0) for c in centred],
        [(r <= 0).sum(dim=0) for r in rows],
        {n: centred[i].T @ centred[j] / count for n, (i, j) in pairs.items()},
        {n: centred[i].abs().T @ centred[j].abs() / count for n, (i, j) in pairs.items()},
    )


def check(state, a, b, dim=1, unit=2.0**-24):
    mean, variance, off, covariance, scale = exact(a, b, dim)
    terms = min(state.count, 4096) + 8
    for model in (0, 1):
        spread = variance[model].sqrt() + (mean[model] - state.shifts[model]).abs()
        assert torch.all((state.mean(model) - mean[model]).abs() <= terms * 2.0**-24 * spread + 1e-30)
        error = (state.variance(model) - variance[model]).abs()
        assert torch.all(error <= 4 * terms * 2.0**-24 * spread.square() + 1e-30)
        assert torch.equal(state.off(model), off[model])
    for name in state.cross:
        i, j = ("ab".index(letter) for letter in name)
        shift = [(mean[k] - state.shifts[k]).abs() for k in (0, 1)]
        allowed = scale[name] + torch.outer(variance[i].sqrt() + shift[i], variance[j].sqrt() + shift[j])
        error = (state.covariance(name) - covariance[name]).abs()
        assert torch.all(error <= (4 * terms * 2.0**-24 + 4 * unit) * allowed + 1e-30), error.max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape_a", "shape_b"), SHAPES)
def test_one_batch_in_every_layout(backend, shape_a, shape_b):
    generator = fresh_generator()
    base_a = normal(generator, *shape_a).relu() + 3
    base_b = normal(generator, *shape_b) - 1
    for a, b in zip(layouts(base_a), layouts(base_b), strict=True):
        state = moments(a, b, cross=("ab", "aa", "bb"), backend=backend)
        assert state.count == a.numel() // a.shape[1]
        check(state, a, b)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("batch", "side"), [(7, 3), (3, 40)])
def test_pieces_and_blocks_of_the_cpu_twin_meet(monkeypatch, batch, side, channels_last):
    """More samples than a piece takes, and than a float32 sum takes, in one batch entry or in several."""
    from fastmatch_kernels.moments import cpu as twin

    monkeypatch.setattr(twin, "ROWS", 16)
    monkeypatch.setattr(twin, "MIN_CHUNK_SAMPLES", 8)
    monkeypatch.setattr(twin, "CHUNK_ENTRIES", 50 * 6)
    generator = fresh_generator()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    a, b = (normal(generator, batch, c, side, side).cpu().contiguous(memory_format=layout) for c in (6, 4))
    check(moments(a + 2, b - 1, cross=("ab", "aa", "bb"), backend="cpu"), a + 2, b - 1)


def test_the_cpu_twins_buffers_serve_every_batch_whatever_came_before(monkeypatch):
    """Larger and smaller than a buffer, products in several parts, in inference mode and out of it."""
    from fastmatch_kernels.moments import cpu as twin

    monkeypatch.setattr(twin, "CHUNK_ENTRIES", 4096)
    monkeypatch.setattr(twin, "_buffers", twin._Buffers())
    generator = fresh_generator()
    for samples, channels, inference in ((40, 90, True), (2000, 90, False), (30, 7, True), (5000, 70, False)):
        a, b = normal(generator, samples, channels).cpu(), normal(generator, samples, channels + 3).cpu()
        with torch.inference_mode(inference):
            state = moments(a, b, cross=("ab", "aa", "bb"), backend="cpu").settle()
        check(state, a, b)
    assert sum(buffer.numel() for buffer in twin._buffers.kept.values()) <= 3 * 4096


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_taken_as_they_are(backend, dtype):
    generator = fresh_generator()
    a, b = normal(generator, 40, 9, 3, dtype=dtype), normal(generator, 40, 5, 3, dtype=dtype)
    check(moments(a, b, backend=backend), a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["fp16", "fp16x3"])
def test_named_precisions_hold_their_bound(backend, precision):
    generator = fresh_generator()
    a, b = normal(generator, 100, 40), normal(generator, 100, 40)
    unit = {"fp16": 2.0**-9, "fp16x3": 2.0**-17}[precision]
    check(moments(a, b, precision=precision, backend=backend), a, b, unit=unit)


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_in_the_last_dimension(backend):
    generator = fresh_generator()
    a, b = normal(generator, 4, 21, 13), normal(generator, 4, 21, 6)
    check(moments(a, b, dim=-1, cross=("ab", "bb"), backend=backend), a, b, dim=-1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_samples_than_one_float32_sum(backend):
    generator = fresh_generator()
    a, b = normal(generator, 9000, 3) + 1000, normal(generator, 9000, 2)
    check(moments(a, b, backend=backend), a, b)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_batches_and_merged_states_equal_one_batch(backend):
    generator = fresh_generator()
    a, b = normal(generator, 90, 6, 4) * 2 + 5, normal(generator, 90, 3, 4)
    cuts = [0, 1, 32, 32, 50, 90]
    state, states = None, []
    for low, high in itertools.pairwise(cuts):
        if high == low:
            continue
        part = (a[low:high], b[low:high] + low)  # a drifting mean, so that shifts differ
        state = moments(*part, state=state, backend=backend)
        states.append(moments(*part, backend=backend))
    merged = states[0]
    for other in states[1:]:
        merged = merged.merge(other)
    drift = torch.cat([b[lo:hi] + lo for lo, hi in itertools.pairwise(cuts)])
    assert state is not None
    for result in (state, merged):
        assert result.count == 360
        check(result, a, drift)
    torch.testing.assert_close(merged.covariance(), state.covariance(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_batches_wait_and_are_not_overwritten(backend, monkeypatch):
    monkeypatch.setattr("fastmatch_kernels.moments.PENDING", 64)
    generator = fresh_generator()
    a, b = normal(generator, 100, 5), normal(generator, 100, 4)
    buffer_a, buffer_b = torch.empty_like(a[:10]), torch.empty_like(b[:10])
    state, waiting = None, []
    for start in range(0, 100, 10):
        buffer_a.copy_(a[start : start + 10])
        buffer_b.copy_(b[start : start + 10])
        state = moments(buffer_a, buffer_b, state=state, backend=backend)
        waiting.append(state.waiting)
    assert waiting == [10, 20, 30, 40, 50, 60, 0, 10, 20, 30]
    half = moments(buffer_a.bfloat16(), buffer_b.bfloat16(), state=state, backend=backend)
    assert half.waiting == 10  # another type: what waited was settled
    a = torch.cat([a, buffer_a.bfloat16().float()])
    b = torch.cat([b, buffer_b.bfloat16().float()])
    check(state, a, b)
    assert (state.waiting, state.pending) == (0, ())


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_batches_wait_in_inference_mode_and_out_of_it(backend):
    generator = fresh_generator()
    a, b = normal(generator, 4, 9, 5, 3), normal(generator, 4, 7, 5, 3)
    with torch.inference_mode():
        state = moments(a[:2] + 0, b[:2] + 0, backend=backend)
    state = moments(a[2:], b[2:], state=state, backend=backend)
    assert state.waiting == 60
    check(state, a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_model_alone(backend):
    generator = fresh_generator()
    a = normal(generator, 50, 6, 3, 2)
    state = moments(a, backend=backend)
    state = moments(a[:0], state=state, backend=backend)
    assert state.cross == {}
    rows = samples_by_channels(a.double(), 1)
    torch.testing.assert_close(state.mean(), rows.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.variance(), rows.var(0, correction=0), rtol=1e-5, atol=1e-6)
    inside = moments(a, cross=("aa",), backend=backend).covariance("aa")
    torch.testing.assert_close(inside.diagonal(), state.variance(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy inside the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_stays_in_its_channel(backend, bad):
    generator = fresh_generator()
    a, b = normal(generator, 40, 5), normal(generator, 40, 4)
    clean = moments(a, b, backend=backend)
    a[17, 2] = bad
    state = moments(a, b, backend=backend)
    assert not state.mean(0)[2].isfinite()
    others = torch.tensor([0, 1, 3, 4], device=DEVICE)
    torch.testing.assert_close(state.covariance()[others], clean.covariance()[others])
    assert not state.covariance()[2].isfinite().any()
    torch.testing.assert_close(state.mean(1), clean.mean(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_correlation_and_inner_product(backend):
    generator = fresh_generator()
    a, b = normal(generator, 200, 8), normal(generator, 200, 8)
    b[:, 3] = 0  # a dead unit
    state = moments(a, b, backend=backend)
    expected = torch.corrcoef(torch.cat([a, b], 1).double().T).nan_to_num()[:8, 8:]
    expected[:, 3] = 0
    torch.testing.assert_close(state.correlation(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(state.inner(), a.double().T @ b.double() / 200, rtol=0, atol=1e-5)
    assert state.off(1)[3] == state.count


def test_float64_keeps_its_precision_on_cpu():
    generator = fresh_generator()
    a, b = (torch.randn(300, 5, generator=generator, dtype=torch.float64) + 1e6 for _ in range(2))
    state = moments(a, b, backend="cpu")
    torch.testing.assert_close(state.covariance(), exact(a, b)[3]["ab"], rtol=1e-8, atol=1e-8)
    with pytest.raises(TypeError, match=r"a: expected one of .*float64"):
        moments(a, b, backend="triton")


def test_compiles_without_a_graph_break():
    generator = fresh_generator()
    a, b = normal(generator, 20, 5), normal(generator, 20, 5)
    state = moments(a, b).settle()
    expected = moments(a * 2, b, state=moments(a, b))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x, y):
        return moments(x * 2, y, state=state).cross["ab"] * 1

    torch.testing.assert_close(step(a, b), expected.settle().cross["ab"], rtol=1e-5, atol=1e-5)
    assert state.count == 40


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((torch.zeros(3, 2), torch.zeros(4, 2)), {}, ValueError, "b: expected the samples of a"),
        ((torch.zeros(3, 2, dtype=torch.int64),), {}, TypeError, "a: expected a floating point"),
        ((torch.zeros(3, 2),), {"cross": ("ab",)}, ValueError, "cross: expected"),
        ((torch.zeros(0, 2),), {}, ValueError, "at least one sample"),
        ((torch.zeros(3, 2),), {"dim": 2}, ValueError, "expected a dimension 2"),
        ((torch.zeros(3, 2),), {"precision": "fp8"}, ValueError, "precision: expected"),
        ((torch.zeros(3, 2),), {"backend": "gpu"}, ValueError, "backend: expected"),
    ],
)
def test_bad_input_is_named(arguments, options, error, match):
    with pytest.raises(error, match=match):
        moments(*arguments, **options)


def test_channels_of_a_state_are_fixed():
    state = moments(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"expected \(2,\) channels as in state, got \(3,\)"):
        moments(torch.ones(3, 3), state=state)
