"""Trace the permutation groups of a checkpoint from its config.json, without reading its weights.

The model is built at its real size, so that the traced sizes are the checkpoint's, but its weights take no memory: they are
on the meta device, and the trace fills them (:mod:`fastmatch.spec.hollow`). The model creates its buffers as usual.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmatch._internal.json_files import read_json
from fastmatch._internal.states import State
from fastmatch._internal.words import error_line
from fastmatch.checkpoint.reader import CONFIG
from fastmatch.spec import PermutationSpec
from fastmatch.spec.unread import Unread

__all__ = [
    "bind", "build_empty", "build_from", "compared", "config_inputs", "config_of", "parameters_on_meta",
    "trace_config",
]  # fmt: skip

BATCH, LENGTH = 2, 16


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Move every parameter that is registered inside to the meta device. Buffers stay where they are."""
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
    """Build the model of a directory's config.json in eval mode, with its parameters on the meta device.

    Raises:
        ImportError: transformers is not installed (the extra ``hf``).
        FileNotFoundError: the directory has no config.json.
        ValueError: the config names no model of transformers.
    """
    return build_from(config_of(directory), directory, on_meta=True)


def config_of(directory: str | Path) -> Any:
    """Return the config of a directory; see :func:`build_empty` for the errors."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("tracing a config needs transformers: pip install 'fastmatch[hf]'") from error
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the structure is traced from it")
    text = read_json(path)
    _refuse_code(
        text,
        path,
        isinstance(text.get("model_type"), str) and text["model_type"] in transformers.CONFIG_MAPPING,
    )
    try:
        return transformers.AutoConfig.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # a config can hold anything
        raise ValueError(f"{path}: no model can be built from it ({error_line(error)})") from error


def _refuse_code(config: Mapping[str, Any], path: Path, is_known: bool) -> None:
    """Raise ValueError if a config names code in its folder that would have to run, because transformers has none."""
    if config.get("auto_map") and not is_known:
        raise ValueError(
            f"{path}: the model needs Python code from its folder (auto_map), which is never run; build it yourself and "
            "give --model, or a spec"
        )


def build_from(config: Any, directory: str | Path, *, on_meta: bool) -> nn.Module:
    """Build the model of a config in eval mode; ``on_meta``: with its parameters on the meta device."""
    import transformers

    path = Path(directory) / CONFIG
    text = read_json(path)
    names = text.get("architectures") or []
    name = names[0] if isinstance(names, list) and names else None
    if name is None:
        build, options = transformers.AutoModel.from_config, {"trust_remote_code": False}
    else:
        kind: Any = getattr(transformers, name, None) if isinstance(name, str) else None
        is_known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
        _refuse_code(text, path, is_known)
        if not is_known:
            raise ValueError(
                f"{path}: no model can be built from it (transformers has no model class {name!r})"
            )
        build, options = kind._from_config, {}
    try:
        with parameters_on_meta() if on_meta else nullcontext():
            model = build(config, attn_implementation="eager", **options)
    except ImportError:
        raise
    except Exception as error:  # a config can hold anything
        raise ValueError(f"{path}: no model can be built from it ({error_line(error)})") from error
    model.config.use_cache = False
    if hasattr(model, "set_experts_implementation"):
        # The grouped product of the experts does not support float64, the type in which functions are compared.
        model.set_experts_implementation("eager")
    model.tie_weights()
    return model.eval().float()


def config_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return small random inputs for a model, by its config.

    They are tokens, images, both, spectrograms or waveforms, and tokens for a decoder.

    Raises:
        ValueError: the model takes other inputs.
    """
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)

    def tokens() -> torch.Tensor:
        return torch.randint(
            3, config.get_text_config().vocab_size, (BATCH, LENGTH), generator=generator, device="cpu"
        )

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, *shape, generator=generator, device="cpu")

    def images() -> torch.Tensor:
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 64)
        height, width = (size, size) if isinstance(size, int) else size
        return noise(vision.num_channels, height, width)

    main = getattr(model, "main_input_name", "input_ids")
    inputs: dict[str, torch.Tensor] = {}
    if main == "input_ids":
        inputs = {main: tokens()}
        # A model that compares two towers needs both inputs. A vision-language model runs without images.
        if hasattr(model, "get_text_features") and hasattr(model, "get_image_features"):
            inputs["pixel_values"] = images()
    elif main == "pixel_values" and hasattr(getattr(config, "vision_config", config), "num_channels"):
        inputs = {main: images()}
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


def trace_config(directory: str | Path, *, unread: Unread = "refuse") -> PermutationSpec:
    """Trace the model that a Hugging Face directory's config.json describes. No weight is read.

    Example:
        >>> from fastmatch.checkpoint import trace_config
        >>> spec = trace_config("model-a")
        >>> max(group.size for group in spec.groups.values())
        24

    Args:
        directory: a folder with a config.json.
        unread: what to do about parameters that the model does not read on the inputs that follow from the config; see
            :meth:`fastmatch.PermutationSpec.trace`.

    Returns:
        The :class:`fastmatch.PermutationSpec` in the names of the model's parameters.

    Raises:
        ImportError: transformers is not installed (the extra ``hf``).
        FileNotFoundError: the directory has no config.json.
        ValueError: the config names no model of transformers, no example inputs are known for the model, or it does not
            read parameters that could share a group (a tower for inputs of another kind).
    """
    model = build_empty(directory)
    return PermutationSpec.trace(model, (), kwargs=config_inputs(model), outputs=compared, unread=unread)


def compared(output: Any) -> list[str] | None:
    """Return the names of the outputs that must not change: the logits of a model with a head, otherwise None for all.

    Encoders and decoders also return hidden states. Keeping those would pin the residual stream.
    """
    names = list(output) if isinstance(output, Mapping) else []
    return [name for name in names if name.startswith("logits")] or None


def bind(spec: PermutationSpec, state: State, argument: str) -> PermutationSpec:
    """Restrict a spec to the tensors that a checkpoint holds: a tied parameter is kept under one of its names.

    Args:
        spec: the spec, traced from the config.
        state: the checkpoint's tensors. Only the shapes are read.
        argument: the name of the checkpoint in errors.

    Raises:
        ValueError: a shape differs, or a tensor of a group is missing and is not tied to a tensor of the checkpoint.
    """
    for name, shape in spec.shapes.items():
        if name in state and tuple(state[name].shape) != shape:
            raise ValueError(
                f"{argument}: tensor {name!r} has shape {tuple(state[name].shape)}, its structure has {shape}"
            )
    groups = {}
    for group in spec.groups.values():
        kept = tuple(x for x in group.axes if x.parameter in state)
        places = {(replace(x, parameter=""), spec.shapes[x.parameter]) for x in kept}
        for axis in group.axes:
            # A tied parameter is in the file once. Its other name has the same axis, shape and group.
            if axis not in kept and (replace(axis, parameter=""), spec.shapes[axis.parameter]) not in places:
                raise ValueError(
                    f"{argument}: has no tensor {axis.parameter!r}, which its structure requires"
                )
        groups[group.name] = replace(group, axes=kept)
    shapes = {name: shape for name, shape in spec.shapes.items() if name in state}
    return replace(
        spec, groups=groups, shapes=shapes, pins=tuple(p for p in spec.pins if p.parameter in shapes)
    )
