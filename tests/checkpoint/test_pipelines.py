"""Folders of diffusers: one network, variants and shards of it, and whole pipelines."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmatch as fm
from fastmatch.checkpoint import (
    Checkpoint,
    MergeOptions,
    align_checkpoints,
    apply_to_checkpoint,
    merge_checkpoints,
    verify_checkpoints,
)
from fastmatch.checkpoint.diffusion.folders import trace_folder
from fastmatch.checkpoint.diffusion.lora import permute_lora
from fastmatch.checkpoint.tracing import prove_checkpoint, trace_checkpoint
from fastmatch.checkpoint.writer import write_like
from fastmatch.cli.main import main
from fastmatch.permutations.apply import permute_tensor
from helpers.diffusion import CLIP, TINY_UNET, diffusers, transformers

SD3 = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 20, "out_channels": 4,
    "pos_embed_max_size": 8, "qk_norm": "rms_norm", "dual_attention_layers": (0,),
}  # fmt: skip
FLUX = {
    "patch_size": 1, "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 20, "axes_dims_rope": (4, 6, 6),
    "guidance_embeds": True,
}  # fmt: skip
ONE_LEVEL = {
    "block_out_channels": (32,), "cross_attention_dim": 32, "attention_head_dim": 4, "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",),
}  # fmt: skip
"""A UNet for tests of whole pipelines, which take half as long with it as with :data:`TINY_UNET`."""
VAE = {
    "block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2, "layers_per_block": 1,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
NETWORKS = {
    "UNet2DConditionModel": TINY_UNET, "AutoencoderKL": VAE, "SD3Transformer2DModel": SD3, "FluxTransformer2DModel": FLUX,
}  # fmt: skip


def network(name, config=None):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(diffusers, name)(**(config or NETWORKS[name]))


def permuted(source, target):
    """Write a checkpoint with every group moved."""
    checkpoint = Checkpoint(source)
    spec = trace_checkpoint(source, checkpoint)
    planted = spec.random()
    write_like(checkpoint, target, lambda name: permute_tensor(checkpoint[name], name, spec, planted))


def assert_equal(found, expected):
    a, b = Checkpoint(found), Checkpoint(expected)
    assert list(a) == list(b)
    assert all(torch.equal(a[name], tensor) for name, tensor in b.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folder_with_one_network_is_traced_and_proved(tmp_path, name):
    network(name).save_pretrained(tmp_path / "a")
    checkpoint = Checkpoint(tmp_path / "a")
    spec = trace_checkpoint(tmp_path / "a", checkpoint)
    proof = prove_checkpoint(tmp_path / "a", checkpoint, spec)
    assert proof is not None
    assert proof.error < 1e-12
    assert len(spec.groups) > 10


@pytest.mark.parametrize("options", [
    {"max_shard_size": "1MB", "variant": "fp16"}, pytest.param({"variant": "fp16"}, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_planted_folder_is_recovered_with_its_files(tmp_path, options):
    network("AutoencoderKL").half().save_pretrained(tmp_path / "a", **options)
    permuted(tmp_path / "a", tmp_path / "b")
    align_checkpoints(*(tmp_path / x for x in ("a", "b", "out")))
    assert_equal(tmp_path / "out", tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        p.name for p in (tmp_path / "a").iterdir()
    )
    loaded = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out", variant=options.get("variant"))
    assert torch.equal(loaded.quant_conv.weight.half(), Checkpoint(tmp_path / "a")["quant_conv.weight"])


def test_of_several_variants_none_is_guessed(tmp_path):
    for variant in ("fp16", "ema"):
        network("AutoencoderKL").save_pretrained(tmp_path / "a", variant=variant)
    with pytest.raises(ValueError, match="variants ema, fp16, and none without; keep one of them"):
        Checkpoint(tmp_path / "a")


@pytest.fixture
def pipelines(tmp_path):
    """a: a pipeline with a tokenizer, a scheduler and a safety checker; b: a with every network permuted."""
    a = tmp_path / "a"
    network("UNet2DConditionModel", ONE_LEVEL).save_pretrained(a / "unet", variant="fp16")
    network("AutoencoderKL").save_pretrained(a / "vae")
    transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)).save_pretrained(a / "text_encoder")
    for folder, file in {
        "scheduler": "scheduler_config.json",
        "tokenizer": "vocab.json",
        "safety_checker": "w.bin",
    }.items():
        (a / folder).mkdir()
        (a / folder / file).write_text("{}")
    (a / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    permuted(a, tmp_path / "b")
    return tmp_path


def files_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_pipeline_is_aligned_network_by_network_and_the_rest_is_carried(pipelines, capsys):
    a, b, out = (pipelines / x for x in ("a", "b", "out"))
    before = Checkpoint(b)
    assert not all(torch.equal(before[name], tensor) for name, tensor in Checkpoint(a).items())
    assert (
        main(["align", str(a), str(b), "--out", str(out), "--permutations", str(pipelines / "p.safetensors")])
        == 0
    )
    assert "proved to keep the function" in capsys.readouterr().out
    assert_equal(out, a)
    assert files_in(out) == files_in(a)
    found = verify_checkpoints(b, out)
    assert found.outputs > 3
    assert found.error < 1e-9
    spec = fm.Alignment.load(pipelines / "p.safetensors").spec
    assert {name.split(".")[0] for name in spec.shapes} == {"unet", "vae", "text_encoder"}


def test_of_networks_that_stay_programs_and_links_that_leave_the_folder_are_left_behind(pipelines, caplog):
    checker, outside = pipelines / "b" / "safety_checker", pipelines / "outside"
    outside.mkdir()
    (outside / "private.json").write_text("{}")
    (checker / "more").mkdir()
    for file in ("more/model.onnx", "more/run.py"):
        (checker / file).write_text("0")
    (checker / "private.json").symlink_to(outside / "private.json")
    (pipelines / "b" / "feature_extractor").symlink_to(outside)
    align_checkpoints(*(pipelines / x for x in ("a", "b", "out")))
    assert files_in(pipelines / "out") == sorted(
        [*files_in(pipelines / "a"), "safety_checker/more/model.onnx"]
    )
    assert (
        f"{pipelines / 'out'}: not copied from {pipelines / 'b'}: feature_extractor/, safety_checker/more/run.py, "
        "safety_checker/private.json" in caplog.text
    )


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Two pipelines of a T5: of the second one, the file holds the tied table of words twice."""
    folder = tmp_path_factory.mktemp("tied")
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
    )
    for name in ("one", "two"):
        path = folder / name / "text_encoder"
        transformers.T5EncoderModel(config).save_pretrained(path)
        (folder / name / "model_index.json").write_text(
            json.dumps({"_class_name": "StableDiffusion3Pipeline"})
        )
    state = load_file(path / "model.safetensors")
    assert "encoder.embed_tokens.weight" not in state
    save_file(
        {**state, "encoder.embed_tokens.weight": state["shared.weight"].clone()}, path / "model.safetensors"
    )
    return folder


