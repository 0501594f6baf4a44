"""ControlNets: by themselves, in one file with the UNet that they are added to, and as a folder of diffusers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.lib.diffusion_shapes import SD1, SD2, UNets, unet_shapes
from fastmatch import Alignment, Axis, Group, WeightMatching
from fastmatch.checkpoint import align_checkpoints, apply_to_checkpoint, verify_checkpoints
from fastmatch.checkpoint.diffusion.folders import prove_folder, trace_folder
from fastmatch.checkpoint.diffusion.lora import permute_lora
from fastmatch.checkpoint.diffusion.single_file import prove_file, trace_file
from fastmatch.cli.main import main
from fastmatch.permutations.apply import apply_permutations
from helpers.diffusion import TINY_UNET, UNETS, diffusers, random_file, small_shapes, small_spec
from helpers.networks import fresh_seed

UNET, CONTROL = "model.diffusion_model.", "control_model."
PICTURE = (16, 16, 32, 32, 96, 96, 256)
"""Channels of the convolutions of the picture, three of which halve it."""

ADDED = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 56,
}
"""Conditions of XL: a pooled prompt of 16 numbers, and five others."""


def control_shapes(unet: UNets) -> dict[str, tuple[int, ...]]:
    """The names of the original files: the way down of a UNet, a convolution after each of its blocks, and those of the picture."""
    of_unet = unet_shapes(unet)
    shapes = {
        name: shape for name, shape in of_unet.items() if not name.startswith(("out.", "output_blocks."))
    }
    widths = (*PICTURE, unet.channels)
    for k, (width, before) in enumerate(zip(widths, (3, *PICTURE), strict=True)):
        shapes[f"input_hint_block.{2 * k}.weight"] = (width, before, 3, 3)
    outputs = [unet.channels]
    for level, multiple in enumerate(unet.multiples):
        blocks = unet.layers + (level < len(unet.multiples) - 1)
        outputs += [multiple * unet.channels] * blocks
    for k, width in enumerate(outputs):
        shapes[f"zero_convs.{k}.0.weight"] = (width, width, 1, 1)
    shapes["middle_block_out.0.weight"] = (outputs[-1], outputs[-1], 1, 1)
    biases = {
        name.replace(".weight", ".bias"): shape[:1]
        for name, shape in shapes.items()
        if name.startswith(("input_hint_block.", "zero_convs.", "middle_block_out."))
    }
    return {CONTROL + name: shape for name, shape in {**shapes, **biases}.items()}


def joint_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    return control_shapes(UNETS[kind]) | small_shapes(kind)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(fresh_seed())


@pytest.fixture(scope="module")
def joint():
    """Shapes and spec of a file with a UNet and its ControlNet."""
    shapes = joint_shapes("tiny")
    return shapes, trace_file(shapes, "joint")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """What diffusers makes of a file: the UNet's output with what the ControlNet adds, by ``strength``."""
    configs = tmp_path_factory.mktemp("configs")
    own = {k: v for k, v in TINY_UNET.items() if k != "up_block_types"}
    for name, config in (("UNet2DConditionModel", TINY_UNET), ("ControlNetModel", own)):
        (configs / name).mkdir()
        (configs / name / "config.json").write_text(json.dumps({"_class_name": name, **config}))
    given = torch.Generator().manual_seed(fresh_seed())
    noise, prompt, pose = (
        torch.randn(shape, generator=given).double() for shape in ((1, 4, 8, 8), (1, 3, 32), (1, 3, 64, 64))
    )

    def run(path, strength=1.0):
        unet, control = (
            getattr(diffusers, name).from_single_file(str(path), config=str(configs / name)).double().eval()
            for name in ("UNet2DConditionModel", "ControlNetModel")
        )
        with torch.no_grad():
            down, mid = control(noise, 10, prompt, pose, conditioning_scale=strength, return_dict=False)
            added = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            return unet(noise, 10, prompt, **added).sample

    return run


@pytest.mark.parametrize("prefix", [CONTROL, ""])
def test_a_controlnet_by_itself_is_recovered(tmp_path, generator, capsys, prefix):
    shapes = {prefix + n.removeprefix(CONTROL): s for n, s in control_shapes(UNETS["unet"]).items()}
    spec = trace_file(shapes, "b")
    moved = {axis.parameter for group in spec.groups.values() for axis in group.axes}
    assert moved >= {name for name, shape in shapes.items() if len(shape) > 1}
    a = random_file(shapes, generator)
    save_file(a, tmp_path / "a.safetensors")
    save_file(apply_permutations(a, spec, spec.random(generator)), tmp_path / "b.safetensors")
    paths = [str(tmp_path / f"{x}.safetensors") for x in ("a", "b", "out")]
    assert main(["align", *paths[:2], "--out", paths[2]]) == 0
    assert "proved to keep the function" in capsys.readouterr().out
    assert all(torch.equal(tensor, a[name]) for name, tensor in load_file(paths[2]).items())
    assert verify_checkpoints(*paths[1:]).error < 1e-12


