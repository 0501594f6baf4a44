"""Two directories of a small Llama in shards, for tests that align them through the command line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from fastmatch.checkpoint import Checkpoint, trace_config
from fastmatch.checkpoint.writer import write_like
from fastmatch.permutations.apply import permute_tensor

__all__ = ["contents", "save_distributed", "write_llama_pair"]


def contents(path: Path) -> dict[str, bytes]:
    """Return relative path -> bytes of every file in a folder."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def write_llama_pair(path: Path) -> None:
    """Write ``a`` and ``b``: b is a with every group moved, and noise."""
    import transformers

    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path / "a", max_shard_size="8KB")
    checkpoint, spec = Checkpoint(path / "a"), trace_config(path / "a")
    permutations = spec.random()

    def moved(name: str) -> torch.Tensor:
        tensor = permute_tensor(checkpoint[name], name, spec, permutations)
        return tensor + 0.3 * tensor.std() * torch.randn_like(tensor) if tensor.ndim > 1 else tensor

    write_like(checkpoint, path / "b", moved)


def save_distributed(
    source: Path, target: Path, divide: Callable = lambda tensor: tensor, **beside: Any
) -> None:
    """Write the tensors of a folder by torch.distributed.checkpoint, and the config beside them; all ranks make the call."""
    read = Checkpoint(source)
    dcp.save({"model": {name: divide(read[name]) for name in read}, **beside}, checkpoint_id=target)
    shutil.copy(source / "config.json", target / "config.json")
