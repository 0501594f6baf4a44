import pytest
import torch

from fastmatch_kernels.channel_affine.reference import METHODS, fold
from fastmatch_kernels.ops import channel_affine
from helpers.kernel_cases import BACKENDS, DEVICE, fresh_generator, normal, strided

SHAPES = [(7, 5), (300, 33), (3, 19, 5, 7), (2, 65, 11), (1, 1), (2, 3, 4, 1, 5), (2, 2, 90, 100)]


def expected(x, goal_mean, goal_std, method, dim=1, eps=1e-5):
    others = [d for d in range(x.ndim) if d != dim % x.ndim]
    z = x.double()
    mean = z.mean(others, keepdim=True)
    variance = (z - mean).square().mean(others, keepdim=True)
    gain = goal_std.view(variance.shape) / (variance + eps).sqrt()
    goal = goal_mean.view(variance.shape)
    result = {"repair": (z - mean) * gain + goal, "rescale": z * gain, "reshift": z - mean + goal}[method]
    return result, mean.flatten(), variance.flatten()


def layouts(x):
    yield x
    yield strided(x)
    if x.ndim == 4:
        yield x.to(memory_format=torch.channels_last)


def goals(generator, channels):
    return normal(generator, channels).double(), normal(generator, channels).double().abs() + 0.1


@pytest.mark.grid
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_layout_against_float64(backend, method, shape):
    generator = fresh_generator()
    base = normal(generator, *shape) * 2 + 7
    goal = goals(generator, shape[1])
    wanted, mean, variance = expected(base, *goal, method)
    for x in layouts(base):
        before = x.clone()
        got, got_mean, got_variance = channel_affine(x, *goal, method, backend=backend)
        assert torch.equal(x, before)
        torch.testing.assert_close(got_mean, mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got_variance, variance, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(got.double(), wanted, rtol=2e-4, atol=2e-3 if shape[0] == 1 else 2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_that_do_not_fit_one_block(backend):
    generator = fresh_generator()
    # Fewer channels than the interpreter's processors, whose samples are split, and more.
    for shape in ((2, 3, 70, 70), (9000, 3), (2, 5, 70, 70)):
        x = normal(generator, *shape) + 100
        goal = goals(generator, shape[1])
        got, mean, variance = channel_affine(x, *goal, backend=backend)
        wanted = expected(x, *goal, "repair")
        torch.testing.assert_close(mean, wanted[1], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(variance, wanted[2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.double(), wanted[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend, dtype):
    generator = fresh_generator()
    x = normal(generator, 40, 6, 3, dtype=dtype)
    goal = goals(generator, 6)
    got, mean, _ = channel_affine(x, *goal, backend=backend)
    wanted = expected(x, *goal, "repair")
    assert got.dtype == dtype
    torch.testing.assert_close(mean, wanted[1], rtol=1e-5, atol=1e-6)
    # Twice the rounding of the result: Triton's interpreter cuts bfloat16 off.
    torch.testing.assert_close(got.double(), wanted[0], rtol=1.1 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_last_dimension_and_constant_channels(backend):
    generator = fresh_generator()
    x = normal(generator, 4, 9, 5)
    x[..., 2] = 3
    goal = goals(generator, 5)
    wanted = expected(x, *goal, "repair", dim=-1)
    got, _, variance = channel_affine(x, *goal, dim=-1, out=x, backend=backend)
    assert got is x
    moving = torch.tensor([0, 1, 3, 4], device=DEVICE)
    torch.testing.assert_close(got.double()[..., moving], wanted[0][..., moving], rtol=1e-4, atol=1e-4)
    assert variance[2] < 1e-10
    # The gain of a constant channel is goal_std / sqrt(eps), and multiplies the mean's rounding.
    amplified = float(goal[1][2]) * 1e-5**-0.5 * 3 * 2.0**-22
    torch.testing.assert_close(got[..., 2].double(), goal[0][2].expand(4, 9), rtol=0, atol=amplified)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy inside the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_in_its_channel(backend, bad):
    generator = fresh_generator()
    x, goal = normal(generator, 30, 4), goals(generator, 4)
    clean = channel_affine(x, *goal, backend=backend)[0]
    x[3, 1] = bad
    got = channel_affine(x, *goal, backend=backend)[0]
    others = torch.tensor([0, 2, 3], device=DEVICE)
    torch.testing.assert_close(got[:, others], clean[:, others])
    assert not got[:, 1].isfinite().all()


def test_fold_gives_the_layer_of_the_affine_map():
    generator = fresh_generator()
    weight, bias = (torch.randn(*s, generator=generator).double() for s in ((5, 7), (5,)))
    scale, shift = (torch.randn(5, generator=generator).double() for _ in range(2))
    x = torch.randn(11, 7, generator=generator).double()
    for b in (bias, None):
        z = torch.nn.functional.linear(x, weight, b)
        folded = torch.nn.functional.linear(x, *fold(weight, b, scale, shift))
        torch.testing.assert_close(folded, z * scale + shift)


def test_compiles_without_a_graph_break():
    generator = fresh_generator()
    x, goal = normal(generator, 30, 4), goals(generator, 4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def doubled(x):
        return channel_affine(x, *goal)[0] * 2

    torch.testing.assert_close(doubled(x), 2 * channel_affine(x, *goal)[0])


@pytest.mark.parametrize(
    ("x", "options", "error", "match"),
    [
        (torch.ones(3, 2, dtype=torch.int64), {}, TypeError, "x: expected a floating"),
        (torch.ones(0, 2), {}, ValueError, "x: expected at least one sample"),
        (torch.ones(3, 3), {}, ValueError, "goal_mean: expected 3"),
        (torch.ones(3, 2), {"method": "reset"}, ValueError, "method: expected one of"),
        (torch.ones(3, 2), {"dim": 2}, ValueError, "x: expected a dimension 2"),
        (torch.ones(3, 2), {"out": torch.ones(2, 3)}, ValueError, "out: expected a tensor like x"),
    ],
)
def test_bad_input_is_named(x, options, error, match):
    with pytest.raises(error, match=match):
        channel_affine(x, torch.zeros(2), torch.ones(2), **options)
