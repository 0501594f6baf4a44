"""Small files of Stable Diffusion with the names of the real ones, which the package sd-mecha lists."""

from __future__ import annotations

import functools
import re
from importlib.util import find_spec

import pytest
import torch

from bench.lib.diffusion_shapes import UNET, UNets, listed_shapes, unet_shapes
from fastmatch.checkpoint.diffusion.components import find_components
from fastmatch.checkpoint.diffusion.single_file import trace_file
from fastmatch.spec import PermutationSpec

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
if find_spec("sd_mecha") is None:  # its lists of names are read; to import it takes seconds
    pytest.skip("could not find 'sd_mecha'", allow_module_level=True)

TINY_UNET = {
    "block_out_channels": (64, 128), "cross_attention_dim": 32, "attention_head_dim": (1, 2), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
}  # fmt: skip
"""What diffusers calls the UNet of the file ``"tiny"``."""
UNETS = {
    "unet": UNets((1,), 1, 64, channels=32, multiples=(1,), linear=False, layers=1),
    "tiny": UNets((0, 1), 1, 32, channels=64, multiples=(1, 2), layers=1),
    "sdxl": UNets((2,), 2, 2048, channels=128, multiples=(1,), added=1344, layers=1),
}
DEEP_UNETS = {
    "unet": UNets((1,), 1, 64, channels=32, multiples=(1,), linear=False, layers=1),
    "sd1": UNets((1, 0), 1, 64, channels=32, multiples=(1, 2), linear=False),
    "sdxl": UNets((0, 1, 2), 2, 2048, channels=64, multiples=(1, 2, 2), added=1344),
}
"""With two residual blocks of each resolution, as the real ones have."""
VAE_WIDTHS, DEEP_VAE_WIDTHS = (32, 64), (32, 64, 96, 96)
CLIP = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 16, "bos_token_id": 62, "eos_token_id": 63,
}  # fmt: skip


def _names(shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Name of a parameter of the module -> its name in a file that holds one network."""
    (found,) = find_components(shapes, "a file")
    return {name: found.prefix + source.parts[0].name for name, source in found.layout.items()}


@functools.cache
def names_in_file(kind: str) -> dict[str, str]:
    """Name of a parameter of the UNet of diffusers -> its name in a small file."""
    return _names({name: shape for name, shape in small_shapes(kind).items() if name.startswith(UNET)})


def small_shapes(kind: str = "sd1", *, deep: bool = False) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a small file: UNet, VAE and text encoder of ``"sd1"``, or a UNet: ``"unet"``, ``"tiny"``, ``"sdxl"``.

    ``deep``: with as many residual blocks as real files have; to trace and prove it takes several times as long.
    """
    unet = DEEP_UNETS[kind] if deep else UNETS["unet" if kind == "sd1" else kind]
    shapes = {UNET + name: shape for name, shape in unet_shapes(unet).items()}
    return shapes | _vae_and_clip(deep) if kind == "sd1" else shapes


@functools.cache
def _vae_and_clip(deep: bool) -> dict[str, tuple[int, ...]]:
    widths = DEEP_VAE_WIDTHS if deep else VAE_WIDTHS
    levels = len(widths)
    vae = {
        "block_out_channels": widths, "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels, "layers_per_block": 2 if deep else 1,
    }  # fmt: skip
    with torch.device("meta"):
        modules = {
            "vae": diffusers.AutoencoderKL(**vae),
            "clip_l": transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)),
        }
    shapes = {}
    for component, module in modules.items():
        names = _names(listed_shapes("sd1-ldm", component))
        for parameter, tensor in module.state_dict().items():
            # Files count the decoder's levels from its end: the last of four have the names of the last of two.
            real = re.sub(
                r"(?<=decoder\.up_blocks\.)\d+", lambda level: str(int(level[0]) + 4 - levels), parameter
            )
            if real in names:
                is_kernel = re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", names[real])
                shapes[names[real]] = (*tensor.shape, 1, 1) if is_kernel else tuple(tensor.shape)
    return shapes


def small_spec(kind: str = "sd1", *, deep: bool = False) -> PermutationSpec:
    """The spec of a small file, traced once in a process."""
    return _traced(kind, deep)


@functools.cache
def _traced(kind: str, deep: bool) -> PermutationSpec:
    return trace_file(small_shapes(kind, deep=deep), kind)


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