def test_a_controlnet_still_controls_the_unet_of_its_file(tmp_path, generator, joint, picture):
    shapes, spec = joint
    assert prove_file(shapes, spec, "joint").error < 1e-12
    b = random_file(shapes, generator, torch.float32)
    save_file(b, tmp_path / "b.safetensors")
    save_file(random_file(shapes, generator, torch.float32), tmp_path / "a.safetensors")
    a_path, b_path, out = (tmp_path / f"{x}.safetensors" for x in ("a", "b", "out"))
    alignment = align_checkpoints(a_path, b_path, out, WeightMatching(max_sweeps=1), spec=spec)
    found = load_file(out)
    for prefix in (UNET, CONTROL):
        assert sum(not torch.equal(found[n], b[n]) for n in b if n.startswith(prefix)) > 50
    expected = picture(b_path)
    assert (picture(out) - expected).abs().max() < 1e-10 * expected.abs().max()
    assert (picture(b_path, 0.0) - expected).abs().max() > 1e-3 * expected.abs().max()
    # Either network may be in a file of its own.
    for prefix in (UNET, CONTROL):
        save_file({n: t for n, t in b.items() if n.startswith(prefix)}, tmp_path / "part.safetensors")
        apply_to_checkpoint(
            alignment, tmp_path / "part.safetensors", tmp_path / "moved.safetensors", force=True
        )
        part = load_file(tmp_path / "moved.safetensors")
        assert part.keys() == {n for n in b if n.startswith(prefix)}
        assert all(torch.equal(tensor, found[name]) for name, tensor in part.items())


def test_a_controlnet_that_only_one_file_has_is_carried(tmp_path, generator, joint, picture):
    shapes, _ = joint
    b = random_file(shapes, generator, torch.float32)
    control = {name for name in shapes if name.startswith(CONTROL)}
    a = random_file(small_shapes("tiny"), generator, torch.float32)
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    spec = small_spec("tiny")
    alignment = Alignment(spec.random(generator), spec)
    a_path, b_path, out = (tmp_path / f"{x}.safetensors" for x in ("a", "b", "out"))
    expected = picture(b_path)
    for write in (
        lambda: apply_to_checkpoint(alignment, b_path, out),
        lambda: align_checkpoints(a_path, b_path, out.with_name("aligned.safetensors"), spec=joint[1]),
    ):
        write()
    for path in (out, out.with_name("aligned.safetensors")):
        found = load_file(path)
        assert all(torch.equal(found[name], b[name]) for name in control)
        assert sum(not torch.equal(found[name], b[name]) for name in b) > 50
        assert (picture(path) - expected).abs().max() < 1e-10 * expected.abs().max()
    save_file({name: b[name] for name in control}, tmp_path / "control.safetensors")
    with pytest.raises(
        ValueError, match=r"control\.safetensors: holds a ControlNet, .* fits the aligned UNet as it is"
    ):
        apply_to_checkpoint(alignment, tmp_path / "control.safetensors", tmp_path / "x.safetensors")


def test_a_controlnet_is_refused_where_what_it_is_added_to_moves(tmp_path, generator, joint):
    shapes, spec = joint
    name = f"{UNET}input_blocks.0.0.weight"
    group = Group("stream", 64, (Axis(name, 0),))
    moving = replace(spec, groups={**spec.groups, "stream": group})
    save_file(random_file(shapes, generator), tmp_path / "b.safetensors")
    b, out = tmp_path / "b.safetensors", tmp_path / "out.safetensors"
    message = rf"b\.safetensors: holds a ControlNet, .* of those of '{name}' changes"
    with pytest.raises(ValueError, match=message):
        align_checkpoints(b, b, out, spec=moving)
    with pytest.raises(ValueError, match=message):
        apply_to_checkpoint(Alignment(moving.random(generator), moving), b, out)
    assert not out.exists()


def test_a_lora_is_of_the_unet_and_not_of_its_controlnet(generator, joint):
    _, spec = joint
    name = f"{UNET}input_blocks.3.1.transformer_blocks.0.ff.net.2.weight"
    assert name.replace(UNET, CONTROL) in spec.shapes
    alignment = Alignment(spec.random(generator), spec)
    outputs, inputs = spec.shapes[name]
    key = "lora_unet_" + name.removeprefix(UNET).removesuffix(".weight").replace(".", "_")
    up, down = torch.randn(outputs, 2, generator=generator), torch.randn(2, inputs, generator=generator)
    moved = permute_lora({f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}, alignment)
    expected = alignment.apply({n: torch.zeros(s) for n, s in spec.shapes.items()} | {name: up @ down})[name]
    assert torch.allclose(
        moved[f"{key}.lora_up.weight"] @ moved[f"{key}.lora_down.weight"], expected, atol=1e-5
    )


@pytest.mark.parametrize("more", [{}, ADDED], ids=["plain", "XL"])
def test_a_folder_of_diffusers_is_proved_and_moved(tmp_path, generator, more):
    unet = diffusers.UNet2DConditionModel(**TINY_UNET, **more)
    control = diffusers.ControlNetModel.from_unet(unet)
    for parameter in control.parameters():  # the layers that are added are zero at first
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    control.save_pretrained(tmp_path / "b")
    spec = trace_folder(tmp_path / "b")
    assert prove_folder(tmp_path / "b", spec).error < 1e-12
    apply_to_checkpoint(Alignment(spec.random(generator), spec), tmp_path / "b", tmp_path / "out")
    assert verify_checkpoints(tmp_path / "b", tmp_path / "out").error < 1e-12
    found = [diffusers.ControlNetModel.from_pretrained(tmp_path / x).state_dict() for x in ("b", "out")]
    assert sum(not torch.equal(found[0][name], tensor) for name, tensor in found[1].items()) > 50


@pytest.mark.slow
@pytest.mark.parametrize("unet", [SD1, SD2], ids=["SD 1.5", "SD 2"])
def test_controlnets_of_real_sizes_are_traced_and_proved(unet):
    shapes = control_shapes(unet)
    spec = trace_file(shapes, "control")
    assert prove_file(shapes, spec, "control").error < 1e-12
    moved = {axis.parameter for group in spec.groups.values() for axis in group.axes}
    numbers = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    assert sum(numbers[name] for name in moved) > 0.99 * sum(numbers.values())
