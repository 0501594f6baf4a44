"""Files of Stable Diffusion: found by names and shapes, proved, aligned, and what is refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from numpy.random import SeedSequence
from safetensors.torch import load_file, save_file

from fastmatch import Alignment, WeightMatching
from fastmatch.checkpoint import (
    Checkpoint,
    MergeOptions,
    WriteOptions,
    align,
    align_checkpoints,
    align_many_checkpoints,
    apply_to_checkpoint,
    merge_checkpoints,
    tracing,
    verify_checkpoints,
)
from fastmatch.checkpoint.diffusion.components import build_component, find_components
from fastmatch.checkpoint.diffusion.folders import trace_folder
from fastmatch.checkpoint.diffusion.namings import translation
from fastmatch.checkpoint.diffusion.single_file import prove_file, trace_file, with_running_mean
from fastmatch.cli.main import main
from fastmatch.permutations.apply import apply_permutations
from helpers.diffusion import TINY_UNET, diffusers, listed_shapes, random_file, small_shapes, small_spec

UNET = "model.diffusion_model."


@pytest.fixture
def generator():
    seed = int(SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def unet_shapes():
    return small_shapes("unet")


def text_shapes():
    return {n: s for n, s in small_shapes().items() if n.startswith("cond_stage_model.")}


def running_mean(name):
    return "model_ema." + name.removeprefix("model.").replace(".", "")


DEPTHS = pytest.mark.parametrize("deep", [False, pytest.param(True, marks=pytest.mark.slow)])
"""A small file, and one with as many blocks at every level as real ones."""


@DEPTHS
def test_a_pruned_file_is_recovered_in_a_full_one(tmp_path, generator, capsys, deep):
    """A has the VAE, the text encoder, a running mean and a schedule; B was A before it was permuted, and lacks two."""
    shapes, spec = small_shapes(deep=deep), small_spec(deep=deep)
    a = random_file(shapes, generator)
    mean = {running_mean(name): tensor + 0.01 for name, tensor in a.items() if name.startswith(UNET)}
    a |= mean | {"alphas_cumprod": torch.rand(9), "model_ema.decay": torch.tensor(0.9)}
    b = apply_permutations({k: v for k, v in a.items() if k in shapes}, spec, spec.random(generator))
    b["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    paths = [str(tmp_path / f"{x}.safetensors") for x in ("a", "b", "out", "p")]

    assert main(["align", *paths[:2], "--out", paths[2], "--permutations", paths[3]]) == 0

    assert "proved to keep the function" in capsys.readouterr().out
    out = load_file(paths[2])
    assert list(out) == list(load_file(paths[1]))
    assert all(torch.equal(out[name], a[name]) for name in shapes)
    assert all(out[name].dtype == b[name].dtype for name in b)
    assert main(["apply", paths[3], paths[1], "--out", str(tmp_path / "again.safetensors")]) == 0
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again[name], out[name]) for name in out)


def test_the_running_mean_moves_with_its_weights(tmp_path, generator):
    shapes = unet_shapes()
    whole = shapes | {running_mean(name): shape for name, shape in shapes.items()}
    spec = trace_file(whole, "B")
    a = random_file(shapes, generator)
    mean = {running_mean(name): tensor + 0.01 for name, tensor in a.items()}
    save_file(a, tmp_path / "a.safetensors")
    save_file(apply_permutations(a | mean, spec, spec.random(generator)), tmp_path / "b.safetensors")
    paths = [tmp_path / f"{x}.safetensors" for x in ("a", "b", "out")]
    align_checkpoints(*paths, spec=spec)
    out = load_file(paths[2])
    assert all(torch.equal(out[name], tensor) for name, tensor in (a | mean).items())


def test_permutations_of_a_pruned_file_move_the_running_mean_of_the_full_one(tmp_path, generator, caplog):
    shapes, spec = unet_shapes(), small_spec("unet")
    b = random_file(shapes, generator)
    mean = {running_mean(name): tensor.clone() for name, tensor in b.items()}
    rest = {"model_ema.decay": torch.tensor(0.9), "alphas_cumprod": torch.rand(9)}
    full, out = tmp_path / "full.safetensors", tmp_path / "out.safetensors"
    save_file(b | mean | rest, full)
    alignment = Alignment(spec.random(generator), spec)
    assert apply_to_checkpoint(alignment, full, out) == "checkpoint"
    found = load_file(out)
    assert not all(torch.equal(found[name], tensor) for name, tensor in b.items())
    assert all(torch.equal(found[running_mean(name)], found[name]) for name in b)
    assert not caplog.records
    whole = with_running_mean(
        spec, {name: tuple(tensor.shape) for name, tensor in (b | mean).items()}, "full"
    )
    apply_to_checkpoint(Alignment(alignment.permutations, whole), full, out, force=True)
    assert all(torch.equal(load_file(out)[name], tensor) for name, tensor in found.items())
    save_file(b | mean | {"model_ema.other": torch.ones(3)}, full)
    apply_to_checkpoint(alignment, full, out, force=True)
    assert (
        "1 running means follow no weight of the file and keep their order, such as model_ema.other"
        in caplog.text
    )
    save_file(b | {"control_model.input_blocks.0.0.bias": torch.zeros(32)}, full)
    with pytest.raises(
        ValueError,
        match=r"'control_model\.input_.*' belongs to what is added to the UNet.*of their own, which fits",
    ):
        apply_to_checkpoint(alignment, full, out, force=True)


def test_permutations_of_a_full_file_move_a_pruned_one(tmp_path, generator, caplog):
    shapes, spec = small_shapes(), small_spec()
    full = random_file(shapes, generator)
    alignment = Alignment(spec.random(generator), spec)
    moved = alignment.apply({name: full[name] for name in spec.shapes})
    pruned = {name: tensor for name, tensor in full.items() if name.startswith(UNET)}
    assert 0 < len(pruned) < len(spec.shapes)
    save_file(pruned, tmp_path / "pruned.safetensors")
    apply_to_checkpoint(alignment, tmp_path / "pruned.safetensors", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == pruned.keys()
    assert all(torch.equal(tensor, moved[name]) for name, tensor in found.items())
    assert not all(torch.equal(tensor, pruned[name]) for name, tensor in found.items())
    (record,) = caplog.records
    assert "pruned.safetensors: has no" in record.getMessage()
    assert "cond_stage_model" in record.getMessage()
    del pruned[next(iter(pruned))]  # a part of a network
    save_file(pruned, tmp_path / "pruned.safetensors")
    with pytest.raises(ValueError, match="has no tensor"):
        apply_to_checkpoint(
            alignment, tmp_path / "pruned.safetensors", tmp_path / "out.safetensors", force=True
        )


def test_a_merge_names_what_the_reference_lacks_or_has_besides(tmp_path, generator, caplog):
    shapes = unet_shapes()
    a = random_file(shapes, generator)
    mean = {running_mean(name): tensor.clone() for name, tensor in a.items()}
    save_file(a | {"alphas_cumprod": torch.ones(9)}, tmp_path / "a.safetensors")
    save_file(a | mean, tmp_path / "b.safetensors")
    paths = [tmp_path / f"{x}.safetensors" for x in ("a", "b", "out")]
    spec = trace_file({name: tuple(t.shape) for name, t in (a | mean).items()}, "b")
    align_checkpoints(*paths, spec=spec, write=WriteOptions(merge=0.5))
    lines = [record.getMessage() for record in caplog.records]
    lacking = (
        f"a.safetensors: lacks {len(mean)} of the {2 * len(mean)} tensors of {paths[1]}, such as model_ema."
    )
    assert any(lacking in line and "it has no part in those" in line for line in lines)
    assert any("1 tensors that" in line and "left out, such as alphas_cumprod" in line for line in lines)


def test_a_sibling_stays(tmp_path, generator, capsys):
    a = random_file(text_shapes(), generator)
    paths = [tmp_path / f"{x}.safetensors" for x in ("a", "b", "out")]
    save_file(a, paths[0])
    save_file({k: t + 1e-3 * torch.randn(t.shape, generator=generator) for k, t in a.items()}, paths[1])
    assert main(["align", *map(str, paths[:2]), "--out", str(paths[2])]) == 0
    assert "already aligned: 100.0% of units stay" in capsys.readouterr().out


def test_diffusers_loads_the_aligned_file_as_the_same_function(tmp_path, generator):
    shapes = small_shapes("tiny")
    for name in "ab":
        save_file(random_file(shapes, generator, torch.float32), tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{x}.safetensors" for x in ("a", "b", "out")]
    assert align_checkpoints(*paths, WeightMatching(max_sweeps=1), spec=small_spec("tiny")).moved > 100
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", **TINY_UNET}))
    inputs = torch.randn(2, 4, 8, 8, generator=generator).double(), 7, torch.randn(2, 3, 32).double()
    old, new = (
        diffusers.UNet2DConditionModel.from_single_file(str(path), config=str(tmp_path))
        .double()
        .eval()(*inputs)
        .sample
        for path in paths[1:]
    )
    assert (old - new).abs().max() < 1e-10 * old.abs().max()


def test_torch_files_of_training_are_read_and_written(tmp_path, generator):
    shapes, spec = unet_shapes(), small_spec("unet")
    a = random_file(shapes, generator)
    torch.save({"state_dict": a, "global_step": 7}, tmp_path / "a.ckpt")
    moved = apply_permutations(a, spec, spec.random(generator))
    torch.save({"state_dict": moved, "global_step": 9}, tmp_path / "b.ckpt")
    align_checkpoints(tmp_path / "a.ckpt", tmp_path / "b.ckpt", tmp_path / "out.ckpt", spec=spec)
    out = Checkpoint(tmp_path / "out.ckpt")
    assert all(torch.equal(out[name], tensor) for name, tensor in a.items())


def test_an_inpainting_unet_keeps_its_own_columns(tmp_path, generator):
    shapes = unet_shapes()
    wide = {**shapes, f"{UNET}input_blocks.0.0.weight": (32, 9, 3, 3)}
    spec = trace_file(wide, "b")
    a = random_file(shapes, generator)
    first = random_file(wide, generator)[f"{UNET}input_blocks.0.0.weight"]
    b = {**a, f"{UNET}input_blocks.0.0.weight": first}
    permutations = spec.random(generator)
    save_file(a, tmp_path / "a.safetensors")
    save_file(apply_permutations(b, spec, permutations), tmp_path / "b.safetensors")
    paths = [tmp_path / f"{x}.safetensors" for x in ("a", "b", "out")]
    align_checkpoints(*paths, spec=spec, write=WriteOptions(merge=0.5))
    out = load_file(paths[2])
    merged = out.pop(f"{UNET}input_blocks.0.0.weight")
    assert all(torch.equal(tensor, b[name]) for name, tensor in out.items())
    assert torch.equal(merged[:, 4:], first[:, 4:])
    plain = a[f"{UNET}input_blocks.0.0.weight"]
    assert torch.equal(merged[:, :4], ((plain.float() + first[:, :4].float()) / 2).half())


@pytest.mark.parametrize("inputs", [9, 8, 5])
def test_permutations_of_a_plain_unet_move_one_with_more_inputs(tmp_path, generator, caplog, inputs):
    """Those for inpainting, pix2pix and depth; the running mean is as wide."""
    first = f"{UNET}input_blocks.0.0.weight"
    plain, shapes = small_shapes("tiny"), small_shapes("tiny")
    shapes[first] = (shapes[first][0], inputs, 3, 3)
    spec = small_spec("tiny")
    alignment = Alignment(spec.random(generator), spec)
    alignment.save(tmp_path / "p.safetensors")
    b = random_file(shapes, generator, torch.float32)
    mean = {running_mean(name): tensor.clone() for name, tensor in b.items()}
    save_file(b | mean, tmp_path / "b.safetensors")
    paths = [str(tmp_path / f"{x}.safetensors") for x in ("p", "b", "out")]

    assert main(["apply", *paths[:2], "--out", paths[2]]) == 0

    out = load_file(paths[2])
    assert out[first].shape == (64, inputs, 3, 3)
    expected = apply_permutations(b, trace_file(shapes, "b"), alignment.permutations)
    assert out.keys() == b.keys() | mean.keys()
    assert all(torch.equal(out[name], tensor) for name, tensor in expected.items())
    assert all(torch.equal(out[running_mean(name)], tensor) for name, tensor in expected.items())
    assert sum(not torch.equal(out[name], b[name]) for name in plain) > 50
    assert not caplog.records
    found = verify_checkpoints(*paths[1:])
    assert (found.outputs, found.error < 1e-12) == (2, True)


def test_permutations_of_an_inpainting_unet_move_a_plain_folder(tmp_path, generator):
    for name, inputs in (("wide", 9), ("plain", 4)):
        net = diffusers.UNet2DConditionModel(in_channels=inputs, **TINY_UNET)
        net.save_pretrained(tmp_path / name)
    spec = trace_folder(tmp_path / "wide")
    alignment = Alignment(spec.random(generator), spec)
    apply_to_checkpoint(alignment, tmp_path / "plain", tmp_path / "out")
    assert verify_checkpoints(tmp_path / "plain", tmp_path / "out").error < 1e-12
    before, after = (Checkpoint(tmp_path / name) for name in ("plain", "out"))
    assert torch.equal(after["conv_in.weight"], before["conv_in.weight"])  # skip connections keep its order
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > 50


def test_permutations_fit_where_only_axes_that_stay_have_another_size(tmp_path, generator, caplog):
    """The prompt's embedding is wider in Stable Diffusion 2; the names are the same, and it keeps its order."""
    shapes, spec = unet_shapes(), small_spec("unet")
    alignment = Alignment(spec.random(generator), spec)
    wide = {n: (s[0], 96) if re.search(r"attn2\.to_[kv]\.weight", n) else s for n, s in shapes.items()}
    b = random_file(wide, generator)
    save_file(b, tmp_path / "b.safetensors")
    apply_to_checkpoint(alignment, tmp_path / "b.safetensors", tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")
    expected = apply_permutations(b, trace_file(wide, "b"), alignment.permutations)
    assert all(torch.equal(out[name], tensor) for name, tensor in expected.items())
    (record,) = caplog.records
    assert re.search(
        r"b\.safetensors: .*of another size than .*: \S*attn2\.to_k\.weight \(32, 96\), not \(32, 64\)",
        record.getMessage(),
    )
    for name in b:
        if name.endswith("ff.net.2.weight"):
            b[name] = b[name][:, :-1].contiguous()
    save_file(b, tmp_path / "b.safetensors")
    with pytest.raises(
        ValueError,
        match=r"b\.safetensors: tensor '\S*ff\.net\.2\.weight' has shape \(32, 127\), .* \(32, 128\)",
    ):
        apply_to_checkpoint(alignment, tmp_path / "b.safetensors", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def stranger(a, b):
    b[f"{UNET}input_blocks.1.2.weight"] = torch.zeros(3)
    return (
        r"b\.safetensors: the architecture of its unet has no place for tensor '.*input_blocks\.1\.2\.weight'"
    )


def control(a, b):
    b["control_model.input_blocks.0.0.bias"] = torch.zeros(32)
    return r"'control_model\.input_blocks\.0\.0\.bias' belongs to what is added to the UNet.*, which fits the aligned UNet as it is"


def attention_of_pictures(a, b):
    b["ip_adapter.1.to_k_ip.weight"] = torch.zeros(32, 64)
    return r"'ip_adapter\.1\.to_k_ip\.weight' belongs to what is added to the UNet.*; leave these tensors out"


def half_a_file(a, b):
    del b[f"{UNET}out.2.bias"]
    return r"b\.safetensors: has no tensor for the parameter 'conv_out\.bias'"


def half_a_reference(a, b):
    del a[f"{UNET}out.2.bias"]
    return r"a\.safetensors: has no tensor 'model\.diffusion_model\.out\.2\.bias', which .*b\.safetensors has"


def other_width(a, b):
    a[f"{UNET}out.2.weight"] = torch.zeros(4, 33, 3, 3)
    return r"a\.safetensors: tensor '.*out\.2\.weight' has shape \(4, 33, 3, 3\)"


def nothing_in_common(a, b):
    for name in list(a):
        a[name.replace(".", "_")] = a.pop(name)
    return r"a\.safetensors: has none of the networks of .*b\.safetensors"


@pytest.mark.parametrize(
    "harm",
    [stranger, control, attention_of_pictures, half_a_file, half_a_reference, other_width, nothing_in_common],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, generator, harm):
    a, b = random_file(unet_shapes(), generator), random_file(unet_shapes(), generator)
    message = harm(a, b)
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=message):
        align_checkpoints(*(tmp_path / f"{x}.safetensors" for x in ("a", "b", "out")))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_difference_of_two_files_is_told_before_the_proof(tmp_path, generator, capsys, monkeypatch):
    a, b = random_file(unet_shapes(), generator), random_file(unet_shapes(), generator)
    message = other_width(a, b)
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    proved = []
    for module in (tracing, align):
        monkeypatch.setattr(module, "prove_checkpoint", lambda *args: proved.append(args))
    paths = [str(tmp_path / f"{x}.safetensors") for x in ("a", "b", "out")]
    assert main(["align", *paths[:2], "--out", paths[2]]) == 2
    assert re.search(message, capsys.readouterr().err)
    name = f"{UNET}out.2.bias"
    save_file(b | {name: torch.full_like(b[name], float("nan"))}, tmp_path / "a.safetensors")
    assert main(["align", *paths[:2], "--out", paths[2]]) == 2
    assert f"a.safetensors: tensor '{name}' holds 4 NaN or infinite" in capsys.readouterr().err
    assert not proved
    save_file(b, tmp_path / "a.safetensors")
    assert main(["align", *paths[:2], "--out", paths[2]]) == 0
    assert len(proved) == 1


def test_the_same_network_is_found_under_another_prefix(tmp_path, generator):
    """Files of a UNet alone have its names without a prefix."""
    shapes, spec = unet_shapes(), small_spec("unet")
    a = random_file(shapes, generator)
    save_file({name.removeprefix(UNET): tensor for name, tensor in a.items()}, tmp_path / "a.safetensors")
    save_file(apply_permutations(a, spec, spec.random(generator)), tmp_path / "b.safetensors")
    a_path, b_path, out = (tmp_path / f"{x}.safetensors" for x in ("a", "b", "out"))
    align_checkpoints(a_path, b_path, out, spec=spec)
    found = load_file(out)
    assert list(found) == list(load_file(b_path))
    assert all(torch.equal(found[name], tensor) for name, tensor in a.items())
    base, merged = tmp_path / "base.safetensors", tmp_path / "merged.safetensors"
    save_file({name.removeprefix(UNET): torch.zeros_like(t) for name, t in a.items()}, base)
    merge_checkpoints([out, a_path], merged, MergeOptions([1.0], base=base))
    found = load_file(merged)
    assert all(torch.equal(found[name], 2 * tensor) for name, tensor in a.items())
    align_many_checkpoints(
        [a_path, b_path], merged, spec=spec, merge=MergeOptions(), write=WriteOptions(force=True)
    )
    found = load_file(merged)
    assert all(torch.equal(found[name.removeprefix(UNET)], tensor) for name, tensor in a.items())


def test_a_text_encoder_with_older_names_is_the_same_network():
    """Some files leave out ``text_model.`` in the names of CLIP."""
    shapes = text_shapes()
    older = {name.replace(".text_model.", "."): shape for name, shape in shapes.items()}
    assert older.keys().isdisjoint(shapes)
    names = translation(older, shapes, "a", "b")
    assert names == dict(zip(older, shapes, strict=True))
    spec = trace_file(older, "a")
    assert len(spec.groups) == len(trace_file(shapes, "b").groups) > 0
    assert prove_file(older, spec, "a").error < 1e-12


def test_two_files_are_verified_network_by_network(tmp_path, generator, capsys):
    shapes, spec = unet_shapes(), small_spec("unet")
    a = random_file(shapes, generator)
    b = apply_permutations(a, spec, spec.random(generator))
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    paths = [str(tmp_path / f"{x}.safetensors") for x in "ab"]
    found = verify_checkpoints(*paths)
    assert (found.outputs, found.error < 1e-12) == (1, True)
    b[f"{UNET}out.2.weight"] = b[f"{UNET}out.2.weight"].roll(1, 1)
    save_file(b, paths[1])
    assert main(["verify", *paths]) == 3
    assert "is not the same function" in capsys.readouterr().err


def test_what_no_network_of_a_file_reads_must_be_equal(tmp_path, generator):
    shapes = unet_shapes()
    a = random_file(shapes, generator) | {
        "sigmas": torch.arange(3.0),
        "text_model.logit_scale": torch.tensor(1.0),
    }
    paths = [tmp_path / f"{x}.safetensors" for x in "ab"]
    save_file(a, paths[0])
    for name in ("sigmas", "text_model.logit_scale"):
        save_file(a | {name: a[name] + 1}, paths[1])
        with pytest.raises(ValueError, match=f"tensor '{name}' differs"):
            verify_checkpoints(*paths)
    save_file(a, paths[1])
    assert verify_checkpoints(*paths).error == 0


def test_a_running_mean_is_run_like_the_network(tmp_path, generator):
    shapes = unet_shapes()
    whole = shapes | {running_mean(name): shape for name, shape in shapes.items()}
    spec = trace_file(whole, "a")
    a = random_file(whole, generator)
    b = apply_permutations(a, spec, spec.random(generator))
    paths = [tmp_path / f"{x}.safetensors" for x in "ab"]
    for state, path in zip((a, b), paths, strict=True):
        save_file(state, path)
    found = verify_checkpoints(*paths)
    assert (found.outputs, found.error < 1e-12) == (2, True)
    name = running_mean(f"{UNET}out.2.weight")
    save_file(b | {name: b[name].roll(1, 1)}, paths[1])
    with pytest.raises(ValueError, match="is not the same function"):
        verify_checkpoints(*paths)


def test_other_files_still_need_a_model(tmp_path, capsys):
    for name in "ab":
        save_file({"fc.weight": torch.ones(2, 2)}, tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / f"{x}.safetensors") for x in ("a", "b", "out")]
    assert main(["align", *paths[:2], "--out", paths[2]]) == 2
    assert re.search("--model: needed unless .* or files of a diffusion model", capsys.readouterr().err)


