"""Every reader of files that others made, a small file for each, and what it makes of changed copies of that file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import fastmatch as fm
from fastmatch._internal.files import load_state, save_state
from fastmatch.checkpoint import Checkpoint, align_checkpoints, apply_to_checkpoint
from fastmatch.checkpoint.journal import Journal, journal_path
from fastmatch.checkpoint.structure import config_of
from fastmatch.recipes.recipe import read_recipe as recipe_of
from helpers.mutations import mutated

__all__ = ["READERS", "judged", "small"]

Read = Callable[[Path], Any]


def small():
    """A network of few bytes, so that changes hit what matters."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    return model, fm.PermutationSpec.trace(model, torch.zeros(2, 3))


def read_safetensors(folder):
    save_state(small()[0].state_dict(), folder / "m.safetensors", metadata={"license": "mine"})
    return folder / "m.safetensors", lambda path: [load_state(path), dict(Checkpoint(path))]


def read_torch(folder):
    save_state(small()[0].state_dict(), folder / "m.pt")
    return folder / "m.pt", lambda path: [load_state(path), dict(Checkpoint(path))]


def read_old_torch(folder):
    torch.save(small()[0].state_dict(), folder / "m.pt", _use_new_zipfile_serialization=False)
    return folder / "m.pt", load_state


def read_permutations(folder):
    spec = small()[1]
    fm.Alignment(spec.random(), spec).save(folder / "p.safetensors")
    return folder / "p.safetensors", fm.Alignment.load


def read_spec(folder):
    (folder / "spec.json").write_text(small()[1].to_json())
    return folder / "spec.json", lambda path: fm.PermutationSpec.from_json(path.read_bytes().decode())


def read_index(folder):
    state = small()[0].state_dict()
    save_file(state, folder / "model-1.safetensors")
    index = {"metadata": {"total_size": 10}, "weight_map": dict.fromkeys(state, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model.safetensors.index.json", lambda path: dict(Checkpoint(path.parent))


def read_config(folder):
    import transformers

    transformers.LlamaConfig(vocab_size=20, hidden_size=32, num_attention_heads=4).save_pretrained(folder)
    return folder / "config.json", lambda path: config_of(path.parent)


def torch_shards(folder):
    state = small()[0].state_dict()
    for number, names in enumerate((list(state)[:2], list(state)[2:])):
        torch.save({name: state[name] for name in names}, folder / f"pytorch_model-{number}.bin")
    places = {name: f"pytorch_model-{number // 2}.bin" for number, name in enumerate(state)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))


def read_torch_index(folder):
    torch_shards(folder)
    return folder / "pytorch_model.bin.index.json", lambda path: dict(Checkpoint(path.parent))


def read_torch_shard(folder):
    torch_shards(folder)
    return folder / "pytorch_model-1.bin", lambda path: dict(Checkpoint(path.parent))


def read_modules(folder):
    save_state(small()[0].state_dict(), folder / "model.safetensors")
    (folder / "2_Dense").mkdir()
    save_state(small()[0].state_dict(), folder / "2_Dense" / "model.safetensors")
    listed = [{"idx": 0, "name": "0", "path": ""}, {"idx": 1, "name": "1", "path": "2_Dense"}]
    (folder / "modules.json").write_text(json.dumps(listed))
    return folder / "modules.json", lambda path: dict(Checkpoint(path.parent))


def read_distributed(folder, name=".metadata"):
    path = folder / "shards"
    dcp.save({"model": small()[0].state_dict()}, checkpoint_id=path)
    return path / name, lambda path: dict(Checkpoint(path.parent))


def read_distributed_shard(folder):
    return read_distributed(folder, "__0_0.distcp")


def lora(folder, name, out):
    """A LoRA of the small network, and how it is read: permuted, and written again."""
    spec = small()[1]
    alignment = fm.Alignment(spec.random(), spec)
    factors = {"lora_A": torch.randn(2, 3), "lora_B": torch.randn(5, 2)}
    save_file({f"base_model.model.0.{k}.weight": t for k, t in factors.items()}, folder / name)
    return lambda path: apply_to_checkpoint(alignment, path, out, force=True)


def read_lora(folder):
    read = lora(folder, "lora.safetensors", folder / "moved.safetensors")
    return folder / "lora.safetensors", read


def read_adapter(folder):
    (folder / "adapter").mkdir()
    read = lora(folder / "adapter", "adapter_model.safetensors", folder / "moved")
    settings = {"fan_in_fan_out": False, "base_model_name_or_path": "base", "r": 2}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    return folder / "adapter" / "adapter_config.json", lambda path: read(path.parent)


def read_recipe(folder, suffix="json"):
    recipe = {"models": ["a.pt", "b.pt"], "network": "nets:build", "align": "weights", "out": "merged.pt"}
    (folder / f"recipe.{suffix}").write_text(json.dumps(recipe, indent=1))
    return folder / f"recipe.{suffix}", recipe_of


def read_yaml_recipe(folder):
    return read_recipe(folder, "yaml")


def read_journal(folder):
    """The journal of a run of which everything but the output is done, and the run that goes on from it."""
    model, spec = small()
    inputs = [folder / f"{x}.safetensors" for x in ("a", "b", "out")]
    for path, state in zip(inputs, (model.state_dict(), _moved(model, spec)), strict=False):
        save_state(state, path)
    remove, Journal.remove = Journal.remove, lambda self: None  # type: ignore[method-assign]
    try:
        align_checkpoints(*inputs, spec=spec)
    finally:
        Journal.remove = remove  # type: ignore[method-assign]
    expected = inputs[2].read_bytes()

    def read(path):
        inputs[2].unlink(missing_ok=True)
        align_checkpoints(*inputs, spec=spec, resume=True)
        assert inputs[2].read_bytes() == expected

    return journal_path(inputs[2]), read


def _moved(model, spec):
    return fm.Alignment(spec.random(), spec).apply(model.state_dict())


READERS = (
    read_safetensors, read_torch, read_old_torch, read_permutations, read_spec, read_index, read_config,
    read_torch_index, read_torch_shard, read_modules, read_distributed, read_distributed_shard, read_lora, read_adapter, read_recipe, read_yaml_recipe,
    read_journal,
)  # fmt: skip


KEYED = (read_spec, read_recipe, read_yaml_recipe)
"""Readers whose refusals may name the key that is wrong, without the file."""

MAY_MISS = (read_index, read_torch_index)
"""Readers of files that name others, which need not exist."""


def refusal(read):
    """The error with which a reader refuses a file; None if it takes it. Other errors than these two are faults."""
    try:
        read()
    except (ValueError, FileNotFoundError) as error:
        return error
    return None


def judged(reader, folder: Path, count: int, seed: int) -> int:
    """Give ``count`` changed copies of a reader's file to it, and return how many it refused.

    Raises:
        AssertionError: it raised another error, or one that does not name the file in one line.
    """
    path, read = reader(folder)
    whole, choose, refused = path.read_bytes(), random.Random(seed), 0
    for number in range(count):
        path.write_bytes(mutated(whole, choose))
        where = f"change {number} of seed {seed}"
        try:
            error = refusal(lambda: read(path))
        except BaseException as other:
            raise AssertionError(f"{where}: {type(other).__name__}: {str(other)[:300]}") from other
        if error is not None:
            refused += 1
            assert isinstance(error, ValueError) or reader in MAY_MISS, where
            assert reader in KEYED or path.name in str(error) or str(folder) in str(error), where
            assert "\n" not in str(error), where
    return refused
