"""Every public call with models on a GPU: it runs, and its results are those of the same call on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastmatch as fm
from helpers.networks import VGG, fresh_seed, mlp

SHAPES = {"mlp": (12,), "cnn": (3, 8, 8)}


@pytest.fixture(params=["mlp", "cnn"])
def network(request):
    """The kind of the networks of ``case``."""
    return request.param


@pytest.fixture
def case(network):
    """Three networks of one kind, an example input, and batches on the CPU."""
    torch.manual_seed(fresh_seed())
    models = [(mlp() if network == "mlp" else VGG()).eval() for _ in range(3)]
    shape = SHAPES[network]
    batches = [(torch.randn(8, *shape), torch.randint(5, (8,))) for _ in range(3)]
    return models, torch.randn(2, *shape), batches


@pytest.fixture(params=["loader on the CPU", "loader on the GPU"])
def load(request, gpu):
    """Batches as a loader of either device gives them."""
    if request.param == "loader on the CPU":
        return lambda batches: batches
    return lambda batches: [tuple(map(gpu.tensor, batch)) for batch in batches]


def same(found: fm.Alignment, expected: fm.Alignment) -> bool:
    return all(torch.equal(p, expected.permutations[name]) for name, p in found.permutations.items())


def check_objectives(found: fm.Alignment, expected: fm.Alignment) -> None:
    """Objectives agree up to float32 rounding of the largest."""
    assert found.matching is not None
    assert expected.matching is not None
    ours, theirs = found.matching.objective, expected.matching.objective
    assert ours == pytest.approx(theirs, abs=1e-4 * max(map(abs, theirs)))


def check_models(found: nn.Module, expected: nn.Module, tolerance: float = 1e-5) -> None:
    for (name, x), y in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        assert x.device.type == "cuda", name
        torch.testing.assert_close(
            x.cpu(), y, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_align_by_weights(gpu, case):
    (a, b, _), x, _ = case
    expected = fm.align(a, b, x)
    found = fm.align(gpu.module(a), gpu.module(b), gpu.tensor(x))
    assert same(found, expected)
    check_models(found.apply(gpu.module(b)), expected.apply(b), 0)


def loads(first, *others):
    """Choices of a call: the first with batches of either device; the others with those of the GPU every night."""
    host, device = "loader on the CPU", "loader on the GPU"
    return [
        *((first, where) for where in (host, device)),
        *((other, host) for other in others),
        *(pytest.param(other, device, marks=pytest.mark.slow) for other in others),
    ]


@pytest.mark.grid
@pytest.mark.parametrize(
    ("similarity", "load"),
    loads("correlation", "covariance", "inner", "batch-correlation", "cca"),
    indirect=["load"],
)
def test_align_by_activations(gpu, case, load, similarity):
    (a, b, _), x, batches = case
    expected = fm.align(a, b, x, fm.ActivationMatching(batches, similarity))
    ours = fm.ActivationMatching(load(batches), similarity)
    found = fm.align(gpu.module(a), gpu.module(b), gpu.tensor(x), ours)
    check_objectives(found, expected)


def test_a_forward_function_that_prepares_the_batch_itself(gpu, case):
    """Whatever it runs before the model does not shift the operations at which activations are read."""
    (a, b, _), x, batches = case
    raw = [10 * batch for batch, _ in batches]

    def forward(model, batch):
        return model((batch / 10).relu().to(gpu.device if next(model.parameters()).is_cuda else "cpu"))

    expected = fm.align(a, b, x, fm.ActivationMatching(raw, forward=forward))
    found = fm.align(gpu.module(a), gpu.module(b), gpu.tensor(x), fm.ActivationMatching(raw, forward=forward))
    check_objectives(found, expected)


@pytest.mark.grid
def test_mixture(gpu, case, load):
    (a, b, _), x, batches = case

    def matcher(data):
        return fm.Mixture(fm.WeightMatching(), fm.ActivationMatching(data), activation_weight=0.3)

    expected = fm.align(a, b, x, matcher(batches))
    found = fm.align(gpu.module(a), gpu.module(b), gpu.tensor(x), matcher(load(batches)))
    check_objectives(found, expected)


@pytest.mark.parametrize("kind", ["fisher", "straight-through"])
def test_matchers_with_gradients(gpu, case, load, kind):
    if not gpu.has_autograd:
        pytest.skip("needs a GPU: the pretended one has no backward pass")
    (a, b, _), x, batches = case

    def matcher(data):
        return fm.FisherMatching(data) if kind == "fisher" else fm.StraightThrough(data, epochs=1)

    expected = fm.align(a, b, x, matcher(batches))
    found = fm.align(gpu.module(a), gpu.module(b), gpu.tensor(x), matcher(load(batches)))
    if kind == "fisher":
        assert found.matching.objective == pytest.approx(expected.matching.objective, rel=1e-3)
    else:
        assert found.matching.objective[-1] >= found.matching.objective[0]


@pytest.mark.grid
@pytest.mark.parametrize(
    "strategy",
    [
        fm.ToReference(),
        fm.Chain(),
        pytest.param(fm.MergeMany(), marks=pytest.mark.slow),
        fm.FrankWolfe(max_steps=2),
    ],
)
def test_align_many(gpu, case, network, strategy):
    if isinstance(strategy, fm.MergeMany) and network == "cnn" and not gpu.has_autograd:
        pytest.skip("a quarter of a minute in the interpreter; the MLP has the same kernels")
    if isinstance(strategy, fm.FrankWolfe) and not gpu.has_autograd:
        pytest.skip("needs a GPU: the pretended one has no backward pass")
    models, x, _ = case
    expected = fm.align_many(models, x, strategy)
    found = fm.align_many([gpu.module(m) for m in models], gpu.tensor(x), strategy)
    for ours, theirs in zip(found, expected, strict=True):
        if theirs.matching is not None:
            assert ours.matching is not None
            assert ours.matching.objective[-1] == pytest.approx(theirs.matching.objective[-1], rel=1e-4)


@pytest.mark.parametrize("biases", ["average", "normalize", "remove"])
def test_merge(gpu, biases):
    torch.manual_seed(fresh_seed())
    models = [mlp().eval() for _ in range(3)]
    weights = [0.5, 0.3, 0.2]
    expected = fm.merge(models, weights, biases=biases)
    check_models(fm.merge([gpu.module(m) for m in models], weights, biases=biases), expected, 1e-6)


@pytest.mark.grid
@pytest.mark.parametrize("mode", ["joint", "sequential"])
@pytest.mark.parametrize("method", ["repair", "rescale", "reshift", "reset", "auto"])
def test_renormalize(gpu, case, method, mode):
    (a, b, _), _, batches = case
    if method == "reset" and not any(isinstance(m, nn.BatchNorm2d) for m in a.modules()):
        pytest.skip("no batch norm to reset")
    options = fm.Renormalization(method, mode=mode)
    expected = fm.renormalize(fm.merge([a, b]), [a, b], batches, options)
    ga, gb = gpu.module(a), gpu.module(b)
    check_models(fm.renormalize(fm.merge([ga, gb]), [ga, gb], batches, options), expected, 1e-3)


@pytest.mark.grid
@pytest.mark.parametrize(("rule", "load"), loads(fm.Permute, fm.Zip, fm.CCA), indirect=["load"])
def test_merge_partially(gpu, case, load, rule):
    (a, b, _), x, batches = case
    # Before the nonlinearity no unit is dead, so no two matches are equally good.
    expected = fm.merge_partial([a, b], x, rule(batches, site="pre"), start_at=1)
    ours = rule(load(batches), site="pre")
    found = fm.merge_partial([gpu.module(a), gpu.module(b)], gpu.tensor(x), ours, start_at=1)
    inputs = batches[0][0]
    with torch.no_grad():
        out, wanted = found.model(gpu.tensor(inputs)).cpu(), expected.model(inputs)
    assert out.isfinite().all()
    if rule is not fm.CCA:  # whose directions are arbitrary where canonical correlations are equal
        torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.grid
def test_evaluate_and_interpolate(gpu, case, load):
    (a, b, _), _, batches = case
    expected = fm.interpolate(a, b, batches)
    found = fm.interpolate(gpu.module(a), gpu.module(b), load(batches))
    assert found.barrier == pytest.approx(expected.barrier, abs=1e-4)


def test_verify_and_models_of_two_devices(gpu, case):
    (a, b, _), x, _ = case
    spec = fm.PermutationSpec.trace(a, x)
    assert fm.verify(gpu.module(a), spec, gpu.tensor(x)).error < 1e-10
    found = fm.align(gpu.module(a), copy.deepcopy(b), spec=spec)
    assert same(found, fm.align(a, b, spec=spec))


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float16, torch.float64))],
)
def test_other_dtypes(gpu, dtype):
    torch.manual_seed(fresh_seed())
    a, b = (mlp().eval().to(dtype) for _ in range(2))
    x = torch.randn(2, 12, dtype=dtype)
    spec = fm.PermutationSpec.trace(a, x)
    expected = fm.align(a, b, spec=spec)
    ga, gb = gpu.module(a), gpu.module(b)
    found = fm.align(ga, gb, spec=spec)
    assert same(found, expected)
    # The interpreter cuts bfloat16 off where a GPU rounds.
    tolerance = 2 * torch.finfo(dtype).eps
    check_models(fm.merge([ga, found.apply(gb)]), fm.merge([a, expected.apply(b)]), tolerance)
    data = [torch.randn(8, 12, dtype=dtype) for _ in range(2)]
    matched = fm.align(ga, gb, spec=spec, matcher=fm.ActivationMatching(data))
    assert matched.matching.objective[1] >= matched.matching.objective[0]
    fm.renormalize(fm.merge([ga, gb]), [ga, gb], data, "repair")


def test_a_proof_without_memory_for_it_says_so(gpu, monkeypatch):
    a, x = mlp().eval(), torch.randn(2, 12)
    spec = fm.PermutationSpec.trace(a, x)

    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 56.00 GiB")

    module, inputs = gpu.module(a), gpu.tensor(x)
    monkeypatch.setattr(torch.Tensor, "double", full)
    with pytest.raises(
        ValueError, match=r"no memory for a run of its float64 copy.*56\.00 GiB.*verify=False"
    ):
        fm.verify(module, spec, inputs)
