"""Files are written whole or not at all, and read back as they were."""

from __future__ import annotations

import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastmatch as fm
from fastmatch._internal.files import load_state, save_state, writing
from fastmatch.checkpoint import Checkpoint
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


def test_a_folder_in_the_place_of_a_file_leads_to_its_file(tmp_path):
    """It was called no such file."""
    folder = tmp_path / "llama"
    folder.mkdir()
    with pytest.raises(
        IsADirectoryError, match="llama: is a folder; expected a file of tensors, and it holds none"
    ):
        load_state(folder)
    (folder / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    torch.save({"a": torch.zeros(2)}, folder / "pytorch_model.bin")
    with pytest.raises(
        IsADirectoryError, match=r"is a folder; expected a file of tensors; give .*model\.safetensors"
    ):
        load_state(folder)
    save_file({"a": torch.zeros(2)}, folder / "more.safetensors")
    with pytest.raises(IsADirectoryError, match="its tensors are in 2 files; load the network in Python"):
        load_state(folder)


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


class Callback:
    """What a trainer keeps beside the weights. It says so if somebody makes one."""

    made = 0

    def __init__(self):
        type(self).made += 1

    def __reduce__(self):
        return Callback, ()


def test_weights_of_a_file_of_training_are_read_and_its_objects_are_not_made(tmp_path):
    state = {"w": torch.arange(6.0).reshape(2, 3)}
    beside = {"callbacks": {Callback: {"best": torch.tensor(1.0)}}, "loop": Callback(), "rate": np.float64(3)}
    torch.save({"state_dict": state, **beside}, tmp_path / "epoch.ckpt")
    before = Callback.made
    for mmap in (False, True):
        found = load_state(tmp_path / "epoch.ckpt", mmap=mmap)
        assert list(found) == ["w"]
        assert torch.equal(found["w"], state["w"])
    assert Callback.made == before


@pytest.mark.parametrize(
    "data", [{"state_dict": {"w": Callback()}}, {"w": torch.zeros(2), "x": Callback()}, Callback()]
)
def test_other_objects_in_the_place_of_weights_are_refused(tmp_path, data):
    torch.save(data, tmp_path / "model.ckpt")
    with pytest.raises(
        ValueError, match=r"model\.ckpt: not a torch file that weights_only can read .*Callback"
    ):
        load_state(tmp_path / "model.ckpt")


def test_what_is_no_torch_file_is_told_by_what_it_is(tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(9)}, path)
    whole = path.read_bytes()
    end = whole.rindex(b"PK\x06\x07") + 16  # of a locator, which says here that the archive is on seven disks
    spanning = whole[:end] + (7).to_bytes(4, "little") + whole[end + 4 :]
    torch.save({"w": torch.ones(9)}, path, _use_new_zipfile_serialization=False)
    old = path.read_bytes()
    save_file({"w": torch.ones(2)}, path)
    for data, told in (
        (b"", "it is empty"),
        (
            b"hi there",
            "it is text that begins with 'hi there'",
        ),  # a pickle's words for "the object 105", which torch answers with KeyError(105)
        (bytes(range(104, 200)), "it is of no format that is known here"),
        (b"<!DOCTYPE html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a pointer of Git LFS"),
        (path.read_bytes(), "it is a safetensors file"),
        (whole[:-50], "it was cut off"),
        (spanning, "BadZipFile"),
        (old[:200], "IndexError: index out of range"),
        (pickle.dumps({"w": 1}), "a pickle that torch.save has not written: Unsupported operand 149)"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"m\.pt: not a torch file that weights_only can read") as error:
            load_state(path)
        assert told in str(error.value)


def test_what_is_no_safetensors_file_is_told_by_what_it_is(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(9)}, path)
    whole = path.read_bytes()
    torch.save({"w": torch.ones(9)}, path)
    for data, told in (
        (b"", "it is empty"),
        (b"Entry not found\n", "it is text that begins with 'Entry not found'"),
        (b"\n<!doctype HTML>\n<body>", "it is a web page; download the file itself"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "it is a pointer of Git LFS; `git lfs pull` fetches",
        ),
        (pickle.dumps({"w": 1}), "it is a torch file; give it a name that ends in .pt"),
        (path.read_bytes(), "it is a torch file; give it a name that ends in .pt"),
        (b"GGUF\x03\0\0\0\0", "it is a GGUF file"),
        (bytes(range(104, 200)), "it is of no format that is known here"),
        (whole[:30], "it was cut off, or is still being written"),
    ):
        path.write_bytes(data)
        for read in (load_state, Checkpoint):
            with pytest.raises(ValueError, match=r"m\.safetensors: not a readable safetensors file") as error:
                read(path)
            assert told in str(error.value)


