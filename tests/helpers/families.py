"""Small random models of the architectures that people merge, and the units that must be found in each.

The axes of a family have different lengths where the architecture allows it, so that equal numbers do not hide a
mistake. Every weight is random, so that a wrong move of any weight changes the output.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from fastmatch.spec import PermutationSpec

BATCH, LENGTH, VOCABULARY, POSITIONS, CLASSES = 2, 7, 53, 31, 11
Inputs = dict[str, torch.Tensor]
Site = tuple[str, int]


def text(generator: torch.Generator) -> Inputs:
    return {"input_ids": torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)}


def pictures(size: int) -> Callable[[torch.Generator], Inputs]:
    return lambda g: {"pixel_values": torch.randn(BATCH, 3, size, size, generator=g, dtype=torch.float64)}


def pairs(generator: torch.Generator) -> Inputs:
    return {**text(generator), **pictures(12)(generator)}


def translations(generator: torch.Generator) -> Inputs:
    target = torch.randint(3, VOCABULARY, (BATCH, 5), generator=generator)
    return {**text(generator), "decoder_input_ids": target}


def spectra(generator: torch.Generator) -> Inputs:
    frames = torch.randn(BATCH, 10, 18, generator=generator, dtype=torch.float64)
    return {"input_features": frames, "decoder_input_ids": text(generator)["input_ids"]}


def waves(generator: torch.Generator) -> Inputs:
    return {"input_values": torch.randn(BATCH, 90, generator=generator, dtype=torch.float64)}


class Family:
    """A model class of transformers at small sizes, with its inputs."""

    def __init__(self, name: str, model: str, inputs: Callable[..., Inputs], **sizes: Any) -> None:
        self.name, self.inputs, self.sizes = name, inputs, sizes
        self.model = getattr(transformers, model)

    @property
    def attentions(self) -> tuple[str, ...]:
        """The implementations of attention that the class has."""
        return ("eager", "sdpa") if self.model._supports_sdpa else ("eager",)

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a head of keys and values."""
        return bool({"num_key_value_heads", "num_kv_heads"} & set(self.sizes))

    def build(self, seed: int, attention: str = "eager") -> nn.Module:
        """The model in float64 and eval mode, every weight random."""
        config = self.model.config_class(**self.sizes)
        config.use_cache = False
        # Experts one after the other: the grouped product of transformers takes no float64.
        model = self.model._from_config(config, attn_implementation=attention, experts_implementation="eager")
        randomize(model.double().eval(), seed)
        return model


