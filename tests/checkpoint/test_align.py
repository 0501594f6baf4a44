"""Checkpoints on disk: read on demand, aligned out of core, verified, written completely or not at all."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys

import pytest
import torch
from numpy.random import SeedSequence
from safetensors.torch import load_file

import fastmatch as fm
from fastmatch._internal.files import load_state, save_state
from fastmatch.checkpoint import Checkpoint, WriteOptions, align_checkpoints, trace_config, verify_checkpoints
from fastmatch.checkpoint.journal import Journal, journal_path
from fastmatch.checkpoint.writer import write_like
from fastmatch.cli.main import main
from fastmatch.matching.ascent import Hooks
from fastmatch.matching.weights import match_weights
from fastmatch.permutations.apply import permute_tensor
from helpers.networks import build

transformers = pytest.importorskip("transformers")

SHARD = "model-00001-of-"


@pytest.fixture
def folder(tmp_path):
    """a and b: sharded directories of a small Llama, b a with every group moved."""
    seed = int(SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "a", max_shard_size="24KB")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    spec = trace_config(tmp_path / "a")
    permute(tmp_path / "a", tmp_path / "b", spec)
    return tmp_path


def permute(source, out, spec):
    checkpoint, permutations = Checkpoint(source), spec.random()
    write_like(checkpoint, out, lambda n: permute_tensor(checkpoint[n], n, spec, permutations))


def first_shard(path):
    return next(p for p in sorted(path.iterdir()) if p.name.startswith(SHARD))


def names(path):
    return sorted(p.name for p in path.iterdir())


def contents(path):
    """Name -> bytes of every file of a folder."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_planted_directory_is_recovered_in_the_same_layout(folder, capsys):
    assert main(["align", *(str(folder / x) for x in "ab"), "--out", str(folder / "out")]) == 0
    assert "converged" in capsys.readouterr().out
    assert names(folder / "out") == names(folder / "a")
    assert names(folder) == ["a", "b", "out"]
    for path in (folder / "a").glob("*.safetensors"):
        expected, found = load_file(path), load_file(folder / "out" / path.name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[k], v) for k, v in expected.items())
    index = "model.safetensors.index.json"
    maps = [json.loads((folder / x / index).read_text())["weight_map"] for x in ("a", "out")]
    assert maps[0] == maps[1]
    loaded = transformers.LlamaForCausalLM.from_pretrained(folder / "out")
    assert torch.equal(loaded.lm_head.weight, Checkpoint(folder / "a")["lm_head.weight"])


