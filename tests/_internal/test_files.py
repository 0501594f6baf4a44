"""Files are written whole or not at all, and read back as they were."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import fastmatch as fm
from fastmatch._internal.files import load_state, save_state, writing
from fastmatch.permutations.files import load_permutations
from helpers.networks import build


def test_permutations_and_spec_come_back(tmp_path):
    model, x = build("grouped", 0)
    spec = fm.PermutationSpec.trace(model, x)
    alignment = fm.Alignment(spec.random(), spec)
    path = tmp_path / "perms.safetensors"
    alignment.save(path)
    loaded = fm.Alignment.load(path)
    assert loaded.spec == spec
    assert all(torch.equal(loaded.permutations[k], v) for k, v in alignment.permutations.items())
    with pytest.raises(FileExistsError, match="force"):
        alignment.save(path)
    alignment.invert().save(path, force=True)
    assert torch.equal(fm.Alignment.load(path).permutations["stem"], alignment.invert().permutations["stem"])
    assert [p.name for p in tmp_path.iterdir()] == ["perms.safetensors"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_states_come_back(tmp_path, suffix):
    model, _ = build("tied", 0)
    save_state(model.state_dict(), tmp_path / f"m{suffix}")
    state = load_state(tmp_path / f"m{suffix}")
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_a_failed_write_leaves_nothing_and_the_old_file_alone(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_text("old")

    def killed_halfway() -> None:
        with writing(path, force=True) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed_halfway()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    with pytest.raises(FileNotFoundError, match="is not a folder"), writing(tmp_path / "no" / "m.pt"):
        pass


def test_damaged_and_foreign_files(tmp_path):
    whole = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(100)}, whole)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cut.safetensors: not a readable"):
        load_state(cut)
    with pytest.raises(ValueError, match="holds no permutations"):
        load_permutations(whole)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_state(tmp_path / "none.pt")
    (tmp_path / "evil.pt").write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match="weights_only"):
        load_state(tmp_path / "evil.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="expected a state dict"):
        load_state(tmp_path / "list.pt")


def test_suffixes_that_say_nothing_are_refused(tmp_path):
    model, x = build("mlp", 0)
    alignment = fm.Alignment({}, fm.PermutationSpec.trace(model, x))
    with pytest.raises(ValueError, match="path: expected a file ending in"):
        save_state(model.state_dict(), tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match=r"ending in \.safetensors, got"):
        alignment.save(tmp_path / "p.pt")
    with pytest.raises(ValueError, match=r"ending in \.safetensors, got"):
        fm.Alignment.load(tmp_path / "p.pt")
    assert not list(tmp_path.iterdir())
