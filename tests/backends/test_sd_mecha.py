"""sd-mecha's ``rebasin`` by ours: on a small architecture that is registered with sd-mecha for the test."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from fastmatch.backends import sd_mecha as backend
from fastmatch.checkpoint.diffusion.single_file import trace_file
from fastmatch.permutations.apply import apply_permutations
from helpers.diffusion import random_file, small_shapes
from helpers.networks import fresh_seed

sd_mecha = pytest.importorskip("sd_mecha")

CONFIG = "fastmatchtiny-ldm"
UNET = "model.diffusion_model."


def running_mean(name):
    return "model_ema." + name.removeprefix("model.").replace(".", "")


@pytest.fixture(scope="module")
def shapes():
    from sd_mecha.extensions.model_configs import KeyMetadata, ModelComponent, ModelConfigImpl, register_aux

    found = {**small_shapes("unet"), "other.weight": (3, 5)}
    keys = {name: KeyMetadata(list(shape), "float32") for name, shape in found.items()}
    means = {
        running_mean(name): KeyMetadata(list(shape), "float32", optional=True)
        for name, shape in found.items()
        if name.startswith(UNET)
    }
    register_aux(ModelConfigImpl(CONFIG, {"diffuser": ModelComponent(keys), "ema": ModelComponent(means)}))
    backend.register(CONFIG)
    return found


def test_rebasin_recovers_a_planted_order_and_moves_the_running_mean(tmp_path, shapes):
    generator = torch.Generator().manual_seed(fresh_seed())
    a = random_file(shapes, generator, torch.float32)
    mean = {running_mean(name): tensor + 1 for name, tensor in a.items() if name.startswith(UNET)}
    spec = trace_file({name: tuple(tensor.shape) for name, tensor in (a | mean).items()}, "b")
    b = apply_permutations(a | mean, spec, spec.random(generator))
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    models = {x: sd_mecha.model(tmp_path / f"{x}.safetensors", config=CONFIG) for x in "ab"}
    backend.register(CONFIG)  # a second time

    aligned = sd_mecha.rebasin(models["b"], models["a"], iters=3)
    out = sd_mecha.merge(aligned, merge_dtype=torch.float32, output_dtype=torch.float32)
    out.pop("__metadata__", None)

    assert out.keys() == b.keys()
    assert all(torch.equal(out[name], tensor) for name, tensor in (a | mean).items())


@pytest.mark.slow
def test_rebasin_is_a_step_of_a_merge(tmp_path, shapes):
    generator = torch.Generator().manual_seed(fresh_seed())
    a = random_file(shapes, generator, torch.float32)
    spec = trace_file({name: tuple(tensor.shape) for name, tensor in a.items()}, "b")
    save_file(a, tmp_path / "a.safetensors")
    save_file(apply_permutations(a, spec, spec.random(generator)), tmp_path / "b.safetensors")
    first, second = (sd_mecha.model(tmp_path / f"{x}.safetensors", config=CONFIG) for x in "ab")
    half = sd_mecha.weighted_sum(first, sd_mecha.rebasin(second, first), alpha=0.5)
    merged = sd_mecha.merge(half, merge_dtype=torch.float32, output_dtype=torch.float32)
    assert all(torch.allclose(merged[name], tensor) for name, tensor in a.items())


def test_every_architecture_is_registered_before_sd_mechas_own():
    from sd_mecha.extensions import merge_methods

    backend.register()
    interface = merge_methods.resolve("rebasin").interface
    assert interface is not None
    names = [method.identifier for method, _ in interface.candidates]
    ours = {f"fastmatch_rebasin_{name.replace('-', '_')}" for name in backend.CONFIGS}
    assert ours <= set(names[: names.index("rebasin_sdxl_sgm")])


def test_an_unknown_config_is_refused():
    with pytest.raises(ValueError, match=r"configs: expected some of .*got 'sd9-ldm'"):
        backend.register("sd9-ldm")