@pytest.mark.parametrize("names", [("one", "two"), ("two", "one")])
def test_a_tied_tensor_that_only_one_of_two_pipelines_stores_twice(encoders, tmp_path, names):
    first, second = (encoders / name for name in names)
    align_checkpoints(first, second, tmp_path / "aligned")
    assert verify_checkpoints(second, tmp_path / "aligned").error < 1e-9
    merge_checkpoints([first, second], tmp_path / "merged", MergeOptions((0.5, 0.5)))
    found, a, b = (Checkpoint(path) for path in (tmp_path / "merged", first, second))
    name = "text_encoder.shared.weight"
    expected = (a[name] + b[name]) / 2
    assert found.keys() == a.keys()
    tables = [t for k, t in found.items() if k.endswith(("shared.weight", "embed_tokens.weight"))]
    assert all(torch.allclose(table, expected) for table in tables)


def write_sd3(path):
    """Write a pipeline of a transformer and a ControlNet."""
    base = network("SD3Transformer2DModel")
    base.save_pretrained(path / "transformer")
    control = diffusers.SD3ControlNetModel.from_transformer(
        base, num_layers=1, num_extra_conditioning_channels=0
    )
    control.save_pretrained(path / "controlnet")
    (path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3ControlNetPipeline"}))


def test_a_controlnet_is_refused_where_hidden_states_between_blocks_move(tmp_path):
    write_sd3(tmp_path / "a")
    a, out = tmp_path / "a", tmp_path / "out"
    spec = trace_checkpoint(a, Checkpoint(a))
    message = r"controlnet: holds a SD3ControlNetModel, which is added to hidden states of 'transformer'"
    with pytest.raises(ValueError, match=message):
        align_checkpoints(a, a, out, spec=spec)
    with pytest.raises(ValueError, match=message):
        apply_to_checkpoint(fm.Alignment(spec.random(), spec), a, out)
    assert not out.exists()
    still = spec.without_residual()
    assert {
        "transformer.pos_embed.proj",
        "transformer.context_embedder",
    } <= spec.groups.keys() - still.groups.keys()
    apply_to_checkpoint(fm.Alignment(still.random(), still), a, out)
    assert_equal(out / "controlnet", a / "controlnet")
    (a / "controlnet" / "config.json").write_text(json.dumps({"_class_name": "FluxControlNetModel"}))
    with pytest.raises(ValueError, match="holds a FluxControlNetModel"):
        align_checkpoints(a, a, tmp_path / "b", spec=spec)


def test_a_controlnet_of_a_unet_fits_the_aligned_one(tmp_path, caplog):
    b, out = tmp_path / "b", tmp_path / "out"
    unet = network("UNet2DConditionModel", ONE_LEVEL)
    control = diffusers.ControlNetModel.from_unet(unet)
    generator = torch.Generator().manual_seed(3)
    for parameter in control.parameters():  # the layers that are added are zero at first
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    unet.save_pretrained(b / "unet")
    control.save_pretrained(b / "controlnet")
    (b / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionControlNetPipeline"}))
    with_weights(b / "other", torch.ones(2))
    spec = trace_checkpoint(b, Checkpoint(b))
    apply_to_checkpoint(fm.Alignment(spec.random(generator), spec), b, out)
    assert (
        f"{b / 'other'}: carried as it is; it no longer fits if it reads hidden units of unet" in caplog.text
    )
    assert len(caplog.records) == 1
    assert not torch.equal(
        Checkpoint(b)["unet.mid_block.resnets.0.conv1.weight"],
        Checkpoint(out)["unet.mid_block.resnets.0.conv1.weight"],
    )
    given = [
        torch.randn(shape, generator=generator).double()
        for shape in ((1, 4, 8, 8), (1, 4, 32), (1, 3, 64, 64))
    ]

    def picture(path, strength=1.0):
        own = diffusers.UNet2DConditionModel.from_pretrained(path / "unet").double().eval()
        added = diffusers.ControlNetModel.from_pretrained(path / "controlnet").double().eval()
        noise, prompt, pose = given
        with torch.no_grad():
            down, mid = added(noise, 10, prompt, pose, conditioning_scale=strength, return_dict=False)
            return own(
                noise, 10, prompt, down_block_additional_residuals=down, mid_block_additional_residual=mid
            ).sample

    expected = picture(b)
    assert (picture(out) - expected).abs().max() < 1e-10 * expected.abs().max()
    assert (picture(b, 0.0) - expected).abs().max() > 1e-3 * expected.abs().max()


def with_weights(folder, tensor):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": tensor}, folder / "model.safetensors")


def test_networks_of_a_pipeline_that_are_not_run_must_be_equal(pipelines):
    a, b = pipelines / "a", pipelines / "b"
    for folder in (a, b):
        with_weights(folder / "safety_checker", torch.tensor([1.0, float("nan")]))
    assert verify_checkpoints(a, b).error < 1e-12
    with_weights(b / "safety_checker", torch.tensor([1.0, float("nan")]).half())  # rounded as it was written
    assert verify_checkpoints(a, b).error < 1e-12
    with_weights(b / "safety_checker", torch.tensor([1.5, float("nan")]))
    with pytest.raises(ValueError, match=r"tensor 'safety_checker.weight' differs .* belongs to no network"):
        verify_checkpoints(a, b)


def test_pipelines_without_a_known_network_are_not_called_the_same(tmp_path):
    for name in "ab":
        (tmp_path / name / "safety_checker").mkdir(parents=True)
        (tmp_path / name / "model_index.json").write_text("{}")
        with_weights(tmp_path / name / "safety_checker", torch.ones(2))
    with pytest.raises(
        ValueError, match=r"none of its folders \(safety_checker\) holds a network of a known class"
    ):
        verify_checkpoints(tmp_path / "a", tmp_path / "b")


def test_a_network_that_the_reference_lacks_is_carried(pipelines):
    a, b, out = (pipelines / x for x in ("a", "b", "out"))
    shutil.rmtree(a / "vae")
    align_checkpoints(a, b, out, spec=trace_checkpoint(b, Checkpoint(b)))
    assert_equal(out / "vae", b / "vae")
    assert_equal(out / "unet", a / "unet")


def test_a_lora_with_diffusers_names_follows_a_pipeline(pipelines):
    spec = trace_checkpoint(pipelines / "b", Checkpoint(pipelines / "b"))
    generator = torch.Generator().manual_seed(4)
    alignment = fm.Alignment(spec.random(generator), spec)
    places = {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v": "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": next(
            name
            for name in alignment.spec.shapes
            if name.endswith("encoder.layers.0.self_attn.q_proj.weight")
        ),
    }
    for key, name in places.items():
        rows, columns = alignment.spec.shapes[name]
        up, down = (
            torch.randn(rows, 2, generator=generator).double(),
            torch.randn(2, columns, generator=generator).double(),
        )
        moved = permute_lora({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, alignment)
        expected = permute_tensor(up @ down, name, alignment.spec, alignment.permutations)
        assert not torch.equal(expected, up @ down)
        assert torch.allclose(
            moved[f"{key}.lora_B.weight"] @ moved[f"{key}.lora_A.weight"], expected, atol=1e-12
        )


def test_a_file_of_a_folder_is_refused_with_the_folder_that_tells_its_structure(tmp_path, capsys):
    network("UNet2DConditionModel", ONE_LEVEL).save_pretrained(tmp_path / "unet")
    file = str(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    for command in (["inspect", file], ["align", file, file, "--out", "x.safetensors"]):
        assert main(command) == 2
        assert f"give the folder {tmp_path / 'unet'}, which has one" in capsys.readouterr().err


def test_a_class_without_known_inputs_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "PriorTransformer"}))
    with pytest.raises(
        ValueError, match=r"config\.json: expected one of .*UNet2DConditionModel.*got 'PriorTransformer'"
    ):
        trace_folder(tmp_path)
