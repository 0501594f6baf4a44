"""How often a streamed alignment reads the tensors of A and B, and that what it saves changes no result."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fastmatch.assignment import bounded_gain
from fastmatch.assignment.bounded_gain import BoundedGain
from fastmatch.checkpoint import Checkpoint, WriteOptions, align_checkpoints, trace_config
from fastmatch.checkpoint.journal import Journal
from fastmatch.checkpoint.writer import write_like
from fastmatch.matching import gains, held
from fastmatch.matching.placement import Placement
from fastmatch.permutations.apply import permute_tensor
from helpers.networks import fresh_seed

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """a: a sharded directory of a small Llama. Its groups are matched with bounds."""
    monkeypatch.setattr(gains, "BOUNDED_UNITS", 2)
    monkeypatch.setattr(gains, "BOUNDED_PRODUCTS", 0)
    monkeypatch.setattr(bounded_gain, "JUDGED", 32)
    torch.manual_seed(fresh_seed())
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "a", max_shard_size="64KB")
    return tmp_path


def near_copy(folder, cosine):
    """Write b: a with noise and with every group moved. Returns the spec."""
    a, spec = Checkpoint(folder / "a"), trace_config(folder / "a")
    planted = spec.random()

    def moved(name):
        tensor = a[name]
        if tensor.ndim > 1:
            tensor = cosine * tensor + (1 - cosine**2) ** 0.5 * tensor.std() * torch.randn(tensor.shape)
        return permute_tensor(tensor, name, spec, planted)

    write_like(a, folder / "b", moved)
    return spec


@pytest.fixture
def reads(monkeypatch):
    """Name of a checkpoint -> tensor -> how often it was read."""
    found: dict[str, Counter[str]] = {"a": Counter(), "b": Counter(), "out": Counter()}
    read = Checkpoint._read

    def counted(self, name):
        found[self.path.name][name] += 1
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "_read", counted)
    return found


@pytest.mark.parametrize("cosine", [1.0, 0.999, 0.95])
def test_near_copies_read_a_twice_and_b_three_times(folder, reads, cosine):
    spec = near_copy(folder, cosine)
    reads["a"].clear()
    reads["b"].clear()
    alignment = align_checkpoints(folder / "a", folder / "b", folder / "out", spec=spec)
    assert alignment.matching is not None
    assert alignment.matching.converged
    assert set(reads["a"].values()) == {2}
    assert set(reads["b"].values()) == {3}
    a, out = Checkpoint(folder / "a"), Checkpoint(folder / "out")
    for name in a:
        assert torch.cosine_similarity(a[name].flatten(), out[name].flatten(), 0) > cosine - 0.01, name


@pytest.mark.parametrize("cosine", [1.0, 0.9, 0.0])
def test_what_is_gathered_and_held_changes_no_result(folder, cosine, monkeypatch):
    spec = near_copy(folder, cosine)
    found = align_checkpoints(folder / "a", folder / "b", folder / "out", spec=spec)
    monkeypatch.setattr(held, "HELD_BYTES", 0)
    monkeypatch.setattr(Placement, "gain_of", lambda *args: None)
    monkeypatch.setattr(gains, "BOUNDED_UNITS", 1 << 40)
    plain = align_checkpoints(folder / "a", folder / "b", folder / "plain", spec=spec)
    assert all(torch.equal(p, plain.permutations[name]) for name, p in found.permutations.items())
    assert found.matching is not None
    assert plain.matching is not None
    assert found.matching.objective == pytest.approx(plain.matching.objective, rel=1e-12)


def test_a_run_that_goes_on_gathers_what_was_placed_before(folder, monkeypatch):
    """Killed before each of its steps, it ends in the bits of the run that was not."""
    spec = near_copy(folder, 0.9)
    align_checkpoints(folder / "a", folder / "b", folder / "out", spec=spec)
    expected = {p.name: p.read_bytes() for p in (folder / "out").iterdir()}
    gathered = []
    init = BoundedGain.note
    monkeypatch.setattr(BoundedGain, "note", lambda self, *args: gathered.append(self) or init(self, *args))
    add = Journal.add
    for steps in (1, 3, 5):
        left = [steps]

        def killed(self, name, step, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            add(self, name, step)

        monkeypatch.setattr(Journal, "add", killed)
        write = WriteOptions(force=True)
        with pytest.raises(KeyboardInterrupt):
            align_checkpoints(folder / "a", folder / "b", folder / "again", spec=spec, write=write)
        monkeypatch.setattr(Journal, "add", add)
        align_checkpoints(folder / "a", folder / "b", folder / "again", spec=spec, resume=True, write=write)
        assert {p.name: p.read_bytes() for p in (folder / "again").iterdir()} == expected
    assert gathered  # by bounds, and by the placement
