"""A small random model of every family of transformers, and inputs that it runs on.

Nothing here names a family: sizes are recognized by the names that configs share, and inputs by the names of
arguments. A family whose config cannot be made small in this way is left out, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from inspect import signature
from typing import Any

import torch
from torch import nn

__all__ = ["families", "inputs_of", "small_model"]

LARGEST = 30_000_000
"""Parameters above which a model is not small."""

LARGEST_PICTURE = 512
"""Smaller pictures are tried before those of more pixels a side: a model may make a token of every few."""

BATCH, LENGTH, VOCABULARY = 2, 12, 96

WAYS: tuple[str | int, ...] = ("narrow", "scaled", 16, 8, 4, "shallow")
"""How a config is made small, tried in turn: widths of a few units, a share of the widths, every width divided by one
number, fewer layers only."""

SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size.*|.*_vocab_size|codebook_size", VOCABULARY),
    (r"(num|n)_(key_value|kv)_(heads|head)|num_kv_heads|.*_key_value_heads", 2),
    (r"(.*_)?(num|n)_(.*_)?(heads?|attention_heads)|(.*_)?attention_heads|nhead|num_attention_groups", 4),
    (r"(.*_)?head_dim|d_kv|(.*_)?head_size|attention_head_size|kv_channels", 8),
    (r".*intermediate_size|.*ffn_dim|d_ff|n_inner|.*ffn_hidden_size|mlp_dim|dim_feedforward|(.*_)?feedforward_dim", 48),
    (r"(num|n)_(local_|routed_|total_)?experts|moe_num_experts|num_local_experts|n_routed_experts", 4),
    (r"(num|n)_(experts_per_tok|experts_per_token|activated_experts|group|topk_group|limited_groups)|topk_group|moe_topk|n_group|num_selected_experts", 2),
    (r"(.*_)?lora_rank|q_lora_rank|(.*_)?rank", 8),
    (r"max_position_embeddings|n_positions|max_seq_len(gth)?|max_target_positions|max_source_positions", 64),
    (r"hidden_size|d_model|n_embd|n_embed|dim|embed_dim|embedding_size|emb_dim|hidden_dim|.*_hidden_size|"
     r".*_embed_dim|projection_dim|.*_projection_dim|proj_dim|word_embed_proj_dim|.*_dim|.*_channels|.*_width|width|channels", 32),
)  # fmt: skip
"""Full names of whole-number settings -> a small value; the first that fits counts."""

LAYERS = re.compile(
    r"(?!.*feat_extract)(.*_)?(num|n)_(.*_)?(layers?|blocks|stages_layers)|(.*_)?layers|(.*_)?n_layers?|depth|num_hidden_groups|depths"
)
WIDTHS = re.compile(r"(.*_)?hidden_sizes|embed_dims?|hidden_dims?|.*channels|dims?")
DIVIDED = re.compile(
    r".*(dim|dims|size|sizes|width|channels|channel_list|hidden|features|filters|sections?|rank|d_model|d_ff|d_kv|d_inner|d_head|d_latents|n_embd|planes)"
    r"(_per_layer|_per_stage)?"
)
UNDIVIDED = re.compile(
    r".*(vocab|image|img|patch|kernel|window|crop|stride|position|max|batch|chunk|block|codebook|input|grid|pool|sample|type).*|"
    r"in_chan.*|num_channels"
)
KEPT = re.compile(
    r"num_channels|in_channels|out_channels|in_chans|input_channels|audio_channels|(.*_)?num_mel_bins|input_dim|"
    r"stem_channels|n_channels|conv_dim|.*kernel.*|.*stride.*|.*label.*|conv_pos.*"
)


def families() -> list[str]:
    """Return the model types that transformers has a model class for."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(MODEL_MAPPING_NAMES)


def small_model(name: str, seed: int) -> tuple[nn.Module, dict[str, torch.Tensor], Any]:
    """Return a small model of a family with random weights, in eval mode, inputs for it, and what it returns on them.

    Raises:
        ValueError: no small model can be built, or none runs on inputs that its arguments suggest.
    """
    reasons: list[str] = []
    for way in WAYS:
        try:
            model = _build(name, way, seed)
        except Exception as error:
            reasons.append(_line(error))
            continue
        for inputs in inputs_of(model, seed):
            try:
                return model, inputs, _output(model, inputs)
            except Exception as error:
                reasons.append(f"on {', '.join(inputs)}: {_line(error)}")
    raise ValueError(reasons[0] if reasons else "it has no inputs that its arguments suggest")


