"""The networks in one file: a UNet or a transformer, an autoencoder, text encoders, each found by the names of its tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from fastmatch.checkpoint.diffusion import configs
from fastmatch.checkpoint.diffusion.layout import Converted, Layout, Shapes
from fastmatch.checkpoint.structure import parameters_on_meta

__all__ = [
    "CONTROLNET", "KINDS", "UNUSED", "Component", "Kind", "build_component", "find_components", "has_networks", "has_role",
    "import_diffusers", "made_empty", "marked", "parameters_of",
]  # fmt: skip

BATCH, SIDE, TOKENS = 2, 8, 4

CONTROLNET = "controlnet"
"""The role of networks that are added to a UNet."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Kind:
    """A kind of network.

    Attributes:
        role: its name in a pipeline of diffusers.
        class_name: the class in diffusers or transformers.
        marker: the name of a tensor that every file of this kind has, after the prefix.
        build: makes the module from shapes (without prefix) and scale.
        convert: turns tensors (without prefix) into the module's parameters, given the module's config.
        call: runs the module; returns all outputs.
        inputs: makes the inputs of ``call`` for a module.
        fixed: sizes that customs of the class set, which a reduced model keeps.
        of_head: ends of names of tensors as long as a head, which a reduced model divides like the heads.
    """

    role: str
    class_name: str
    marker: str
    build: Callable[[Shapes, int], nn.Module]
    convert: Callable[[Tensors, Any], Mapping[str, torch.Tensor]]
    call: Callable[..., Any]
    inputs: Callable[[Any], tuple[torch.Tensor, ...]]
    fixed: tuple[int, ...] = ()
    of_head: tuple[str, ...] = ()


@dataclass(frozen=True)
class Component:
    """A network in a file.

    Attributes:
        kind: what it is.
        prefix: what the names of its tensors start with in the file.
        shapes: name in the file without the prefix -> shape.
        layout: name of a parameter of the module -> its source, in names without the prefix.
        is_module: the names are those of the module, whose own config says its sizes.
    """

    kind: Kind
    prefix: str
    shapes: dict[str, tuple[int, ...]]
    layout: Layout
    is_module: bool = False

    def __deepcopy__(self, memo: object) -> Component:
        return self  # nothing writes to it, and copies of a model that holds it would take half as long again


def find_components(shapes: Shapes, argument: str) -> list[Component]:
    """Return the networks in a file, by the names and shapes of its tensors.

    Raises:
        ImportError: diffusers is not installed (the extra ``diffusers``).
        ValueError: a network's tensors do not fit its architecture. The file and the tensor are named.
    """
    items = tuple(shapes.items())
    return [
        _component(kind, name.removesuffix(kind.marker), argument, items)
        for name in shapes
        for kind in KINDS
        if _is_marked(name, kind)
    ]


def has_networks(names: Iterable[str]) -> bool:
    """Whether a file holds a network of a diffusion model, by the names of its tensors."""
    return bool(marked(names))


def has_role(names: Iterable[str], role: str) -> bool:
    """Whether a file holds a network of this role, by the names of its tensors."""
    return any(_is_marked(name, kind) for name in names for kind in KINDS if kind.role == role)


def marked(names: Iterable[str]) -> set[str]:
    """Return the names by which networks are found in a file, one for each network."""
    return {name for name in names if any(_is_marked(name, kind) for kind in KINDS)}


def _is_marked(name: str, kind: Kind) -> bool:
    return name == kind.marker or name.endswith("." + kind.marker)