def test_suffixes_that_say_nothing_are_refused(tmp_path):
    model, x = build("mlp", 0)
    alignment = fm.Alignment({}, fm.PermutationSpec.trace(model, x))
    with pytest.raises(ValueError, match="path: expected a file ending in"):
        save_state(model.state_dict(), tmp_path / "m.npz")
    with pytest.raises(ValueError, match=r"ending in \.safetensors, got"):
        alignment.save(tmp_path / "p.pt")
    with pytest.raises(ValueError, match=r"ending in \.safetensors, got"):
        fm.Alignment.load(tmp_path / "p.pt")
    assert not list(tmp_path.iterdir())


def raw(path, header, data):
    """A safetensors file with a header as given: text, or a table."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TWICE = b'{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'


@pytest.mark.parametrize(("header", "data", "message"), [
    ({"v": entry([2], 0, 8), "w": entry([2], 4, 12)}, 12, "tensor 'w' begins at byte 4, the one before ends at 8"),
    ({"v": entry([2], 0, 8), "w": entry([2], 12, 20)}, 20, "tensor 'w' begins at byte 12"),
    ({"w": entry([2], 0, 8)}, 9, "1 bytes after the last tensor"),
    ({"w": entry([2], 0, 8)}, 7, "truncated: tensor 'w' ends at byte 8, the file at 7"),
    ({"w": entry([4.7], 0, 16)}, 16, "tensor 'w' of type F32 and shape \\[4.7\\]"),
    ({"w": entry([3], 0, 8)}, 8, "tensor 'w' of type F32 and shape \\[3\\] in 8 bytes"),
    ({"w": entry([2], 0, 8, "F33")}, 8, "tensor 'w' of type F33"),
    ({"w": entry([4], 0, 2, "F4")}, 2, "tensor 'w' has element type 'F4', which is not supported"),
    ({"w": entry([0, 2**62, 2**62], 0, 0)}, 0, "tensor 'w' of shape .* is impossible|overflow"),
    (TWICE, 2, "'w' is there twice"),
    ({"__metadata__": {"n": 1}, "w": entry([2], 0, 8)}, 8, "expected a string"),
    (b"[" * 3000, 0, "not a readable"),
    (b"", 0, "not a readable"),
])  # fmt: skip
def test_what_the_safetensors_library_or_its_format_refuses_is_refused_with_the_tensor(
    tmp_path, header, data, message
):
    path = tmp_path / "m.safetensors"
    raw(path, header, b"\0" * data)
    for read in (load_state, Checkpoint):
        with pytest.raises(ValueError, match=rf"m\.safetensors: .*({message})") as found:
            read(path)
        assert "\n" not in str(found.value)


class Foreign:
    pass


@pytest.mark.parametrize(("content", "message"), [
    ({"model": {"w": torch.zeros(2)}, "epoch": 1}, r"is its entry 'model'; save that one alone: torch.save\(data\['model'\]\)"),
    ({"w": torch.zeros(2), "step": 5}, "entry 'step' is int"),
    ({1: torch.zeros(2)}, "entry 1 is Tensor"),
    ({"w": Foreign()}, r"objects other than tensors: .*Foreign; save model.state_dict\(\) instead"),
    # From torch 2.14 weights_only refuses sparse tensors itself.
    ({"w": torch.eye(2).to_sparse()}, "tensor 'w' is not a plain dense tensor|objects other than tensors"),
    ({"w": torch.zeros(1).expand(10**6)}, "tensor 'w' of shape .* has more entries than the file stores"),
])  # fmt: skip
def test_torch_files_of_other_things_than_tensors_are_refused_in_one_line(tmp_path, content, message):
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=rf"m\.pt: .*({message})") as found:
        load_state(tmp_path / "m.pt")
    assert "\n" not in str(found.value)


def test_an_archive_that_is_larger_inside_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", bytes(10**6))
    with pytest.raises(ValueError, match=r"m\.pt: .*records hold 1000000 bytes"):
        load_state(tmp_path / "m.pt")


@pytest.mark.parametrize(("change", "message"), [
    (lambda spec: spec["groups"][0].update(size=10**9), "tensor .* has shape .*, its spec says|does not fit"),
    (lambda spec: spec["groups"][0]["axes"][0].__setitem__(3, 2), "does not fit"),  # two repeats with no distance
    (lambda spec: spec["groups"].append(spec["groups"][0]), "a group is there twice"),
    (lambda spec: spec["shapes"].update({next(iter(spec["shapes"])): [4.7]}), "expected a whole number"),
    (lambda spec: spec.update(format="other"), "unknown format 'other'"),
    (lambda spec: spec["groups"].pop(), "unknown group"),
])  # fmt: skip
def test_a_file_of_permutations_whose_spec_does_not_fit_is_refused(tmp_path, change, message):
    model, x = build("mlp", 0)
    spec = fm.PermutationSpec.trace(model, x)
    table = json.loads(spec.to_json())
    change(table)
    save_state(spec.random(), tmp_path / "p.safetensors", metadata={"fastmatch.spec": json.dumps(table)})
    with pytest.raises(ValueError, match=rf"p\.safetensors.*({message})"):
        load_permutations(tmp_path / "p.safetensors")