def _output(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
    """Return what a model returns; where plain attention gives no finite number, because it takes the mask as its opposite, with torch's."""
    with torch.no_grad():
        output = model(**inputs)
        first = next(iter(output.values())) if hasattr(output, "values") else output
        if isinstance(first, torch.Tensor) and not torch.isfinite(first).any():
            model.set_attn_implementation("sdpa")  # type: ignore[operator]
            output = model(**inputs)
    return output


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:160]


def _build(name: str, way: str | int, seed: int) -> nn.Module:
    import transformers

    config = transformers.CONFIG_MAPPING[name]()
    _shrink(config, way)
    with suppress(Exception):
        config.use_cache = False
    kind: Any = transformers.MODEL_MAPPING[type(config)]
    kind = kind[0] if isinstance(kind, tuple) else kind
    with torch.device("meta"):
        count = sum(p.numel() for p in kind(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters")
    torch.manual_seed(seed)
    try:
        model = kind._from_config(config, attn_implementation="eager")
    except Exception:
        model = kind(config)
    if hasattr(model, "set_experts_implementation"):
        with suppress(Exception):
            model.set_experts_implementation("eager")
    _randomize(model.eval().float(), seed)
    return model.requires_grad_(False)


def _shrink(config: Any, way: str | int) -> None:
    for part in _parts(config, set()):
        sizes = {}
        for key, value in list(vars(part).items()):
            found = _smaller(key, value, way)
            if found != value:
                sizes[key] = found
        for key, value in sizes.items():
            with suppress(Exception):  # a property that follows from others
                setattr(part, key, value)
        _repair(part)


def _parts(config: Any, seen: set[int]) -> Iterator[Any]:
    from transformers import PretrainedConfig

    if id(config) in seen:
        return
    seen.add(id(config))
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from _parts(value, seen)


def _smaller(key: str, value: Any, way: str | int) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, dict):
        return {k: _divided(k, v, way) if isinstance(way, int) else v for k, v in value.items()}
    if LAYERS.fullmatch(key):
        if isinstance(value, int):
            return min(value, 2)
        if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
            return type(value)(min(v, 1) for v in value)
    if isinstance(value, int) and key.endswith("token_id"):
        return min(value, VOCABULARY - 1)
    if isinstance(way, int) and not re.search(r"vocab_size|expert|topk|n_group", key):
        return _divided(key, value, way)
    if way == "shallow" or KEPT.fullmatch(key):
        return min(value, VOCABULARY) if key.endswith("vocab_size") else value
    if isinstance(value, int):
        for pattern, size in SIZES:
            if re.fullmatch(pattern, key):
                if way == "scaled" and size == 32:
                    return max(8, value // 16)
                return min(value, size)
    whole = isinstance(value, (list, tuple)) and all(type(v) is int for v in value)
    if whole and WIDTHS.fullmatch(key):
        return type(value)(max(8, v // 8) for v in value)
    return value


def _divided(key: str, value: Any, by: int) -> Any:
    """Divide a width, or a list of them; all by one number, so that what has to fit fits."""
    if not isinstance(key, str) or not DIVIDED.fullmatch(key) or UNDIVIDED.fullmatch(key):
        return value
    if type(value) is int:
        return value // by if value % by == 0 and value >= by else value
    if (
        isinstance(value, (list, tuple))
        and value
        and all(type(v) is int and v % by == 0 and v for v in value)
    ):
        return type(value)(v // by for v in value)
    return value


def _repair(part: Any) -> None:
    """Make lists as long as the number of layers, and sections of positions fit the heads."""
    rope = getattr(part, "rope_parameters", None)
    heads, width = getattr(part, "num_attention_heads", None), getattr(part, "hidden_size", None)
    if isinstance(rope, dict) and isinstance(heads, int) and isinstance(width, int):
        head = getattr(part, "head_dim", None) or width // heads
        half = int(head * rope.get("partial_rotary_factor", 1)) // 2
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]  # of time, height and width
    layers = getattr(part, "num_hidden_layers", None)
    if isinstance(layers, int):
        for key, value in list(vars(part).items()):
            if (
                isinstance(value, list)
                and len(value) > layers
                and re.search(r"layer.*types?|_types$|mlp_layer|.*_layers_block_type|pattern", key)
            ):
                with suppress(Exception):
                    setattr(part, key, value[:layers])


def _randomize(model: nn.Module, seed: int) -> None:
    """Set random weights that keep activations near one, so that a wrong move of any weight shows."""
    generator = torch.Generator().manual_seed(seed)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.copy_((0.0 if name.endswith("bias") else 1.0) + 0.2 * noise)
            else:
                fan_in = 1 if id(parameter) in tables else max(parameter[0].numel(), 1)
                parameter.copy_(noise / fan_in**0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))


def inputs_of(model: nn.Module, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield inputs that the arguments of a model's forward suggest, the likeliest first."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    names = set(signature(model.forward).parameters)
    main = getattr(model, "main_input_name", "input_ids")
    main = main if isinstance(main, str) else main[0]

    def find(*keys: str, default: int) -> int:
        for part in _parts(config, set()):
            for key in keys:
                value = getattr(part, key, None)
                if isinstance(value, (list, tuple)) and value:
                    value = value[0]
                if type(value) is int:
                    return value
        return default

    def tokens() -> torch.Tensor:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        size = getattr(text, "vocab_size", VOCABULARY)
        size = size if type(size) is int else VOCABULARY
        return torch.randint(3, max(4, min(size, 90)), (BATCH, LENGTH), generator=generator)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, *shape, generator=generator)

    def decoded(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if "decoder_input_ids" in names and getattr(config, "is_encoder_decoder", True):
            return {**inputs, "decoder_input_ids": tokens()}
        return inputs

    channels = find("num_channels", "in_channels", "in_chans", default=3)
    if "grid_thw" in names:  # patches in a row
        sides = find("temporal_patch_size", default=1) * find("patch_size", default=14) ** 2
        first = next(iter(signature(model.forward).parameters))
        patches = torch.randn(32, channels * sides, generator=generator)
        yield {first: patches, "grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}
    size = find("image_size", "img_size", "input_size", default=64)
    mels = find("num_mel_bins", "input_feat_per_channel", "feature_size", default=80)
    frames = 2 * find("max_source_positions", default=32)
    sizes = (size, 64, 224) if size <= LARGEST_PICTURE else (64, size, 224)
    pictures = [noise(channels, n, n) for n in dict.fromkeys(sizes)]
    pictures += [noise(find("num_frames", default=4), channels, n, n) for n in (size, 64)]
    text: dict[str, torch.Tensor] = {"input_ids": tokens()} if "input_ids" in names else {}
    if "bbox" in names:
        text["bbox"] = torch.randint(0, 60, (BATCH, LENGTH, 4), generator=generator).sort(-1)[0]
    if "pixel_values" in names and main != "pixel_values":
        both = [{**text, "pixel_values": p} for p in pictures[:2]]
    else:
        both = []
    if main == "input_ids" or (text and main not in names):
        if hasattr(model, "get_text_features") and hasattr(model, "get_image_features"):
            yield from both
        yield decoded(text)
        yield text
        yield from both
    for name in (
        [main]
        if main in names
        else [n for n in names if n in ("pixel_values", "hidden_states", "input_features", "input_values")]
    ):
        if name.startswith("pixel_values"):
            for picture in pictures:
                yield {name: picture}
                if text:
                    yield {**text, name: picture}
        elif name == "input_features":
            for shape in ((mels, frames), (frames, mels), (mels, 2 * LENGTH), (2 * LENGTH, mels)):
                yield decoded({name: noise(*shape)})
        elif name in ("input_values", "audio_values"):
            yield decoded({name: noise(2000)})
            yield {name: noise(1, 2000)}
            yield {name: noise(find("max_length", default=64), mels)}
        elif name in ("past_values", "past_time_series"):
            length = find("context_length", default=32)
            yield {name: noise(length, find("num_input_channels", default=1))}
        elif name in ("hidden_states", "inputs_embeds"):
            yield {name: noise(LENGTH, find("hidden_size", "d_model", default=32))}
    if text:
        yield text