def test_merge_in_another_type(folder):
    arguments = ["align", *(str(folder / x) for x in "ab"), "--out", str(folder / "out")]
    assert main([*arguments, "--merge", "0.5", "--dtype", "bfloat16"]) == 0
    a, out = Checkpoint(folder / "a"), Checkpoint(folder / "out")
    assert all(torch.equal(out[k], a[k].bfloat16()) for k in a)
    assert json.loads((folder / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((folder / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == out.nbytes


def test_only_named_groups_move(folder):
    spec = trace_config(folder / "a")
    group = next(n for n in spec.groups if ".mlp." in n)
    alignment = align_checkpoints(folder / "a", folder / "b", folder / "out", spec=spec.select([group]))
    assert list(alignment.permutations) == [group]
    b, out = Checkpoint(folder / "b"), Checkpoint(folder / "out")
    changed = {k for k in b if not torch.equal(b[k], out[k])}
    assert changed <= {axis.parameter for axis in spec.groups[group].axes}


def test_matching_out_of_core_is_matching(folder, monkeypatch):
    monkeypatch.setattr("fastmatch.assignment.bounded_gain.CAST", 100)
    spec = trace_config(folder / "a")
    a, b = Checkpoint(folder / "a"), Checkpoint(folder / "b")
    held = match_weights(dict(a), dict(b), spec, fm.WeightMatching(seed=3))
    read = match_weights(a, b, spec, fm.WeightMatching(seed=3), Hooks(out_of_core=True))
    assert all(torch.equal(read.permutations[k], v) for k, v in held.permutations.items())
    assert read.objective == pytest.approx(held.objective, rel=1e-9)


def test_verify_holds_and_finds_a_changed_weight(folder, capsys):
    a, b = str(folder / "a"), str(folder / "b")
    assert main(["verify", a, b]) == 0
    assert verify_checkpoints(a, b).error < 1e-12
    checkpoint = Checkpoint(b)
    name = "model.layers.1.mlp.down_proj.weight"
    write_like(checkpoint, folder / "c", lambda n: checkpoint[n] + 1e-3 * (n == name))
    assert main(["verify", a, str(folder / "c")]) == 3
    assert "not the same function" in capsys.readouterr().err


def test_verify_holds_one_modules_parameters_at_a_time(folder, monkeypatch):
    held = []
    original = Checkpoint.__getitem__
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "a").eval()
    total = sum(p.numel() for p in model.parameters())

    def counted(self, name):
        held.append(sum(p.numel() for p in model.parameters() if p.device.type != "meta"))
        return original(self, name)

    monkeypatch.setattr(Checkpoint, "__getitem__", counted)
    tokens = {"input_ids": torch.randint(0, 50, (2, 6)), "use_cache": False}
    verify_checkpoints(folder / "a", folder / "b", model=model, example_inputs=(), kwargs=tokens)
    assert held
    assert max(held) < total / 5
    assert all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())


def killed(*paths):
    """Align in a child that is killed after four lines of its journal and half of another; return its status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        add, added = Journal.add, []

        def killing(self, *args):
            add(self, *args)
            added.append(args)
            if len(added) == 4:
                with open(self.path, "ab") as file:
                    file.write(b'{"group": "half')
                os.kill(os.getpid(), signal.SIGKILL)

        Journal.add = killing
        align_checkpoints(*paths)
    finally:
        os._exit(1)


def test_a_killed_run_goes_on_from_its_journal(folder):
    paths = [str(folder / x) for x in ("a", "b", "out")]
    undisturbed = align_checkpoints(*paths[:2], folder / "expected")
    assert killed(*paths) == -signal.SIGKILL
    assert names(folder) == [".out.journal", ".out.lock", "a", "b", "expected"]
    lines = journal_path(folder / "out").read_bytes().splitlines()
    assert len(lines) == 6  # the run, the objective, three groups, half a line
    others = {
        "seed": 1,
        "tolerance": 1e-3,
        "init": "identity",
        "include": "weights",
    }
    for name, value in others.items():
        with pytest.raises(
            ValueError, match=rf"\.out\.journal: is the journal of another run \(not the same: {name}\)"
        ):
            align_checkpoints(*paths, fm.WeightMatching(**{name: value}), resume=True)
    with pytest.raises(ValueError, match="not the same: init"):
        align_checkpoints(*paths, fm.WeightMatching(init=trace_config(paths[0]).identity()), resume=True)
    assert journal_path(folder / "out").read_bytes().splitlines() == lines
    resumed = align_checkpoints(*paths, fm.WeightMatching(max_sweeps=99), resume=True)
    assert names(folder) == ["a", "b", "expected", "out"]
    assert contents(folder / "out") == contents(folder / "expected")
    assert resumed.matching is not None
    assert undisturbed.matching is not None
    assert resumed.matching.objective == undisturbed.matching.objective
    assert resumed.matching.solves == undisturbed.matching.solves


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_single_files(tmp_path, suffix):
    model, x = build("mlp", 0)
    spec = fm.PermutationSpec.trace(model, x)
    paths = [tmp_path / f"{k}{suffix}" for k in ("a", "b", "out")]
    save_state(model.state_dict(), paths[0])
    save_state(fm.Alignment(spec.random(), spec).apply(model.state_dict()), paths[1])
    align_checkpoints(*paths, spec=spec)
    found = load_state(paths[2])
    assert all(torch.equal(found[k], v) for k, v in model.state_dict().items())
    assert verify_checkpoints(*paths[:2], model=model, example_inputs=x).error < 1e-12
    with pytest.raises(
        ValueError, match="returns no finite number on the inputs, so there is nothing to compare"
    ):
        verify_checkpoints(*paths[:2], model=model, example_inputs=x * torch.nan)


PAIRS = [
    (torch.float32, torch.float16), (torch.float16, torch.float32), (torch.bfloat16, torch.float16),
    (torch.float8_e4m3fn, torch.bfloat16), (torch.float32, torch.float8_e4m3fn),
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda x: str(x).removeprefix("torch."))
def test_a_merge_has_the_types_of_b(tmp_path, suffix, first, second):
    model, x = build("mlp", 0)
    spec = fm.PermutationSpec.trace(model, x)
    own = model.state_dict()
    a = {k: t.to(first) for k, t in own.items()} | {"ids": torch.arange(5), "step": torch.arange(5.0)}
    moved = fm.Alignment(spec.random(), spec).apply({k: t * 2 for k, t in own.items()})
    b = {k: t.to(second) for k, t in moved.items()} | {"ids": torch.arange(5.0) + 1, "step": torch.arange(5)}
    paths = [tmp_path / f"{k}{suffix}" for k in ("a", "b", "out")]
    save_state(a, paths[0])
    save_state(b, paths[1])
    alignment = align_checkpoints(*paths, spec=spec, write=WriteOptions(merge=0.25))
    found, aligned = load_state(paths[2]), alignment.apply(b)
    assert torch.equal(found.pop("ids"), b["ids"])
    assert torch.equal(found.pop("step"), b["step"])
    for name, tensor in found.items():
        assert torch.equal(
            tensor.float(), (0.75 * a[name].float() + 0.25 * aligned[name].float()).to(second).float()
        )
        assert tensor.dtype == second


@pytest.mark.parametrize("first", [torch.float32, torch.float64])
def test_a_merge_leaves_equal_tensors_as_they_are(tmp_path, first):
    model, x = build("mlp", 0)
    paths = [tmp_path / f"{k}.pt" for k in ("a", "b", "out")]
    positions = torch.arange(77.0)
    save_state(model.state_dict() | {"positions": positions.to(first)}, paths[0])
    save_state(model.state_dict() | {"positions": positions}, paths[1])
    spec = fm.PermutationSpec.trace(model, x)
    for share in (0.1, 0.3, 0.7, 0.9):
        align_checkpoints(*paths, spec=spec, write=WriteOptions(merge=share, force=True))
        assert torch.equal(load_state(paths[2])["positions"], positions)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """a and b in both formats, and a module that builds their network."""
    model, x = build("mlp", 0)
    spec = fm.PermutationSpec.trace(model, x)
    moved = fm.Alignment(spec.random(), spec).apply(model.state_dict())
    for suffix in ("pt", "safetensors"):
        save_state(model.state_dict(), tmp_path / f"a.{suffix}")
        save_state(moved, tmp_path / f"b.{suffix}")
    (tmp_path / "built_mlp.py").write_text(
        "from helpers.networks import build\ndef make():\n    return build('mlp', 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "built_mlp", raising=False)
    return model.state_dict()


MODEL = ["--model", "built_mlp:make"]


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("written", ["pt", "safetensors"])
def test_the_command_aligns_single_files_out_of_core(files, tmp_path, monkeypatch, suffix, written):
    mapped = []
    load = load_state

    def noted(path, *, mmap=False):
        mapped.append(mmap)
        return load(path, mmap=mmap)

    monkeypatch.setattr("fastmatch.checkpoint.reader.load_state", noted)
    arguments = ["align", f"a.{suffix}", f"b.{suffix}", *MODEL, "--out-of-core", "--out", f"out.{written}"]
    assert main([*arguments, "--permutations", "p.safetensors"]) == 0
    assert mapped == [True, True] * (suffix == "pt")  # safetensors are read tensor by tensor, never whole
    found = load_state(f"out.{written}")
    assert all(torch.equal(found[k], v) for k, v in files.items())
    moved = fm.Alignment.load("p.safetensors").apply(load_state(f"b.{suffix}"))
    assert all(torch.equal(moved[k], v) for k, v in files.items())
    assert not journal_path(f"out.{written}").exists()


def test_the_command_merges_out_of_core_in_another_type(files):
    arguments = [
        "align",
        "a.safetensors",
        "b.safetensors",
        *MODEL,
        "--out-of-core",
        "--out",
        "out.safetensors",
    ]
    assert main([*arguments, "--merge", "0.5", "--dtype", "bfloat16"]) == 0
    found = load_state("out.safetensors")
    assert all(torch.equal(found[k], v.bfloat16()) for k, v in files.items())


@pytest.mark.parametrize(("extra", "message"), [
    (["--dtype", "bfloat16"], "--dtype: is an option of --out-of-core"),
    (["--device", "cpu"], "--device: is an option of --out-of-core"),
    (["--resume"], "--resume: is an option of --out-of-core"),
    (["--out-of-core", "--permutations", "out.pt"], "same file as --out"),
    (["--out-of-core", "--permutations", "p.pt"], "--permutations: expected a file ending in .safetensors"),
    (["--out-of-core", "--out", "out.npz"], "--out: expected a file ending in"),
    (["--out-of-core", "--out", "a.pt"], "is one of the inputs"),
    (["--out-of-core", "--out", "a.pt", "--force"], "is one of the inputs"),
])  # fmt: skip
def test_what_is_impossible_out_of_core_is_refused(files, tmp_path, capsys, extra, message):
    before = names(tmp_path)
    assert main(["align", "a.pt", "b.pt", *MODEL, "--out", "out.pt", *extra]) == 2
    assert message in capsys.readouterr().err
    assert [n for n in names(tmp_path) if n != "__pycache__"] == before


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_pickles_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": _Evil()}, "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt: not a torch file that weights_only"):
        Checkpoint("evil.pt")
    assert names(tmp_path) == ["evil.pt"]


def truncate(path):
    shard = first_shard(path)
    shard.write_bytes(shard.read_bytes()[:-7])
    return rf"{shard.name}: not a readable safetensors file \(truncated: tensor '"


def damage_header(path):
    shard = first_shard(path)
    shard.write_bytes(b"\xff" * 8 + shard.read_bytes()[8:])
    return rf"{shard.name}: not a readable safetensors file"


def garble_header(path):
    shard = first_shard(path)
    data = bytearray(shard.read_bytes())
    data[8:12] = b"\xff\xfe{["
    shard.write_bytes(data)
    return rf"{shard.name}: not a readable safetensors file"


def remove_shard(path):
    shard = first_shard(path)
    shard.unlink()
    return rf"index.json: names {shard.name} for tensor '"


def index_names_too_much(path):
    index = path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["ghost"] = first_shard(path).name
    index.write_text(json.dumps(data))
    return "holds no tensor 'ghost'"


def index_leaves_the_folder(path):
    index = path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["ghost"] = "../a/model.safetensors"
    index.write_text(json.dumps(data))
    return "'ghost' is mapped to '../a/model.safetensors'"


def no_index(path):
    (path / "model.safetensors.index.json").unlink()
    return "holds neither"


def other_vocabulary(path):
    return rewrite(path, "lm_head.weight", lambda t: t[:-1], r"'lm_head.weight' has shape \(49, 32\)")


def other_shape(path):
    name = "model.layers.0.mlp.up_proj.weight"
    return rewrite(path, name, lambda t: t[:-2], rf"b: tensor '{name}' has shape \(46, 32\)")


def not_a_number(path):
    return rewrite(path, "model.norm.weight", lambda t: t * float("nan"), "'model.norm.weight' holds 32 NaN")


def rewrite(path, name, change, message):
    from safetensors.torch import save_file

    index = json.loads((path / "model.safetensors.index.json").read_text())
    shard = path / index["weight_map"][name]
    state = load_file(shard)
    state[name] = change(state[name]).contiguous()
    save_file(state, shard)
    return message


@pytest.mark.parametrize("harm", [
    truncate, damage_header, garble_header, remove_shard, index_names_too_much, index_leaves_the_folder, no_index,
    other_vocabulary, other_shape, not_a_number,
])  # fmt: skip
def test_harm_is_named_and_nothing_is_written(folder, harm):
    message = harm(folder / "b")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        align_checkpoints(folder / "a", folder / "b", folder / "out")
    assert names(folder) == ["a", "b"]


def test_a_shard_cut_while_it_is_read_is_named(folder):
    checkpoint = Checkpoint(folder / "b")
    shard = first_shard(folder / "b")
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(ValueError, match=rf"{shard.name}: tensor '.*': the file has changed"):
        list(checkpoint.values())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_that_is_written_again_while_it_is_read_is_named(tmp_path, suffix):
    path = tmp_path / f"m{suffix}"
    state = build("mlp", 0)[0].state_dict()
    save_state(state, path)
    checkpoint = Checkpoint(path)
    name = next(iter(state))
    assert torch.equal(checkpoint[name], state[name])
    save_state({k: v + 1 for k, v in state.items()}, path, force=True)
    with pytest.raises(
        ValueError, match=rf"m{suffix}: tensor '{name}': the file has changed since it was opened"
    ):
        checkpoint[name]


@pytest.mark.parametrize(("number", "is_kept"), [(errno.ENOSPC, True), (errno.EAGAIN, False)])
def test_a_command_whose_disk_is_full_says_that_what_is_solved_is_kept(
    folder, monkeypatch, capsys, number, is_kept
):
    def failing(*_):
        raise OSError(number, os.strerror(number), "model.safetensors")

    monkeypatch.setattr("fastmatch.checkpoint.writer.write_safetensors", failing)
    line = ["align", *(str(folder / x) for x in "ab"), "--max-sweeps", "1", "--out", str(folder / "out")]
    assert main(line) == 2
    resume = ". What is solved is kept: the same command with --resume goes on" if is_kept else ""
    assert capsys.readouterr().err == f"fastmatch align: model.safetensors: {os.strerror(number)}{resume}\n"


@pytest.mark.parametrize("force", [False, True])
def test_a_write_that_fails_names_file_and_tensor_and_leaves_nothing(folder, force):
    if force:
        (folder / "out").mkdir()
        (folder / "out" / "mine").write_text("mine")
    paths = [folder / x for x in ("a", "b", "out")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as a full disk: writes fail past it
    try:
        with pytest.raises(OSError, match=r"tensor '.*' could not be written .*out/model-"):
            align_checkpoints(*paths, fm.WeightMatching(max_sweeps=1), write=WriteOptions(force=force))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(folder) == [".out.journal", "a", "b"] + ["out"] * force  # the journal is for --resume
    if force:
        assert names(folder / "out") == ["mine"]
    align_checkpoints(*paths, write=WriteOptions(force=force), resume=True)
    assert names(folder / "out") == names(folder / "a")


def test_arguments(folder, capsys):
    a, b = str(folder / "a"), str(folder / "b")
    shard = str(first_shard(folder / "a"))
    assert main(["align", a, b, "--out", b, "--force"]) == 2
    assert "is one of the inputs" in capsys.readouterr().err
    assert main(["align", a, b, "--out", str(folder), "--force"]) == 2
    assert "holds one of the inputs" in capsys.readouterr().err
    assert main(["align", a, b, "--out", str(folder / "o"), "--dtype", "int64"]) == 2
    assert "--dtype: expected a floating point type" in capsys.readouterr().err
    assert main(["align", shard, shard, "--out", str(folder / "o")]) == 2
    assert "--model: needed" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected a directory, like"):
        align_checkpoints(a, shard, folder / "o")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        Checkpoint(folder / "none")
    (folder / "a" / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ValueError, match=r"a/config\.json: no model can be built"):
        trace_config(a)


@pytest.mark.parametrize("init", ["identity", "permutations"])
def test_a_matcher_starts_where_it_says_and_is_part_of_the_journals_key(folder, init):
    a, b = (Checkpoint(folder / x) for x in "ab")
    spec = trace_config(folder / "a")
    matcher = fm.WeightMatching(init="identity" if init == "identity" else spec.random())
    found = align_checkpoints(folder / "a", folder / "b", folder / "out", matcher)
    expected = match_weights(a, b, spec, matcher, Hooks(out_of_core=True))
    assert found.matching is not None
    # The first value is the survey's: its sums are of other parts, and round otherwise in the last bits.
    assert found.matching.objective == pytest.approx(expected.objective, rel=1e-13)
    assert all(torch.equal(found.permutations[k], v) for k, v in expected.permutations.items())


@pytest.mark.parametrize(
    "matcher",
    [
        fm.ActivationMatching([torch.zeros(2, 6)]),
        fm.FisherMatching([(torch.zeros(2, 6), torch.zeros(2, dtype=torch.long))]),
        "weights",
    ],
)
def test_only_weight_matching_works_out_of_core(folder, matcher):
    message = rf"matcher: expected a WeightMatching, .*got {type(matcher).__name__}"
    with pytest.raises(TypeError, match=message):
        align_checkpoints(folder / "a", folder / "b", folder / "out", matcher)
    assert names(folder) == ["a", "b"]


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"merge": float("nan")}, ValueError, "merge: expected a finite number"),
    ({"merge": True}, TypeError, "merge: expected a finite number; got True"),
    ({"merge": "half"}, TypeError, "merge: expected a finite number; got 'half'"),
    ({"dtype": torch.int8}, ValueError, "dtype: expected a floating point type"),
    ({"dtype": "bfloat16"}, TypeError, "dtype: expected a floating point type"),
    ({"force": 1}, TypeError, "force: expected a bool, got int"),
])  # fmt: skip
def test_write_options_check_themselves(options, error, message):
    with pytest.raises(error, match=message):
        WriteOptions(**options)


@pytest.mark.parametrize("progress", [True, False, None])
def test_progress_reaches_the_bars(folder, monkeypatch, progress):
    shown = set()

    def bar(items, title, *, show=None, total=None):
        shown.add(show)
        return iter(items)

    monkeypatch.setattr("fastmatch.matching.ascent.progress_bar", bar)
    align_checkpoints(folder / "a", folder / "b", folder / "out", progress=progress)
    assert shown == {progress}


def test_inputs_without_a_model_are_refused(folder):
    with pytest.raises(ValueError, match="example_inputs: expected a model to run them on"):
        verify_checkpoints(folder / "a", folder / "b", example_inputs=torch.zeros(1, 2))
