"""Folders of torch.distributed.checkpoint: aligned as safetensors are, and read without running code."""

from __future__ import annotations

import copyreg
import errno
import os
import pickle
import weakref

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.metadata import MetadataIndex

from fastmatch._internal import distributed_folder, torch_file
from fastmatch._internal.distributed_folder import DistributedFolder
from fastmatch.checkpoint import Checkpoint, WriteOptions, align_checkpoints
from fastmatch.checkpoint.apply import apply_to_checkpoint
from helpers.llama_pair import save_distributed, write_llama_pair

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("checkpoints")
    write_llama_pair(path)
    return path


def test_a_folder_is_aligned_as_one_of_safetensors_is_and_torch_reads_the_output(folder):
    save_distributed(folder / "a", folder / "first", step=torch.tensor(7))
    save_distributed(folder / "b", folder / "second")
    write = WriteOptions(merge=0.25)
    expected = align_checkpoints(folder / "a", folder / "b", folder / "out", write=write, progress=False)
    found = align_checkpoints(
        folder / "first", folder / "second", folder / "out1", write=write, progress=False
    )
    assert found.matching.objective == expected.matching.objective
    plain, written = Checkpoint(folder / "out"), Checkpoint(folder / "out1")
    assert plain.keys() == written.keys()
    assert all(torch.equal(plain[name], written[name]) for name in plain)
    loaded = {"model": {name: torch.zeros(t.shape) for name, t in plain.headers.items()}}
    dcp.load(loaded, checkpoint_id=folder / "out1")
    assert all(torch.equal(plain[name], loaded["model"][name]) for name in plain)


def test_one_tensor_is_in_memory_at_a_time_and_the_optimizer_is_left_out_by_name(folder, monkeypatch, caplog):
    save_distributed(folder / "b", folder / "with optimizer", optim={"step": torch.tensor(1.0)})
    read, alive, most = DistributedFolder.read, [], []

    def counted(self, name, stored):
        tensor = read(self, name, stored)
        alive.append(weakref.ref(tensor))
        most.append(sum(ref() is not None for ref in alive))
        return tensor

    aligned = align_checkpoints(folder / "a", folder / "b", folder / "plain", progress=False)
    monkeypatch.setattr(DistributedFolder, "read", counted)
    apply_to_checkpoint(aligned, folder / "with optimizer", folder / "applied")
    assert max(most) <= 2
    assert "not carried from" in caplog.text
    assert "optim" in caplog.text
    plain, written = Checkpoint(folder / "plain"), Checkpoint(folder / "applied")
    assert all(torch.equal(plain[name], written[name]) for name in plain)


def test_a_full_disk_leaves_nothing(folder, monkeypatch):
    save_distributed(folder / "b", folder / "saved")

    def full(self, data):
        self.error = OSError(errno.ENOSPC, "No space left on device")
        return len(data)

    monkeypatch.setattr(torch_file._Sink, "write", full)
    with pytest.raises(OSError, match=r"No space left on device.*__\d+_0\.distcp"):
        align_checkpoints(folder / "a", folder / "saved", folder / "full", progress=False)
    assert not (folder / "full").exists()


@pytest.fixture
def small(tmp_path):
    dcp.save({"w": torch.randn(4, 3), "b": torch.randn(3)}, checkpoint_id=tmp_path / "small")
    return tmp_path / "small"


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize(
    "function", [os.mkdir, os.system, eval, getattr, copyreg._reconstructor, torch.load, pickle.loads]
)
@pytest.mark.parametrize("place", ["all", "inside"])
def test_metadata_that_call_a_function_are_refused_in_one_line_and_nothing_is_called(small, function, place):
    call = Call(function, str(small / "made"))
    metadata = pickle.loads((small / ".metadata").read_bytes())
    metadata.planner_data = {"w": call}
    (small / ".metadata").write_bytes(pickle.dumps(call if place == "all" else metadata))
    with pytest.raises(
        ValueError, match=r"\.metadata: .*(not part of the format|asks for attributes)"
    ) as caught:
        Checkpoint(small)
    assert "\n" not in str(caught.value)
    assert not (small / "made").exists()


NAMES = b"ctorch.distributed.checkpoint.metadata\n"
SETS = b"}X\x05\x00\x00\x00added\x89s"  # {"added": False}
SHARED = {
    "a class": (NAMES + b"Metadata\n", metadata.Metadata),
    "an enumeration": (NAMES + b"_MEM_FORMAT_ENCODING\n", metadata._MEM_FORMAT_ENCODING),
    "its member": (NAMES + b"_MEM_FORMAT_ENCODING\nK\x00\x85R", metadata._MEM_FORMAT_ENCODING(0)),
    "its new member": (NAMES + b"_MEM_FORMAT_ENCODING\nK\x00\x85\x81", metadata._MEM_FORMAT_ENCODING(0)),
    "a function": (b"ctorch.serialization\n_get_layout\n", distributed_folder._layout),
    "a type of torch": (b"ctorch\nfloat32\n", torch.float32),
    "a builtin": (b"ccollections\nOrderedDict\n", dict),
}