# Kept, because a file is asked for its networks when it is named, traced, proved and written.
@functools.lru_cache(maxsize=16)
def _component(kind: Kind, prefix: str, argument: str, shapes: tuple[tuple[str, Any], ...]) -> Component:
    own = {name.removeprefix(prefix): tuple(shape) for name, shape in shapes if name.startswith(prefix)}
    if not prefix:
        own = {name: shape for name, shape in own.items() if not name.startswith(OTHERS)}
    own = {name: shape for name, shape in own.items() if not name.endswith(UNUSED)}
    try:
        module: Any = kind.build(own, 1)
        found = Converted(own, lambda tensors: kind.convert(tensors, module.config))
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{argument}: tensors {prefix + kind.marker!r} and others look like a {kind.role}, but not like one that "
            f"is known ({error})"
        ) from error
    parameters = parameters_of(module)
    missing = [name for name in parameters if name not in found.results and name.endswith(OPTIONAL)]
    layout = found.layout({k: v for k, v in parameters.items() if k not in missing}, argument)
    used: dict[str, int] = {}
    for source in layout.values():
        for part in source.parts:
            used[part.name] = used.get(part.name, 0) + part.stop - part.start
    for name, shape in own.items():
        if used.get(name, 0) != (shape[0] if shape else 1):
            raise ValueError(
                f"{argument}: the architecture of its {kind.role} has no place for tensor {prefix + name!r}"
            )
    return Component(kind, prefix, own, layout)


def parameters_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's parameters and saved buffers; a tied one under its first name."""
    found = module.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(found.items())}
    return {name: tuple(tensor.shape) for name, tensor in found.items() if first[id(tensor)] == name}


def build_component(component: Component, shapes: Shapes, scale: int) -> nn.Module:
    """Return the module for shapes like the component's, in eval mode and with its parameters on the meta device."""
    return component.kind.build(shapes, scale)


def made_empty(make: Callable[[], nn.Module]) -> nn.Module:
    """Return what ``make`` returns in eval mode, with its parameters on the meta device.

    So are its buffers, if files have all of them: the table of positions of SD3.5 would take gigabytes while it is computed.
    """
    with torch.device("meta"):
        module = make()
    saved = module.state_dict()
    if any(name not in saved for name, _ in module.named_buffers()):
        with parameters_on_meta():
            module = make()
    module = module.eval().requires_grad_(False)
    if hasattr(module, "tie_weights"):
        module.tie_weights()  # type: ignore[operator]
    return module


def import_diffusers() -> Any:
    """Return diffusers, or raise an ImportError that says how to install it."""
    try:
        import diffusers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "diffusion checkpoints need diffusers: pip install 'fastmatch[diffusers]'"
        ) from error
    return diffusers


# parameters: the fields of a Kind
def _of_diffusers(
    role: str,
    class_name: str,
    marker: str,
    config: Callable[[Shapes, int], dict[str, Any]],
    convert: Callable[[Tensors, Any], Mapping[str, torch.Tensor]],
    call: Callable[..., Any],
    inputs: Callable[[Any], tuple[torch.Tensor, ...]],
    fixed: tuple[int, ...] = (),
    of_head: tuple[str, ...] = (),
) -> Kind:
    def build(shapes: Shapes, scale: int) -> nn.Module:
        kind = getattr(import_diffusers(), class_name)
        return made_empty(lambda: kind(**config(shapes, scale)))

    return Kind(role, class_name, marker, build, convert, call, inputs, fixed, of_head)


def _converter(name: str, prefix: str = "") -> Callable[[Tensors, Any], Mapping[str, torch.Tensor]]:
    """Return a converter of diffusers by its name; it gets names with ``prefix``."""

    def convert(tensors: Tensors, config: Any) -> Mapping[str, torch.Tensor]:
        from diffusers.loaders import single_file_utils  # pyright: ignore[reportMissingImports]

        return getattr(single_file_utils, name)({prefix + k: v for k, v in tensors.items()}, config=config)

    return convert


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(sum(shape)), device="cpu")


def _unet_call(model: Any, sample: torch.Tensor, text: torch.Tensor, *more: torch.Tensor) -> Any:
    return model(sample, _times(), text, **_added(model.config, more), return_dict=False)


def _times() -> torch.Tensor:
    return torch.tensor([3, 700], device="cpu")


