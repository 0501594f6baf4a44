"""Folders as they come: which weights are read, what is carried to the output, and what is never run."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastmatch as fm
from fastmatch._internal.files import load_state, save_state
from fastmatch.checkpoint import Checkpoint, WriteOptions, align_checkpoints, trace_config
from fastmatch.checkpoint.writer import write_like
from helpers.networks import build, fresh_seed

INDEX = "model.safetensors.index.json"


@pytest.fixture
def pair(tmp_path):
    """Folders a and b with a network in model.safetensors, b a with its units moved; and the spec."""
    model, x = build("mlp", fresh_seed())
    spec = fm.PermutationSpec.trace(model, x)
    for name, state in (
        ("a", model.state_dict()),
        ("b", fm.Alignment(spec.random(), spec).apply(model.state_dict())),
    ):
        (tmp_path / name).mkdir()
        metadata = {"format": "pt", "license": "mine", "from": name}
        save_file(state, tmp_path / name / "model.safetensors", metadata=metadata)
    return tmp_path, spec


def align(pair, **options):
    folder, spec = pair
    return align_checkpoints(folder / "a", folder / "b", folder / "out", spec=spec, **options)


def names(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def test_what_says_how_to_use_a_model_is_carried_and_the_rest_is_listed(pair, caplog):
    b = pair[0] / "b"
    carried = (
        "config.json",
        "tokenizer.json",
        "vocab.txt",
        "spiece.model",
        "LICENSE",
        "1_Pooling/config.json",
    )
    others = (
        "README.md", "model.gguf", "pytorch_model.bin", "model.fp16.safetensors", "modeling_own.py", "notes.pkl",
        "pytorch_model.bin.index.json", "onnx/model.onnx", "2_Dense/config.json", "2_Dense/model.safetensors",
    )  # fmt: skip
    for name in (*carried, *others, ".git/config"):
        (b / name).parent.mkdir(exist_ok=True)
        (b / name).write_text("{}")
    with caplog.at_level(logging.WARNING, logger="fastmatch"):
        align(pair)
    assert names(pair[0] / "out") == sorted(["1_Pooling", "model.safetensors", *carried])
    (said,) = [r.getMessage() for r in caplog.records if r.name == "fastmatch"]
    for name in ("2_Dense/", "onnx/", "README.md", "model.gguf", "modeling_own.py", "notes.pkl"):
        assert name in said
    assert "1_Pooling" not in said


def test_links_out_of_a_folder_are_not_followed(pair, caplog):
    folder = pair[0]
    (folder / "secret.json").write_text("secret")
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "config.json").write_text("secret")
    (folder / "b" / "config.json").write_text("{}")
    (folder / "b" / "tokenizer.json").symlink_to(folder / "secret.json")
    (folder / "b" / "1_Pooling").symlink_to(folder / "elsewhere")
    (folder / "b" / "2_Inner").mkdir()
    (folder / "b" / "2_Inner" / "config.json").symlink_to(folder / "secret.json")
    (folder / "b" / "vocab.json").symlink_to("config.json")  # inside
    (folder / "b" / "\x1b[2J\n.gguf").write_text("a terminal's command")
    align(pair)
    assert names(folder / "out") == ["config.json", "model.safetensors", "vocab.json"]
    assert not any(p.is_symlink() for p in (folder / "out").iterdir())
    (said,) = [r.getMessage() for r in caplog.records if r.name == "fastmatch"]
    assert r"\x1b[2J\n.gguf" in said


def test_the_layout_of_hugging_faces_cache_is_read_and_carried(pair):
    folder = pair[0]
    snapshot, blobs = folder / "models--b" / "snapshots" / "1a", folder / "models--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (folder / "b" / "tokenizer.json").write_text("{}")
    for number, path in enumerate((folder / "b").iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    align_checkpoints(folder / "a", snapshot, folder / "out", spec=pair[1])
    assert names(folder / "out") == ["model.safetensors", "tokenizer.json"]


def test_a_whole_file_counts_before_an_index_as_for_transformers(pair):
    folder = pair[0]
    stale = {"weight_map": dict.fromkeys(Checkpoint(folder / "b"), "model-00001-of-00002.safetensors")}
    (folder / "b" / INDEX).write_text(json.dumps(stale))
    align(pair)
    assert names(folder / "out") == ["model.safetensors"]


def test_a_tensor_that_the_index_leaves_out_is_read_and_one_in_two_shards_is_refused(tmp_path):
    save_file({"w": torch.ones(2), "extra": torch.ones(3)}, tmp_path / "model-1.safetensors")
    save_file({"v": torch.ones(2)}, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"w": "model-1.safetensors", "v": "model-2.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert set(Checkpoint(tmp_path)) == {"w", "v", "extra"}
    save_file({"v": torch.ones(2), "extra": torch.zeros(3)}, tmp_path / "model-2.safetensors")
    with pytest.raises(
        ValueError, match=r"model-2.safetensors: holds tensor 'extra', which is in another shard too"
    ):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
def test_folders_of_torch_files_are_read_and_written_as_such(pair, shards):
    folder = pair[0]
    for name in "ab":
        state = load_file(folder / name / "model.safetensors")
        (folder / name / "model.safetensors").unlink()
        (folder / name / "training_args.bin").write_bytes(b"not weights")
        if shards == 1:
            torch.save(state, folder / name / "pytorch_model.bin")
            continue
        places = {k: f"pytorch_model-{i % 2 + 1}.bin" for i, k in enumerate(state)}
        for file in set(places.values()):
            torch.save({k: v for k, v in state.items() if places[k] == file}, folder / name / file)
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / name / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    expected = Checkpoint(folder / "a")
    align(pair)
    out = Checkpoint(folder / "out")
    assert names(folder / "out") == [n for n in names(folder / "b") if n != "training_args.bin"]
    assert all(torch.equal(out[k], v) for k, v in expected.items())


def test_a_tensor_under_two_names_is_stored_once_if_both_move_alike(tmp_path):
    state = {"w": torch.arange(6.0)}
    torch.save({**state, "twin": state["w"]}, tmp_path / "pytorch_model.bin")
    source = Checkpoint(tmp_path)
    write_like(source, tmp_path / "out", lambda name: source[name] + 1)
    stored = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert stored["w"].data_ptr() == stored["twin"].data_ptr()
    write_like(source, tmp_path / "two", lambda name: source[name] + len(name))
    stored = torch.load(tmp_path / "two" / "pytorch_model.bin", weights_only=True)
    assert torch.equal(stored["twin"], state["w"] + 4)


def test_a_torch_file_of_a_folder_that_holds_code_is_refused(pair):
    (pair[0] / "b" / "model.safetensors").unlink()
    torch.save({"w": print}, pair[0] / "b" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: not a torch file that weights_only can read"):
        align(pair)


@pytest.mark.parametrize("name", ["weights.bin", "weights.safetensors", "model.gguf"])
def test_a_folder_with_weights_of_another_kind_is_told_which(pair, name):
    (pair[0] / "b" / "model.safetensors").rename(pair[0] / "b" / name)
    with pytest.raises(
        FileNotFoundError, match=f"holds neither .*; it has {name}: load that with its library"
    ):
        align(pair)


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_the_metadata_of_headers_is_kept_and_of_two_what_both_say(pair):
    align(pair)
    path = pair[0] / "out" / "model.safetensors"
    assert metadata_of(path) == {"format": "pt", "license": "mine", "from": "b"}
    align(pair, write=WriteOptions(merge=0.5, force=True))
    assert metadata_of(path) == {"format": "pt", "license": "mine"}


TYPES = (
    "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "uint8", "uint16", "uint32",
    "uint64", "int8", "int16", "int32", "int64", "bool", "complex64",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_tensors_of_every_type_and_shape_that_nothing_moves_pass_through_bit_by_bit(pair, dtype):
    folder = pair[0]
    extra = {f"{t}": torch.arange(3).to(getattr(torch, t)) for t in TYPES if hasattr(torch, t)}
    extra |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "ключ/ü": torch.ones(3),
        "large": torch.tensor(2**62),
    }
    for name in "ab":
        path = folder / name / "model.safetensors"
        save_file({**load_file(path), **extra}, path, metadata={"format": "pt"})
    align(pair, write=WriteOptions(dtype=dtype))
    found = load_file(folder / "out" / "model.safetensors")
    for name, tensor in extra.items():
        expected = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        assert found[name].dtype == expected.dtype
        assert bytes(found[name].reshape(-1).view(torch.uint8)) == bytes(
            expected.reshape(-1).view(torch.uint8)
        )


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files_are_read_and_written_on_the_cpu_whatever_the_default_device(pair, tmp_path, suffix):
    folder, spec = pair
    state = load_file(folder / "a" / "model.safetensors")
    torch.set_default_device("meta")
    try:
        save_state(state, tmp_path / f"x{suffix}")
        assert all(torch.equal(load_state(tmp_path / f"x{suffix}")[k], v) for k, v in state.items())
        assert all(torch.equal(Checkpoint(tmp_path / f"x{suffix}")[k], v) for k, v in state.items())
        align(pair)
        alignment = fm.Alignment(spec.identity(), spec)
        alignment.save(tmp_path / "p.safetensors")
        fm.Alignment.load(tmp_path / "p.safetensors")
    finally:
        torch.set_default_device(None)
    expected = load_file(folder / "a" / "model.safetensors")
    found = load_file(folder / "out" / "model.safetensors")
    assert all(torch.equal(found[k], v) for k, v in expected.items())


CODE = "import pathlib\npathlib.Path('ran').touch()\nclass C: pass\n"


@pytest.mark.parametrize(("config", "message"), [
    ({"model_type": "own", "auto_map": {"AutoConfig": "own.C"}}, "needs Python code from its folder"),
    ({"model_type": "llama", "architectures": ["OwnModel"], "auto_map": {"AutoModel": "own.C"}}, "needs Python code"),
    ({"model_type": "own"}, "no model can be built from it"),
    ({"model_type": "llama", "architectures": ["logging"]}, "no model class 'logging'"),
    ({"model_type": "llama", "architectures": [5]}, "no model class 5"),
    ({"model_type": "llama", "hidden_size": "many"}, "no model can be built from it"),
    ({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2**60}, "no model can be built"),
    ({"model_type": ["llama"]}, "no model can be built from it"),
])  # fmt: skip
def test_a_config_that_needs_code_or_makes_no_sense_is_refused_in_one_line(
    tmp_path, monkeypatch, config, message
):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(CODE)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}") as found:
        trace_config(tmp_path)
    assert "\n" not in str(found.value)
    assert not (tmp_path / "ran").exists()


def test_code_beside_an_architecture_that_transformers_has_is_not_run(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        architectures=["LlamaForCausalLM"], auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.C"},
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text(CODE)
    assert trace_config(tmp_path).groups
    assert not (tmp_path / "ran").exists()