def randomize(model: nn.Module, seed: int) -> None:
    """Set random weights that keep activations near one, so that none saturates or vanishes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                # Vectors are biases, or norm weights and scales, which work near 1.
                parameter.copy_((0.0 if name.endswith("bias") else 1.0) + 0.3 * normal(parameter))
            else:
                fan_in = 1 if id(parameter) in tables else parameter[0].numel()
                parameter.copy_(normal(parameter) / fan_in**0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * normal(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=torch.float64))


TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6,
    "intermediate_size": 40, "max_position_embeddings": POSITIONS, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2}
VISION = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 40,
    "image_size": 12, "patch_size": 4, "num_labels": CLASSES,
}  # fmt: skip
STAGES = {"depths": [2, 2], "num_labels": CLASSES}
PAIR = {"vision_config": {**VISION, "hidden_size": 36, "num_attention_heads": 3, "intermediate_size": 44}}
PROJECTED = {"projection_dim": 14}
SEQUENCES = {
    **TEXT, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 6,
    "decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 44, "decoder_start_token_id": 2,
}  # fmt: skip
HALF_ROTARY = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
}
GEMMA = {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}

# fmt: off
FAMILIES = [
    Family("BERT", "BertForMaskedLM", text, **TEXT),
    Family("RoBERTa", "RobertaForMaskedLM", text, **TEXT),
    Family("DistilBERT", "DistilBertForMaskedLM", text, vocab_size=VOCABULARY, dim=24, n_heads=6, n_layers=2,
           hidden_dim=40, max_position_embeddings=POSITIONS),
    Family("ModernBERT", "ModernBertForMaskedLM", text, **TEXT, local_attention=4, cls_token_id=1, sep_token_id=2,
           layer_types=["full_attention", "sliding_attention"]),
    Family("ViT", "ViTForImageClassification", pictures(12), **VISION),
    Family("DeiT", "DeiTForImageClassification", pictures(12), **VISION),
    Family("BEiT", "BeitForImageClassification", pictures(12), **VISION, use_relative_position_bias=True),
    Family("Swin", "SwinForImageClassification", pictures(16), **STAGES, image_size=16, patch_size=2, embed_dim=12,
           num_heads=[2, 3], window_size=4),
    Family("ConvNeXt", "ConvNextForImageClassification", pictures(16), **STAGES, hidden_sizes=[6, 10], num_stages=2),
    Family("ResNet", "ResNetForImageClassification", pictures(16), **STAGES, embedding_size=8, hidden_sizes=[20, 28]),
    Family("RegNet", "RegNetForImageClassification", pictures(16), **STAGES, embedding_size=8, hidden_sizes=[12, 20],
           groups_width=4),
    Family("MobileNetV2", "MobileNetV2ForImageClassification", pictures(32), image_size=32, depth_multiplier=0.25,
           depth_divisible_by=2, min_depth=2, finegrained_output=False, num_labels=CLASSES),
    Family("EfficientNet", "EfficientNetForImageClassification", pictures(16), image_size=16, width_coefficient=0.25,
           depth_coefficient=1.0, depth_divisor=2, kernel_sizes=[3, 5], in_channels=[32, 24], out_channels=[24, 40],
           strides=[1, 2], num_block_repeats=[2, 2], expand_ratios=[1, 3], hidden_dim=320, num_labels=CLASSES),
    Family("CLIP", "CLIPModel", pairs, text_config={**TEXT, **PROJECTED}, **PROJECTED,
           vision_config={**PAIR["vision_config"], **PROJECTED}),
    Family("SigLIP", "SiglipModel", pairs, text_config={**TEXT, "projection_size": 36}, **PAIR),
    Family("GPT-2", "GPT2LMHeadModel", text, vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=6, n_inner=40,
           n_positions=POSITIONS, bos_token_id=1, eos_token_id=2),
    Family("GPT-NeoX", "GPTNeoXForCausalLM", text, **{**TEXT, "num_attention_heads": 3}, **HALF_ROTARY),
    Family("OPT", "OPTForCausalLM", text, **TEXT, ffn_dim=40, word_embed_proj_dim=24),
    Family("BLOOM", "BloomForCausalLM", text, vocab_size=VOCABULARY, hidden_size=24, n_layer=2, n_head=6),
    Family("Llama", "LlamaForCausalLM", text, **GROUPED, head_dim=8),
    Family("Mistral", "MistralForCausalLM", text, **GROUPED, head_dim=8, sliding_window=4),
    Family("Qwen2", "Qwen2ForCausalLM", text, **GROUPED),
    Family("Qwen3", "Qwen3ForCausalLM", text, **GROUPED, head_dim=8),
    Family("Gemma 2", "Gemma2ForCausalLM", text, **GEMMA),
    Family("Gemma 3", "Gemma3ForCausalLM", text, **GEMMA, layer_types=["sliding_attention", "full_attention"]),
    Family("Phi-3", "Phi3ForCausalLM", text, **GROUPED),
    Family("OLMo 2", "Olmo2ForCausalLM", text, **GROUPED),
    Family("Falcon", "FalconForCausalLM", text, **TEXT, ffn_hidden_size=40, num_kv_heads=2,
           new_decoder_architecture=True),
    Family("StableLM", "StableLmForCausalLM", text, **GROUPED, **HALF_ROTARY),
    Family("Mixtral", "MixtralForCausalLM", text, **GROUPED, head_dim=8, num_local_experts=5),
    Family("Qwen-MoE", "Qwen2MoeForCausalLM", text, **GROUPED, num_experts=5, num_experts_per_tok=2,
           moe_intermediate_size=12, shared_expert_intermediate_size=20),
    Family("DeepSeek-V2", "DeepseekV2ForCausalLM", text, **TEXT, q_lora_rank=10, kv_lora_rank=14, qk_nope_head_dim=4,
           qk_rope_head_dim=2, v_head_dim=3, n_routed_experts=5, num_experts_per_tok=2, n_shared_experts=1,
           first_k_dense_replace=1, moe_intermediate_size=12),
    Family("T5", "T5ForConditionalGeneration", translations, vocab_size=VOCABULARY, d_model=24, d_kv=5, d_ff=40,
           num_layers=2, num_heads=6, relative_attention_num_buckets=8, relative_attention_max_distance=16),
    Family("BART", "BartForConditionalGeneration", translations, **SEQUENCES),
    Family("Whisper", "WhisperForConditionalGeneration", spectra, **SEQUENCES, num_mel_bins=10,
           max_source_positions=9, max_target_positions=POSITIONS),
    Family("wav2vec 2.0", "Wav2Vec2ForCTC", waves, **TEXT, conv_dim=[8, 10, 12], conv_kernel=[5, 3, 2],
           conv_stride=[3, 2, 1], num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=3,
           mask_time_length=2),
    Family("Mamba", "MambaForCausalLM", text, vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2,
           state_size=5, time_step_rank=3),
]
# fmt: on

IDLE = r"\.(key|k_lin|k_proj)\.bias$|masked_spec_embed$"
"""Parameters that may have no effect: softmax cancels the bias of keys, and masks are only for training."""

SITES = {
    "hidden": (
        r"intermediate\.dense\.weight:0", r"intermediate_dense\.weight:0", r"ffn\.lin1\.weight:0", r"fc1\.weight:0",
        r"mlp\.Wo\.weight:1", r"mlp\.c_fc\.weight:1", r"dense_h_to_4h\.weight:0", r"\.wi\.weight:0",
        r"(mlp|shared_experts?)\.down_proj\.weight:1", r"experts\.down_proj:2", r"mixer\.out_proj\.weight:1",
        r"pwconv1\.weight:0", r"layer\.[01]\.convolution\.weight:0", r"attention\.0\.weight:0",
        r"expand_1x1\.convolution\.weight:0", r"expand_conv\.weight:0", r"squeeze_excite\.reduce\.weight:0",
        r"conv_layers\.\d\.conv\.weight:0", r"encoder\.conv1\.weight:0",
    ),
    "residual": (
        r"(word_embeddings|tok_embeddings|embed_tokens|wte|embed_in|shared|token_embedding)\.weight:1",
        r"backbone\.embeddings\.weight:1", r"patch_embeddings\.projection\.weight:0", r"patch_embedding\.weight:0",
        r"pwconv2\.weight:0", r"embedder\.convolution\.weight:0", r"layer\.[23]\.convolution\.weight:0",
        r"(reduce_1x1\.convolution|project_conv)\.weight:0", r"feature_projection\.projection\.weight:0",
    ),
    "output": (
        r"(attn|attention)\.(o_proj|out_proj|out_lin|Wo|dense|output\.dense)\.weight:1", r"attn\.c_proj\.weight:0",
        r"Attention\.o\.weight:1",
    ),
    "query": (
        r"(query|q_proj|q_lin|q_b_proj|Wqkv|query_key_value|qkv_proj|Attention\.q)\.weight:0", r"c_attn\.weight:1",
    ),
    "experts": (r"experts\.(gate_up_proj|down_proj):0", r"mlp\.gate\.weight:0"),
    "latent": (r"(q|kv)_a_layernorm\.weight:0", r"A_log:1", r"dt_proj\.weight:1"),
}  # fmt: skip
"""Where units of each kind are, as patterns of ``parameter:dim`` in the names that these architectures use.

