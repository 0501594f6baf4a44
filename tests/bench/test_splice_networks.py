"""The splice networks: Keras' weights go where they belong, and sequences have the statistics that they are drawn with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bench.lib.splice_networks import CHANNELS, SpliceNetwork, filled, sequences
from bench.reports.spliceai_merging import answers, correlations, specification


def keras_weights(generator: np.random.Generator) -> dict:
    """Return random weights under Keras' names, in Keras' order of axes."""
    kernels = [1, 1, *([11] * 8), 1, *([11] * 8), 1, *([21] * 8), 1, *([41] * 8), 1, 1]
    found = {}
    for k, size in enumerate(kernels, start=1):
        inputs, outputs = (4 if k == 1 else CHANNELS), (3 if k == len(kernels) else CHANNELS)
        kernel = (generator.normal(size=(size, inputs, outputs)) / np.sqrt(size * inputs)).astype(np.float32)
        group = {"kernel:0": kernel, "bias:0": generator.normal(size=outputs).astype(np.float32)}
        found[f"conv1d_{k}"] = {f"conv1d_{k}": group}
    for k in range(1, 33):
        group = {
            f"{name}:0": generator.uniform(0.5, 1.5, CHANNELS).astype(np.float32)
            for name in ("gamma", "beta", "moving_mean", "moving_variance")
        }
        found[f"batch_normalization_{k}"] = {f"batch_normalization_{k}": group}
    return found


def test_weights_in_kerass_order_give_kerass_function():
    weights = keras_weights(np.random.default_rng(0))
    net = filled(weights)
    stem = weights["conv1d_1"]["conv1d_1"]
    x = np.random.default_rng(1).normal(size=(7, 4)).astype(np.float32)  # Keras: positions, then channels
    expected = x @ stem["kernel:0"][0] + stem["bias:0"]
    torch.testing.assert_close(net.stem(torch.from_numpy(x.T)[None])[0].T, torch.from_numpy(expected))

    kernel = weights["conv1d_3"]["conv1d_3"]["kernel:0"]
    wide = np.random.default_rng(2).normal(size=(30, CHANNELS)).astype(np.float32)
    at = 12  # a position whose 11 inputs are all inside
    expected = (
        np.einsum("ki,kio->o", wide[at - 5 : at + 6], kernel) + weights["conv1d_3"]["conv1d_3"]["bias:0"]
    )
    found = net.stages[0][0].conv1(torch.from_numpy(wide.T)[None])[0, :, at]
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-4, atol=1e-4)

    norm, group = net.stages[0][0].norm2, weights["batch_normalization_2"]["batch_normalization_2"]
    z = np.ones((CHANNELS,), dtype=np.float32) * 2
    expected = (z - group["moving_mean:0"]) / np.sqrt(group["moving_variance:0"] + 1e-3) * group[
        "gamma:0"
    ] + group["beta:0"]
    torch.testing.assert_close(norm(torch.from_numpy(z)[None, :, None])[0, :, 0], torch.from_numpy(expected))


def test_every_weight_of_the_file_is_used():
    weights = keras_weights(np.random.default_rng(0))
    count = sum(
        array.size for layer in weights.values() for group in layer.values() for array in group.values()
    )
    state = filled(weights).state_dict()
    assert sum(v.numel() for k, v in state.items() if "num_batches" not in k) == count
    with pytest.raises(KeyError):
        filled({k: v for k, v in weights.items() if k != "conv1d_39"})


def test_a_short_context_traces_the_same_axes():
    spec = specification()
    assert len(spec.groups) == 18  # the residual stream, the sum of skips, and one in each of 16 blocks
    state = SpliceNetwork().state_dict()
    assert {name: t.shape for name, t in state.items()} == {
        name: t.shape for name, t in SpliceNetwork(7).state_dict().items()
    }


def test_outputs_lose_the_context_on_both_sides():
    net = SpliceNetwork(5).eval()
    assert net(sequences(2, 40, seed=0)).shape == (2, 3, 30)


def test_sequences_are_one_hot_repeatable_and_short_of_cg():
    drawn = sequences(3, 20_000, seed=5)
    assert drawn.shape == (3, 4, 20_000)
    assert bool((drawn.sum(1) == 1).all())
    assert torch.equal(drawn, sequences(3, 20_000, seed=5))
    assert not torch.equal(drawn, sequences(3, 20_000, seed=6))
    bases = drawn.argmax(1).flatten()
    shares = bases.bincount(minlength=4) / len(bases)
    assert 0.35 < float(shares[1] + shares[2]) < 0.6
    cg = float(((bases[:-1] == 1) & (bases[1:] == 2)).double().mean())
    assert 0.1 < cg / float(shares[1] * shares[2]) < 0.5


def test_the_ensemble_correlates_with_itself_alone():
    test = sequences(1, 60, seed=0)
    nets: list[nn.Module] = [SpliceNetwork(5).eval() for _ in range(2)]
    whole = answers(nets, test)
    assert correlations(whole, whole)["correlation"] == pytest.approx(1)
    assert correlations(answers(nets[:1], test), whole)["correlation"] < 0.999
