"""Names and shapes of the files of diffusion models: those that sd-mecha lists, and others of the same families."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

__all__ = ["FAMILIES", "UNets", "listed_shapes", "sd35_shapes", "shapes_of", "unet_shapes"]

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

UNET = "model.diffusion_model."


@cache
def listed_shapes(config: str, *components: str) -> Shapes:
    """Return the names and shapes of a file as the package sd-mecha lists them, without those that files may leave out.

    Args:
        config: such as ``"sd1-ldm"`` or ``"sdxl-sgm"``.
        components: such as ``"diffuser"``; every one by default.
    """
    import yaml

    found = find_spec("sd_mecha")  # without its import, which takes seconds
    if found is None or found.origin is None:
        raise ImportError(
            "the names in files of diffusion models are read from sd-mecha: pip install sd-mecha"
        )
    folder = Path(found.origin).parent / "extensions" / "builtin" / "model_configs"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    tables = yaml.load((folder / f"{config}.yaml").read_text(), loader)["components"]
    return {
        name: tuple(entry["shape"])
        for component in components or tables
        for name, entry in tables[component].items()
        if not entry.get("optional")
    }


@dataclass(frozen=True)
class UNets:
    """A UNet of Stable Diffusion.

    Attributes:
        depths: transformer blocks in each layer of every resolution.
        middle: transformer blocks in the middle.
        context: width of the prompt's embedding.
        channels: of the first resolution.
        multiples: of ``channels`` in every resolution.
        inputs: channels of the input.
        added: width of the added condition; 0 for none.
        linear: the projections of the transformers are linear layers, not convolutions.
        layers: residual blocks of each resolution on the way down; one more on the way up.
    """

    depths: tuple[int, ...]
    middle: int
    context: int
    channels: int = 320
    multiples: tuple[int, ...] = (1, 2, 4, 4)
    inputs: int = 4
    added: int = 0
    linear: bool = True
    layers: int = 2


def unet_shapes(unet: UNets) -> Shapes:
    """Return the names of CompVis and Stability, without a prefix."""
    found: Shapes = {}
    time = 4 * unet.channels

    def add(name: str, *shape: int, bias: bool = True) -> None:
        found[f"{name}.weight"] = shape
        if bias:
            found[f"{name}.bias"] = shape[:1]

    def residual(name: str, inputs: int, outputs: int) -> None:
        add(f"{name}.in_layers.0", inputs)
        add(f"{name}.in_layers.2", outputs, inputs, 3, 3)
        add(f"{name}.emb_layers.1", outputs, time)
        add(f"{name}.out_layers.0", outputs)
        add(f"{name}.out_layers.3", outputs, outputs, 3, 3)
        if inputs != outputs:
            add(f"{name}.skip_connection", outputs, inputs, 1, 1)

    def transformer(name: str, width: int, depth: int) -> None:
        add(f"{name}.norm", width)
        for end in ("in", "out"):
            add(f"{name}.proj_{end}", width, width, *(() if unet.linear else (1, 1)))
        for k in range(depth):
            block = f"{name}.transformer_blocks.{k}"
            for attention, source in (("attn1", width), ("attn2", unet.context)):
                add(f"{block}.{attention}.to_q", width, width, bias=False)
                add(f"{block}.{attention}.to_k", width, source, bias=False)
                add(f"{block}.{attention}.to_v", width, source, bias=False)
                add(f"{block}.{attention}.to_out.0", width, width)
            add(f"{block}.ff.net.0.proj", 8 * width, width)
            add(f"{block}.ff.net.2", width, 4 * width)
            for norm in ("norm1", "norm2", "norm3"):
                add(f"{block}.{norm}", width)

    add("time_embed.0", time, unet.channels)
    add("time_embed.2", time, time)
    if unet.added:
        add("label_emb.0.0", time, unet.added)
        add("label_emb.0.2", time, time)
    add("input_blocks.0.0", unet.channels, unet.inputs, 3, 3)
    width, skips, index, last = unet.channels, [unet.channels], 1, len(unet.multiples) - 1
    for level, (multiple, depth) in enumerate(zip(unet.multiples, unet.depths, strict=True)):
        for _ in range(unet.layers):
            residual(f"input_blocks.{index}.0", width, multiple * unet.channels)
            width = multiple * unet.channels
            if depth:
                transformer(f"input_blocks.{index}.1", width, depth)
            skips.append(width)
            index += 1
        if level < last:
            add(f"input_blocks.{index}.0.op", width, width, 3, 3)
            skips.append(width)
            index += 1
    residual("middle_block.0", width, width)
    transformer("middle_block.1", width, unet.middle)
    residual("middle_block.2", width, width)
    index = 0
    for level in range(last, -1, -1):
        for layer in range(unet.layers + 1):
            residual(f"output_blocks.{index}.0", width + skips.pop(), unet.multiples[level] * unet.channels)
            width = unet.multiples[level] * unet.channels
            if unet.depths[level]:
                transformer(f"output_blocks.{index}.1", width, unet.depths[level])
            if level and layer == unet.layers:
                add(f"output_blocks.{index}.{2 if unet.depths[level] else 1}.conv", width, width, 3, 3)
            index += 1
    add("out.0", width)
    add("out.2", 4, width, 3, 3)
    return found


SD1 = UNets((1, 1, 1, 0), 1, 768, linear=False)
SD2 = UNets((1, 1, 1, 0), 1, 1024)
SDXL = UNets((0, 2, 10), 10, 2048, multiples=(1, 2, 4), added=2816)
REFINER = UNets((0, 4, 4, 0), 4, 1280, channels=384, added=2560)


def _with_unet(unet: UNets, rest: Shapes) -> Shapes:
    return {**{UNET + name: shape for name, shape in unet_shapes(unet).items()}, **rest}


def _renumbered(shapes: Shapes, pattern: str, count: int) -> Iterator[tuple[str, Shape]]:
    """Yield tensors with as many numbered layers as ``count``: those there are, or the first one again and again."""
    expression = re.compile(pattern)
    for name, shape in shapes.items():
        match = expression.match(name)
        if match is None:
            yield name, shape
        elif int(match[1]) == 0:
            for k in range(count):
                yield f"{name[: match.start(1)]}{k}{name[match.end(1) :]}", shape


def _open_clip(prefix: str, width: int, layers: int) -> Shapes:
    """Return a text encoder of OpenCLIP, after the names of the one in SDXL, whose last layer files leave out."""
    base = "conditioner.embedders.1.model."
    known = {name.removeprefix(base): s for name, s in listed_shapes("sdxl-sgm", "clip_g").items()}
    known |= {"ln_final.weight": (1280,), "ln_final.bias": (1280,), "text_projection": (1280, 1280)}
    named = _renumbered(known, r"transformer\.resblocks\.(\d+)\.", layers)
    return {prefix + n: tuple(d * width // 1280 if d % 1280 == 0 else d for d in s) for n, s in named}


def sd35_shapes(width: int, layers: int, side: int, double: int) -> Shapes:
    """Return the transformer of Stable Diffusion 3.5, after the names of the one of 3.

    Args:
        width: of the residual stream.
        layers: joint blocks.
        side: of the square of positions.
        double: blocks, the first ones, that have a second attention of the picture with itself.
    """
    known = listed_shapes("sd3-comfyui", "diffuser")
    last = max(int(m[1]) for n in known if (m := re.match(rf"{re.escape(UNET)}joint_blocks\.(\d+)\.", n)))
    pattern = rf"{re.escape(UNET)}joint_blocks\.(\d+)\."
    ends = {
        n.replace(f".{last}.", f".{layers - 1}.", 1): s
        for n, s in known.items()
        if f"joint_blocks.{last}." in n
    }
    body = dict(
        _renumbered({n: s for n, s in known.items() if f"joint_blocks.{last}." not in n}, pattern, layers - 1)
    )
    shapes = {
        n: tuple(d // 1536 * width if d % 1536 == 0 else d for d in s) for n, s in {**body, **ends}.items()
    }
    shapes[UNET + "pos_embed"] = (1, side * side, width)
    for k in range(layers):
        block = f"{UNET}joint_blocks.{k}."
        for part in ("context_block", "x_block"):
            shapes |= {f"{block}{part}.attn.ln_{x}.weight": (64,) for x in "qk"}
        if k < double:
            shapes[f"{block}x_block.adaLN_modulation.1.weight"] = (9 * width, width)
            shapes[f"{block}x_block.adaLN_modulation.1.bias"] = (9 * width,)
            second = f"{block}x_block.attn2."
            shapes |= {f"{second}ln_{x}.weight": (64,) for x in "qk"}
            shapes |= {second + "qkv.weight": (3 * width, width), second + "qkv.bias": (3 * width,)}
            shapes |= {second + "proj.weight": (width, width), second + "proj.bias": (width,)}
    return shapes


def _schnell() -> Shapes:
    return {n: s for n, s in listed_shapes("flux-flux").items() if "guidance_in." not in n}


SD1_REST = ("sd1-ldm", "vae", "clip_l")
SD3_REST = ("sd3-comfyui", "vae", "clip_l", "clip_g", "t5xxl")

FAMILIES: dict[str, Callable[[], Shapes]] = {
    "SD 1.5": lambda: listed_shapes("sd1-ldm"),
    "SD 1.5 inpainting": lambda: _with_unet(replace(SD1, inputs=9), listed_shapes(*SD1_REST)),
    "pix2pix": lambda: _with_unet(replace(SD1, inputs=8), listed_shapes(*SD1_REST)),
    "SD 2.x": lambda: _with_unet(SD2, listed_shapes("sd1-ldm", "vae") | _open_clip("cond_stage_model.model.", 1024, 24)),
    "SD 2 inpainting": lambda: _with_unet(
        replace(SD2, inputs=9), listed_shapes("sd1-ldm", "vae") | _open_clip("cond_stage_model.model.", 1024, 24)
    ),
    "SDXL": lambda: listed_shapes("sdxl-sgm"),
    "SDXL refiner": lambda: _with_unet(
        REFINER, listed_shapes("sdxl-sgm", "vae") | _open_clip("conditioner.embedders.0.model.", 1280, 32)
    ),
    "SD 3": lambda: listed_shapes("sd3-comfyui"),
    "SD 3.5 medium": lambda: sd35_shapes(1536, 24, 384, 13) | listed_shapes(*SD3_REST),
    "SD 3.5 large": lambda: sd35_shapes(2432, 38, 192, 0) | listed_shapes(*SD3_REST),
    "Flux dev": lambda: listed_shapes("flux-flux"),
    "Flux schnell": _schnell,
}  # fmt: skip
"""Name of a model -> what makes the names and shapes of its file."""


def shapes_of(model: str) -> Shapes:
    """Return the names and shapes of one of :data:`FAMILIES`."""
    return dict(FAMILIES[model]())