def _added(config: Any, more: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """Return the arguments of a UNet or ControlNet besides the picture, the time and the prompt."""
    if config.addition_embed_type == "text_time":
        return {"added_cond_kwargs": {"text_embeds": more[0], "time_ids": more[1]}}
    return {"class_labels": more[0] if more else None}


def _unet_inputs(config: Any) -> tuple[torch.Tensor, ...]:
    inputs = [_noise(config.in_channels, SIDE, SIDE), _noise(TOKENS, config.cross_attention_dim)]
    width = config.projection_class_embeddings_input_dim
    if config.addition_embed_type == "text_time":
        numbers = configs.TIME_NUMBERS
        return *inputs, _noise(width - numbers * config.addition_time_embed_dim), _noise(numbers)
    return (*inputs, _noise(width)) if config.class_embed_type else tuple(inputs)


def _controlnet_call(
    model: Any, picture: torch.Tensor, sample: torch.Tensor, text: torch.Tensor, *more: torch.Tensor
) -> Any:
    return model(sample, _times(), text, picture, **_added(model.config, more), return_dict=False)


def _controlnet_inputs(config: Any) -> tuple[torch.Tensor, ...]:
    return _noise(config.conditioning_channels, 8 * SIDE, 8 * SIDE), *_unet_inputs(config)


def _autoencoder_call(model: Any, image: torch.Tensor, latent: torch.Tensor) -> Any:
    return model.encode(image).latent_dist.parameters, model.decode(latent).sample


def _autoencoder_inputs(config: Any) -> tuple[torch.Tensor, ...]:
    shrink = 2 ** (len(config.block_out_channels) - 1)
    return _noise(config.in_channels, 2 * shrink, 2 * shrink), _noise(config.latent_channels, 2, 2)


def _clip(shapes: Shapes, scale: int) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    plain = _plain_clip(shapes)
    kind = CLIPTextModelWithProjection if "text_projection.weight" in plain else CLIPTextModel
    return made_empty(
        lambda: kind._from_config(CLIPTextConfig(**configs.clip(plain, scale)), attn_implementation="eager")
    )


def _plain_clip(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return tensors or shapes of CLIP by names without what some versions have before them."""
    return {
        name.removeprefix("transformer.").removeprefix("text_model."): value
        for name, value in tensors.items()
    }


def _convert_clip(tensors: Tensors, config: Any) -> Mapping[str, torch.Tensor]:
    """Return both namings of transformers: modules with and without ``text_model.``."""
    plain = _plain_clip(tensors)
    return {**plain, **{f"text_model.{name}": tensor for name, tensor in plain.items()}}


def _open_clip(shapes: Shapes, scale: int) -> nn.Module:
    headers = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    width = shapes["token_embedding.weight"][1]
    found = _convert_open_clip(headers, SimpleNamespace(hidden_size=width))
    return _clip({name: tuple(tensor.shape) for name, tensor in found.items()}, scale)


def _convert_open_clip(tensors: Tensors, config: Any) -> Mapping[str, torch.Tensor]:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint  # pyright: ignore[reportMissingImports]

    # Without the prefix of Stable Diffusion 2, the converter keeps the last layer as well.
    found = convert_open_clip_checkpoint(SimpleNamespace(config=config), tensors, prefix="")
    return _convert_clip(found, config)


def _text_call(model: nn.Module, tokens: torch.Tensor) -> Any:
    # The residual stream after any layer can be read by a diffusion model: it keeps its order.
    found = model(input_ids=tokens)
    return found.last_hidden_state, getattr(found, "text_embeds", None)


def _text_inputs(config: Any) -> tuple[torch.Tensor, ...]:
    return (torch.randint(3, config.vocab_size, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0)),)


def _t5(shapes: Shapes, scale: int) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return made_empty(
        lambda: T5EncoderModel._from_config(
            T5Config(**configs.t5(shapes, scale)), attn_implementation="eager"
        )
    )


def _convert_t5(tensors: Tensors, config: Any) -> Mapping[str, torch.Tensor]:
    return tensors


def _sd3_call(model: nn.Module, sample: torch.Tensor, text: torch.Tensor, pooled: torch.Tensor) -> Any:
    return model(sample, text, pooled, _times(), return_dict=False)


def _sd3_inputs(config: Any) -> tuple[torch.Tensor, ...]:
    return (
        _noise(config.in_channels, SIDE, SIDE), _noise(TOKENS, config.joint_attention_dim), _noise(config.pooled_projection_dim),
    )  # fmt: skip


def _flux_call(model: Any, image: torch.Tensor, text: torch.Tensor, pooled: torch.Tensor) -> Any:
    guidance = image.new_ones(BATCH) if model.config.guidance_embeds else None
    places = torch.arange(3.0 * image.shape[1], device="cpu").reshape(-1, 3)
    return model(
        hidden_states=image, encoder_hidden_states=text, pooled_projections=pooled,
        timestep=torch.tensor([0.1, 0.7], device="cpu").to(image), img_ids=places, txt_ids=torch.zeros(text.shape[1], 3), guidance=guidance,
        return_dict=False,
    )  # fmt: skip


def _flux_inputs(config: Any) -> tuple[torch.Tensor, ...]:
    return (
        _noise(TOKENS, config.in_channels), _noise(TOKENS, config.joint_attention_dim), _noise(config.pooled_projection_dim),
    )  # fmt: skip


KINDS = (
    _of_diffusers("unet", "UNet2DConditionModel", "output_blocks.0.0.in_layers.0.weight", configs.unet,
                  _converter("convert_ldm_unet_checkpoint", "model.diffusion_model."), _unet_call, _unet_inputs),
    _of_diffusers(CONTROLNET, "ControlNetModel", "input_hint_block.0.weight", configs.controlnet,
                  _converter("convert_controlnet_checkpoint"), _controlnet_call, _controlnet_inputs),
    _of_diffusers("transformer", "SD3Transformer2DModel", "joint_blocks.0.x_block.attn.qkv.weight", configs.sd3,
                  _converter("convert_sd3_transformer_checkpoint_to_diffusers"), _sd3_call, _sd3_inputs, (64, 256),
                  of_head=("ln_q.weight", "ln_k.weight")),
    _of_diffusers("transformer", "FluxTransformer2DModel", "double_blocks.0.img_attn.qkv.weight", configs.flux,
                  _converter("convert_flux_transformer_checkpoint_to_diffusers"), _flux_call, _flux_inputs, (64, 256)),
    _of_diffusers("vae", "AutoencoderKL", "encoder.down.0.block.0.conv1.weight", configs.autoencoder,
                  _converter("convert_ldm_vae_checkpoint"), _autoencoder_call, _autoencoder_inputs),
    Kind("text_encoder", "CLIPTextModel", "text_model.embeddings.token_embedding.weight", _clip, _convert_clip,
         _text_call, _text_inputs),
    Kind("text_encoder", "CLIPTextModel", "transformer.embeddings.token_embedding.weight", _clip, _convert_clip,
         _text_call, _text_inputs),
    Kind("text_encoder", "CLIPTextModel", "transformer.resblocks.0.ln_1.weight", _open_clip, _convert_open_clip,
         _text_call, _text_inputs),
    Kind("text_encoder", "T5EncoderModel", "encoder.block.0.layer.0.SelfAttention.q.weight", _t5, _convert_t5,
         _text_call, _text_inputs, (64,)),
)  # fmt: skip
"""The networks that files have, with the names of CompVis, Stability, OpenAI and others."""

UNUSED = ("position_ids", "logit_scale")
"""Ends of names of tensors that no network reads."""

OPTIONAL = ("final_layer_norm.weight", "final_layer_norm.bias")
"""Ends of names of parameters that files may leave out, because the image model reads an earlier layer."""

OTHERS = (
    "model_ema.",
    "control_model.",
    "first_stage_model.",
    "cond_stage_model.",
    "conditioner.",
    "text_encoders.",
    "loss.",
)
