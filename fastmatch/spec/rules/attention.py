"""scaled_dot_product_attention, in every form that torch dispatches it to."""

from __future__ import annotations

from fastmatch.spec.labels import pin, split_product, unify
from fastmatch.spec.operations import Call
from fastmatch.spec.record import Record
from fastmatch.spec.rules.registry import rule, set_saved, unify_broadcast

__all__: list[str] = []


@rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def _attention(record: Record, call: Call) -> None:
    """Unite batch, heads, channels of queries and keys, and positions of keys and values.

    Shapes are (batch..., heads, positions, channels).
    """
    query, key, value = (record.labels(call[name]) for name in ("query", "key", "value"))
    head = len(query) - 3
    for d in range(head):
        unify(query[d], key[d], call.name)
    for d in range(head + 1):
        unify(key[d], value[d], call.name)
    # Several query heads may share a key head; they are next to each other.
    split = split_product([query[head]], [key[head].size, query[head].size // key[head].size])
    if split is None:
        pin(query[head], call.name)
        pin(key[head], call.name)
    else:
        unify(split[0], key[head], call.name)
    unify(query[-1], key[-1], call.name)
    unify(key[-2], value[-2], call.name)
    for label in (query[-1], query[-2], key[-1], key[-2], value[-1]):
        record.contract(label, key[: head + 1])
    if call["is_causal"]:
        pin(query[-2], call.name)
        pin(key[-2], call.name)
    scores = [*query[:-1], key[-2]]
    for name in ("attn_mask", "attn_bias"):
        if call.get(name) is not None:
            unify_broadcast(record, call[name], scores, call.name)
    first, *saved = call.outputs
    record.set(first, [*query[:-1], value[-1]])
    set_saved(record, call, saved, [*query, *key, *value])