@pytest.mark.parametrize("state", [SETS, b"N" + SETS + b"\x86"], ids=["its dict", "its attributes"])
@pytest.mark.parametrize("name", SHARED)
def test_metadata_that_change_what_everybody_uses_are_refused_before_they_do(small, name, state):
    code, shared = SHARED[name]
    (small / ".metadata").write_bytes(b"\x80\x02" + code + state + b"b.")
    with pytest.raises(ValueError, match=r"\.metadata: .* changes an? \w+, which is not part of the format"):
        Checkpoint(small)
    assert not hasattr(shared, "added")


def test_metadata_that_use_a_registered_number_are_refused(small, monkeypatch):
    called: list[str] = []
    monkeypatch.setitem(copyreg._extension_cache, 0x77, called.append)  # as after another pickle that used it
    (small / ".metadata").write_bytes(b"\x80\x02\x82\x77X\x01\x00\x00\x00a\x85R.")
    with pytest.raises(ValueError, match="names extension 119, which is not part of the format"):
        Checkpoint(small)
    assert not called


def test_a_line_break_in_a_name_does_not_reach_the_terminal(small):
    (small / ".metadata").write_bytes(b"\x80\x04\x8c\x04a\nbc\x8c\x02\x1b[\x93.")
    with pytest.raises(ValueError, match=r"names a\\nbc\.\\x1b\[, which is not part of the format"):
        Checkpoint(small)


def leave(metadata, **changes):
    """Change the place of ``w``."""
    for name, value in changes.items():
        setattr(metadata.storage_data[MetadataIndex("w", (0, 0))], name, value)


def widen(metadata, **changes):
    """Change the header of ``w``."""
    for name, value in changes.items():
        setattr(metadata.state_dict_metadata["w"], name, value)


@pytest.mark.parametrize(("change", "message"), [
    (lambda m: leave(m, relative_path="../secret.distcp"), "is not a .distcp file of this folder"),
    (lambda m: leave(m, relative_path="/etc/passwd"), "is not a .distcp file of this folder"),
    (lambda m: leave(m, relative_path="__9_9.distcp"), "there is no such file"),
    (lambda m: leave(m, length=1 << 40), "has a part that is not in __0_0.distcp"),
    (lambda m: leave(m, offset=-5), "has a part that is not in __0_0.distcp"),
    (lambda m: leave(m, transform_descriptors=["zstd"]), "is stored by an extension"),
    (lambda m: widen(m, size=torch.Size([1 << 40, 3])), "is not covered once by its 1 parts"),
    (lambda m: widen(m, size=torch.Size([5, 3])), "is not covered once by its 1 parts"),
    (lambda m: widen(m, chunks=[]), "is not covered once by its 0 parts"),
    (lambda m: widen(m, chunks=2 * m.state_dict_metadata["w"].chunks), "is not covered once by its 2 parts"),
    (lambda m: setattr(m, "state_dict_metadata", {}), "has no table of tensors"),
    (lambda m: setattr(m, "storage_data", {}), "not readable as metadata"),
    (lambda m: m.planner_data.update(b=("w",)), "two entries that are called 'w'"),
])  # fmt: skip
def test_metadata_that_do_not_fit_the_files_are_refused_in_one_line(small, change, message):
    metadata = pickle.loads((small / ".metadata").read_bytes())
    change(metadata)
    (small / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=message) as caught:
        Checkpoint(small)
    assert "\n" not in str(caught.value)
    assert str(small / ".metadata") in str(caught.value)


def test_what_is_no_model_is_named(tmp_path):
    cases = {
        "is no tensor": {"w": torch.randn(2), "lr": 0.1},
        "holds several models: first.model, second.model": {
            name: {"model": {"w": torch.randn(2)}} for name in ("first", "second")
        },
    }
    for message, state in cases.items():
        dcp.save(state, checkpoint_id=tmp_path / message)
        with pytest.raises(ValueError, match=message):
            Checkpoint(tmp_path / message)
    unfinished = tmp_path / "is no tensor"
    (unfinished / ".metadata").unlink()
    with pytest.raises(FileNotFoundError, match="the save is not complete"):
        Checkpoint(unfinished)


def test_a_damaged_file_names_the_tensor(small):
    file = small / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[10:200] = bytes(190)
    file.write_bytes(data)
    checkpoint = Checkpoint(small)
    with pytest.raises(ValueError, match=r"__0_0\.distcp: tensor '.' cannot be read"):
        [checkpoint[name] for name in checkpoint]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (2, 3, 4)])
def test_tensors_come_as_they_were_saved(tmp_path, dtype, shape):
    tensor = torch.randint(2, shape).to(dtype)
    dcp.save({"t": tensor}, checkpoint_id=tmp_path / "saved")
    checkpoint = Checkpoint(tmp_path / "saved")
    assert checkpoint.headers["t"].shape == shape
    assert checkpoint["t"].dtype == dtype
    assert torch.equal(checkpoint["t"], tensor)