``output`` is the axis at which the output projection of attention reads the heads, ``query`` the one that makes queries.
"""

KINDS = (
    "hidden", "residual", "heads", "KV groups", "query heads", "head channels", "query-key channels", "experts",
    "latent",
)  # fmt: skip
"""What a group may be made of; any other group is ``"other"``."""


def matches(role: str, site: Site) -> bool:
    return any(re.search(f"{pattern}$", f"{site[0]}:{site[1]}") for pattern in SITES[role])


def sites_of(family: Family, spec: PermutationSpec) -> dict[str, list[Site]]:
    """Return the places of every kind of unit that the family has."""
    every = [(name, d) for name, shape in spec.shapes.items() for d, n in enumerate(shape) if n > 1]
    found = {role: [site for site in every if matches(role, site)] for role in SITES}
    outputs, queries = found.pop("output"), found.pop("query")
    found |= {"head channels": outputs, "query-key channels": queries}
    found |= {"KV groups": outputs, "query heads": outputs} if family.grouped else {"heads": outputs}
    return {kind: found[kind] for kind in KINDS if found.get(kind)}


def groups_at(spec: PermutationSpec, kind: str, site: Site) -> list[str]:
    """The groups of one kind that move something at one of the kind's sites."""
    name, dim = site
    found = []
    for axis, group in spec.axes_of(name):
        if axis.dim != dim:
            continue
        axes, size = spec.groups[group].axes, spec.groups[group].size
        outermost = axis.start == 0 and size * axis.inner == spec.shapes[name][dim]
        fits = {
            "heads": outermost and axis.inner > 1,
            "KV groups": outermost and axis.inner > 1,
            "query heads": not outermost and axis.inner > 1,
            "head channels": axis.inner == 1,
            "query-key channels": axis.inner == 1
            and not any(matches("output", (a.parameter, a.dim)) for a in axes),
        }
        if fits.get(kind, True):
            found.append(group)
    return found


