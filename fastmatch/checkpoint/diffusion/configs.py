"""Configurations of diffusion models, read off the names and shapes in a file.

Everything but the size of a head and of a group norm follows from shapes. These two are customs of the architecture. Each
function takes ``scale``, by which the customary sizes are divided for a reduced model.
"""

from __future__ import annotations

import math
import re
from typing import Any

from fastmatch.checkpoint.diffusion.layout import Shapes

__all__ = ["autoencoder", "clip", "controlnet", "flux", "sd3", "t5", "unet"]

NORM_GROUPS, HEAD, TIME_CHANNELS, SD1_HEADS = 32, 64, 256, 8
TIME_NUMBERS = 5
"""Numbers beside the pooled text that SDXL's refiner is given. SDXL has six, but only their sum with the text has a shape."""


def unet(shapes: Shapes, scale: int = 1) -> dict[str, Any]:
    """Return the config of a UNet2DConditionModel for a UNet with CompVis names: Stable Diffusion 1, 2 and XL."""
    widths, depths, layers = _unet_levels(shapes)
    middle = _count(shapes, r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    attention = "middle_block.1."
    is_linear = len(shapes[attention + "proj_in.weight"]) == 2
    context = shapes[attention + "transformer_blocks.0.attn2.to_k.weight"][1]
    config: dict[str, Any] = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if n else "DownBlock2D" for n in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if n else "UpBlock2D" for n in reversed(depths)],
        "transformer_layers_per_block": [n or middle for n in depths],
        "cross_attention_dim": context,
        "use_linear_projection": is_linear,
        # The class takes the number of heads under this name.
        "attention_head_dim": [n * scale // HEAD for n in widths] if is_linear else SD1_HEADS,
        "norm_num_groups": NORM_GROUPS // scale,
    }
    if "label_emb.0.0.weight" in shapes:
        width = shapes["label_emb.0.0.weight"][1]
        config["projection_class_embeddings_input_dim"] = width
        if context * scale in (2048, 1280):
            config |= {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": TIME_CHANNELS // scale,
            }
        else:
            config["class_embed_type"] = "projection"
    return config


def controlnet(shapes: Shapes, scale: int = 1) -> dict[str, Any]:
    """Return the config of a ControlNetModel with CompVis names: the way down of a UNet, and convolutions of the picture that it is given."""
    config = unet({**shapes, "out.2.weight": (0,)}, scale)
    for key in ("out_channels", "up_block_types"):
        del config[key]
    first, *others = (shapes[f"input_hint_block.{k}.weight"] for k in (0, 4, 8, 12))
    return config | {
        "conditioning_channels": first[1],
        "conditioning_embedding_out_channels": (first[0], *(shape[0] for shape in others)),
    }


def _unet_levels(shapes: Shapes) -> tuple[list[int], list[int], int]:
    """Return channels and depth of the transformers (0 for none) of every resolution, and the layers of each."""
    widths, depths, layers, index = [], [], 0, 1
    while f"input_blocks.{index}.0.in_layers.2.weight" in shapes:
        layers = width = depth = 0
        while f"input_blocks.{index}.0.in_layers.2.weight" in shapes:
            width = shapes[f"input_blocks.{index}.0.in_layers.2.weight"][0]
            depth = _count(shapes, rf"input_blocks\.{index}\.1\.transformer_blocks\.(\d+)\.")
            layers, index = layers + 1, index + 1
        widths.append(width)
        depths.append(depth)
        index += 1  # the downsampling, or the end
    return widths, depths, layers


def autoencoder(shapes: Shapes, scale: int = 1) -> dict[str, Any]:
    """Return the config of an AutoencoderKL with CompVis names."""
    levels = _count(shapes, r"encoder\.down\.(\d+)\.")
    widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": widths,
        "layers_per_block": _count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": NORM_GROUPS // scale,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def clip(shapes: Shapes, scale: int = 1) -> dict[str, Any]:
    """Return the config of a CLIPTextModel for names of transformers without ``text_model.``."""
    words, width = shapes["embeddings.token_embedding.weight"]
    projection = shapes.get("text_projection.weight", (width,))
    return {
        "vocab_size": words,
        "hidden_size": width,
        "projection_dim": projection[0],
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": width * scale // HEAD,
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
    }


def t5(shapes: Shapes, scale: int = 1) -> dict[str, Any]:
    """Return the config of a T5EncoderModel; nothing in it depends on the scale."""
    attention = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = shapes[attention + "relative_attention_bias.weight"]
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_1.weight" in shapes
    return {
        "vocab_size": shapes["shared.weight"][0],
        "d_model": shapes["shared.weight"][1],
        "d_kv": shapes[attention + "q.weight"][0] // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wo.weight"][1],
        "num_layers": _count(shapes, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }


def sd3(shapes: Shapes, scale: int = 1) -> dict[str, Any]:
    """Return the config of an SD3Transformer2DModel for a file of Stable Diffusion 3 or 3.5."""
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    double = [
        i
        for i in range(_count(shapes, r"joint_blocks\.(\d+)\."))
        if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes
    ]
    return {
        "in_channels": channels,
        "patch_size": patch,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "num_layers": _count(shapes, r"joint_blocks\.(\d+)\."),
        "attention_head_dim": HEAD // scale,
        "num_attention_heads": width * scale // HEAD,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": math.isqrt(shapes["pos_embed"][1]),
        "dual_attention_layers": tuple(double),
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in shapes else None,
    }


def flux(shapes: Shapes, scale: int = 1) -> dict[str, Any]:
    """Return the config of a FluxTransformer2DModel: dev or schnell."""
    (head,) = shapes["double_blocks.0.img_attn.norm.key_norm.scale"]
    width, channels = shapes["img_in.weight"]
    side = head // 16 * 7 // 2 * 2  # 16, 56 and 56 of 128
    return {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0],
        "num_layers": _count(shapes, r"double_blocks\.(\d+)\."),
        "num_single_layers": _count(shapes, r"single_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": (head - 2 * side, side, side),
    }


def _count(shapes: Shapes, pattern: str) -> int:
    """Return one more than the largest number that a pattern finds at the start of a name; 0 if it finds none."""
    expression = re.compile(pattern)
    return max((int(found[1]) + 1 for name in shapes if (found := expression.match(name))), default=0)
