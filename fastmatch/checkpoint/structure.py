"""The permutation groups of a checkpoint from its config.json, without its weights.

The model is built at its real size, so that nothing has to be scaled or bound afterwards, but no weight takes
memory: entry (i, j) of every large parameter is entry i + j of one short random vector, a view with overlapping
strides. The tracer's rules run on real values that way (uniform constants, routers), which fake tensors would not
allow; buffers are made as the model makes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmatch._internal.states import State
from fastmatch.checkpoint.reader import CONFIG, read_json
from fastmatch.spec import PermutationSpec

__all__ = ["bind", "build_empty", "compared", "config_inputs", "trace_config"]

BATCH, LENGTH = 2, 16


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter registered inside goes to the meta device, buffers stay."""
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            meta = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
            module._parameters[name] = meta

    nn.Module.register_parameter = registered  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_empty(directory: str | Path) -> nn.Module:
    """The model of a directory's config.json in eval mode: parameters on the meta device, buffers made.

    Raises:
        ImportError: transformers is not installed (the extra ``hf``).
        ValueError: the config names no model that transformers has.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("tracing a config needs transformers: pip install 'fastmatch[hf]'") from error
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the structure is traced from it")
    names = read_json(path).get("architectures") or []
    try:
        config = transformers.AutoConfig.from_pretrained(str(directory), local_files_only=True)
        kind: Any = getattr(transformers, names[0], None) if names else transformers.AutoModel
        if kind is None:
            raise ValueError(f"transformers has no class {names[0]!r}")
        build = kind.from_config if kind is transformers.AutoModel else kind._from_config
        with _parameters_on_meta():
            model = build(config, attn_implementation="eager")
    except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
        raise ValueError(f"{path}: no model can be built from it ({error})") from error
    model.config.use_cache = False
    if hasattr(model, "set_experts_implementation"):
        # The grouped product of several experts takes no float64, in which functions are compared.
        model.set_experts_implementation("eager")
    model.tie_weights()
    return model.eval().float()


def config_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Small random inputs for a model by its config: tokens, pictures, both, spectra or waves, and a decoder's tokens.

    Raises:
        ValueError: what the model takes is none of these.
    """
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)

    def tokens() -> torch.Tensor:
        return torch.randint(3, config.get_text_config().vocab_size, (BATCH, LENGTH), generator=generator)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, *shape, generator=generator)

    def pictures() -> torch.Tensor:
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 64)
        height, width = (size, size) if isinstance(size, int) else size
        return noise(vision.num_channels, height, width)

    main = getattr(model, "main_input_name", "input_ids")
    inputs: dict[str, torch.Tensor] = {}
    if main == "input_ids":
        inputs = {main: tokens()}
        # Two towers that are compared need both inputs; a language model that can see runs without pictures.
        if hasattr(model, "get_text_features") and hasattr(model, "get_image_features"):
            inputs["pixel_values"] = pictures()
    elif main == "pixel_values" and hasattr(getattr(config, "vision_config", config), "num_channels"):
        inputs = {main: pictures()}
    elif main == "input_features" and hasattr(config, "max_source_positions"):
        frames = 2 * config.max_source_positions  # a convolution of stride 2 halves them
        inputs = {main: noise(config.num_mel_bins, frames)}
    elif main == "input_values" and hasattr(config, "conv_stride"):
        samples = LENGTH
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            samples = (samples - 1) * stride + kernel
        inputs = {main: noise(samples)}
    if not inputs:
        raise ValueError(
            f"{CONFIG}: no example inputs are known for {type(model).__name__} ({main}); give a spec"
        )
    if (
        getattr(config, "is_encoder_decoder", False)
        and "decoder_input_ids" in signature(model.forward).parameters
    ):
        inputs["decoder_input_ids"] = tokens()
    return inputs


def _fill(model: nn.Module) -> None:
    """Puts overlapping views of short random vectors in the place of parameters on the meta device."""
    generator = torch.Generator().manual_seed(0)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.device.type != "meta":
                continue
            if id(parameter) not in made:
                vector = torch.randn(1 + sum(n - 1 for n in parameter.shape if n), generator=generator) * 0.02
                view = vector.as_strided(parameter.shape, (1,) * parameter.ndim)
                made[id(parameter)] = nn.Parameter(view, requires_grad=False)
            module._parameters[name] = made[id(parameter)]


def trace_config(directory: str | Path) -> PermutationSpec:
    """The spec of the model that a Hugging Face directory's config.json describes; no weight is read.

    Example:
        >>> spec = trace_config("Llama-3-8B")

    Raises:
        ImportError, FileNotFoundError, ValueError: see :func:`build_empty`.
    """
    model = build_empty(directory)
    inputs = config_inputs(model)
    _fill(model)
    return PermutationSpec.trace(model, (), kwargs=inputs, outputs=compared)


def compared(output: Any) -> list[str] | None:
    """Which outputs a checkpoint's users compare: the logits of a model with a head, all of one without.

    The hidden states that an encoder and decoder return beside the logits would hold the residual stream in place.
    """
    names = list(output) if isinstance(output, Mapping) else []
    return [name for name in names if name.startswith("logits")] or None


def bind(spec: PermutationSpec, state: State, argument: str) -> PermutationSpec:
    """The spec over the tensors that a checkpoint holds: the other names of tied parameters are left out.

    Raises:
        ValueError: a group's tensor is missing that is tied to none in the checkpoint, a shape differs, or
            the checkpoint has no tensor of the spec at all.
    """
    for name, shape in spec.shapes.items():
        if name in state and tuple(state[name].shape) != shape:
            raise ValueError(
                f"{argument}: tensor {name!r} has shape {tuple(state[name].shape)}, its config makes it {shape}"
            )
    groups = {}
    for group in spec.groups.values():
        kept = tuple(x for x in group.axes if x.parameter in state)
        places = {(replace(x, parameter=""), spec.shapes[x.parameter]) for x in kept}
        for axis in group.axes:
            # A tied parameter lies in the file once: its twin has the same axis, shape and group.
            if axis not in kept and (replace(axis, parameter=""), spec.shapes[axis.parameter]) not in places:
                raise ValueError(f"{argument}: has no tensor {axis.parameter!r}, which its config asks for")
        groups[group.name] = replace(group, axes=kept)
    shapes = {name: shape for name, shape in spec.shapes.items() if name in state}
    return replace(
        spec, groups=groups, shapes=shapes, pins=tuple(p for p in spec.pins if p.parameter in shapes)
    )