def missing(family: Family, spec: PermutationSpec) -> dict[str, list[Site]]:
    """The sites of every kind at which no group of that kind moves anything."""
    lacking = {
        kind: [site for site in sites if not groups_at(spec, kind, site)]
        for kind, sites in sites_of(family, spec).items()
    }
    return {kind: sites for kind, sites in lacking.items() if sites}


def kinds_of(family: Family, spec: PermutationSpec) -> dict[str, str]:
    """Group name -> its kind, the first of :data:`KINDS` that it is somewhere."""
    kinds = dict.fromkeys(spec.groups, "other")
    for kind, sites in reversed(sites_of(family, spec).items()):
        for site in sites:
            kinds |= dict.fromkeys(groups_at(spec, kind, site), kind)
    return kinds


ROTARY = "rotary positions tell the channels of queries and keys apart"
RETURNED = "the model returns the last hidden state of this stream"
UNMOVED = {
    **{(name, "query-key channels"): ROTARY for name in (
        "ModernBERT", "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3", "Phi-3", "OLMo 2", "Falcon",
        "Mixtral", "Qwen-MoE",
    )},
    **{(name, "residual"): RETURNED for name in ("CLIP", "SigLIP", "T5", "BART")},
    ("BLOOM", "heads"): "every head has its own constant slope over the positions (ALiBi)",
}  # fmt: skip
"""(family, kind) -> why the architecture forbids these units to move."""

GAPS = {
    ("Falcon", "head channels"): "queries, keys and values of a fused projection share one axis of channels",
}  # fmt: skip
"""(family, kind) -> which operation pins units that could move, in attention of plain products."""


def gaps(family: Family, attention: str) -> dict[str, str]:
    """Return kind -> which operation pins units of a family that could move."""
    return {kind: reason for (name, kind), reason in GAPS.items() if name == family.name}
