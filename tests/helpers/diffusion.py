"""Small files of Stable Diffusion with the names of the real ones, which the package sd-mecha lists."""

from __future__ import annotations

import functools

import pytest
import torch

from bench.lib.diffusion_shapes import listed_shapes
from fastmatch.checkpoint.diffusion.components import find_components

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
sd_mecha = pytest.importorskip("sd_mecha")

SD1_UNET = {
    "block_out_channels": (32, 64), "cross_attention_dim": 64, "attention_head_dim": 8, "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
TINY_UNET = {
    "block_out_channels": (64, 128), "cross_attention_dim": 32, "attention_head_dim": (1, 2), "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
}  # fmt: skip
SDXL_UNET = {
    "block_out_channels": (64, 128, 128), "cross_attention_dim": 2048, "attention_head_dim": (1, 2, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
    "transformer_layers_per_block": (1, 1, 2), "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1344,
}  # fmt: skip
VAE = {
    "block_out_channels": (32, 64, 96, 96), "down_block_types": ("DownEncoderBlock2D",) * 4, "layers_per_block": 2,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
CLIP = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 16, "bos_token_id": 62, "eos_token_id": 63,
}  # fmt: skip


@functools.cache
def names_in_file(file: str, component: str) -> dict[str, str]:
    """Name of a parameter of the module -> its name in the real file."""
    (found,) = find_components(listed_shapes(file, component), file)
    return {name: found.prefix + source.parts[0].name for name, source in found.layout.items()}


@functools.cache
def small_shapes(kind: str = "sd1") -> dict[str, tuple[int, ...]]:
    """Name -> shape of a small file: UNet, VAE and text encoder of ``"sd1"``, or a UNet: ``"sdxl"`` or ``"tiny"``."""
    with torch.device("meta"):
        if kind != "sd1":
            config = SDXL_UNET if kind == "sdxl" else TINY_UNET
            parts = [("sdxl-sgm", "diffuser", diffusers.UNet2DConditionModel(**config))]
        else:
            parts = [
                ("sd1-ldm", "diffuser", diffusers.UNet2DConditionModel(**SD1_UNET)),
                ("sd1-ldm", "vae", diffusers.AutoencoderKL(**VAE)),
                ("sd1-ldm", "clip_l", transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP))),
            ]
    shapes = {}
    for file, component, module in parts:
        names = names_in_file(file, component)
        shapes |= {names[k]: tuple(t.shape) for k, t in module.state_dict().items() if k in names}
    convolution = "attn_1.{}.weight"
    for name, shape in shapes.items():
        if name.endswith(tuple(map(convolution.format, ("q", "k", "v", "proj_out")))):
            shapes[name] = (*shape, 1, 1)
    return shapes


def random_file(
    shapes: dict[str, tuple[int, ...]], generator: torch.Generator, dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """Tensors of random numbers that keep activations of order one."""
    made = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        scale = noise[0].numel() ** -0.5 if len(shape) > 1 else 0.3
        made[name] = (noise * scale + (len(shape) == 1 and name.endswith("weight"))).to(dtype)
    return made