@DEPTHS
def test_sdxl_names_a_linear_projection_and_added_conditions(deep):
    shapes, spec = small_shapes("sdxl", deep=deep), small_spec("sdxl", deep=deep)
    assert prove_file(shapes, spec, "sdxl").error < 1e-12
    heads = [
        group.size
        for group in spec.groups.values()
        if not group.within
        and any(axis.parameter.endswith("attn1.to_q.weight") and axis.dim == 0 for axis in group.axes)
    ]
    assert heads
    assert set(heads) == {2}


def test_a_table_of_positions_that_the_file_has_is_not_computed():
    """That of SD3.5 medium takes more than two gigabytes while it is computed."""
    shapes = listed_shapes("sd3-comfyui", "diffuser")
    (component,) = find_components(shapes, "sd3")
    module = build_component(component, component.shapes, 1)
    assert all(buffer.is_meta for buffer in module.buffers())
    assert "pos_embed.pos_embed" in dict(module.named_buffers())


REAL = {
    "sd1-ldm": ("diffuser", "vae", "clip_l"), "sdxl-sgm": ("diffuser", "vae", "clip_l", "clip_g"),
    "sd3-comfyui": ("diffuser", "vae", "clip_l", "clip_g", "t5xxl"), "flux-flux": ("diffuser", "vae", "clip_l", "t5xxl"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("file", "component"), [(f, c) for f, parts in REAL.items() for c in parts])
def test_real_sizes_are_traced_and_a_reduced_model_is_proved(file, component):
    shapes = listed_shapes(file, component)
    spec = trace_file(shapes, file)
    assert prove_file(shapes, spec, file).error < 1e-12
    numbers = {name: torch.Size(shape).numel() for name, shape in spec.shapes.items()}
    moved = {axis.parameter for group in spec.groups.values() for axis in group.axes}
    assert sum(numbers[name] for name in moved) > 0.6 * sum(numbers.values())
