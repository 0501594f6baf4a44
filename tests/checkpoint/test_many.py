"""Many checkpoints aligned to one on disk: results, merges in one pass, bounded work and memory, and runs that go on."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmatch as fm
from fastmatch._internal.files import save_state
from fastmatch.checkpoint import MergeOptions, WriteOptions, align_many_checkpoints, many, reader
from fastmatch.cli.main import main
from fastmatch.permutations.apply import apply_permutations
from helpers.networks import build, fresh_seed


@pytest.fixture
def planted(tmp_path):
    """Twelve small files, of which all but the first are the first with its units moved; their paths and the spec."""
    torch.manual_seed(fresh_seed())
    model, x = build("mlp", fresh_seed())
    spec = fm.PermutationSpec.trace(model, x)
    paths = [tmp_path / f"m{k}.safetensors" for k in range(12)]
    for k, path in enumerate(paths):
        state = model.state_dict() if k == 0 else fm.Alignment(spec.random(), spec).apply(model.state_dict())
        save_file(state, path, metadata={"format": "pt"})
    return paths, spec


class Reads:
    """Counts the reads of every file, and the largest number of bytes that were held at once."""

    def __init__(self, monkeypatch):
        self.count, self.held, self.most = Counter(), 0, 0
        plain = reader.read_entry

        def counted(name, entry):
            tensor = plain(name, entry)
            self.count[entry.file.name] += 1
            self.held += tensor.nbytes
            self.most = max(self.most, self.held)
            weakref.finalize(tensor, self.freed, tensor.nbytes)
            return tensor

        monkeypatch.setattr(reader, "read_entry", counted)

    def freed(self, nbytes):
        self.held -= nbytes


def test_every_checkpoint_is_written_in_the_order_of_the_reference(planted, tmp_path):
    paths, spec = planted
    found = align_many_checkpoints(paths, tmp_path / "out", spec=spec)
    assert len(found) == 12
    assert found[0].moved == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in paths[1:])
    expected = load_file(paths[0])
    for path in (tmp_path / "out").iterdir():
        assert all(torch.equal(v, expected[k]) for k, v in load_file(path).items())
    assert not list(tmp_path.glob(".out*"))


def test_another_reference_and_a_merge_in_the_given_order_of_weights(planted, tmp_path):
    paths, spec = planted
    for k, path in enumerate(paths[:3]):
        save_file({**load_file(path), "mark": torch.tensor([float(k)])}, path)
    weights = MergeOptions([0.5, 0.25, 0.25])
    found = align_many_checkpoints(
        paths[:3], tmp_path / "out.safetensors", spec=spec, reference=1, merge=weights
    )
    assert found[1].moved == 0
    assert found[0].moved
    out, expected = load_file(tmp_path / "out.safetensors"), load_file(paths[1])
    assert out.pop("mark") == 0.25 + 0.5
    assert all(torch.allclose(v, expected[k], atol=1e-6) for k, v in out.items())


@pytest.mark.parametrize("merge", [None, MergeOptions()])
def test_work_is_linear_and_memory_bounded_in_the_number_of_files(planted, tmp_path, monkeypatch, merge):
    paths, spec = planted
    few = Reads(monkeypatch)
    align_many_checkpoints(paths[:3], tmp_path / "few.safetensors", spec=spec, merge=merge)
    monkeypatch.undo()
    all_ = Reads(monkeypatch)
    align_many_checkpoints(paths, tmp_path / "all.safetensors", spec=spec, merge=merge)
    reference, second = paths[0].name, paths[1].name
    # A file's reads do not depend on how many others there are, and the reference is read once more for each.
    assert all_.count[second] == few.count[second]
    assert all_.count[reference] <= 11 * max(all_.count[p.name] for p in paths[1:])
    assert all_.most <= few.most


def test_a_killed_run_goes_on_and_repeats_nothing(planted, tmp_path, monkeypatch):
    paths, spec = planted
    out = tmp_path / "out"
    plain, calls = many.write_like, []

    def killed(source, place, *arguments, **options):
        calls.append(place.name)
        if len(calls) == 6:
            raise KeyboardInterrupt
        plain(source, place, *arguments, **options)

    monkeypatch.setattr(many, "write_like", killed)
    with pytest.raises(KeyboardInterrupt):
        align_many_checkpoints(paths, out, spec=spec)
    assert len(list(out.iterdir())) == 5
    with pytest.raises(FileExistsError):
        align_many_checkpoints(paths[::-1], out, spec=spec)  # another run, without resume
    assert len(list(out.iterdir())) == 5


def test_what_is_finished_is_kept_for_a_run_that_goes_on(planted, tmp_path, monkeypatch):
    paths, spec = planted
    plain, matched = many.Pair.match, []

    def match(pair, *arguments, **options):
        matched.append(pair.b.path.name)
        if len(matched) == 4:
            raise KeyboardInterrupt
        return plain(pair, *arguments, **options)

    monkeypatch.setattr(many.Pair, "match", match)
    with pytest.raises(KeyboardInterrupt):
        align_many_checkpoints(paths[:6], tmp_path / "out", spec=spec)
    first = sorted((tmp_path / "out").iterdir())
    assert [p.name for p in first] == ["m1.safetensors", "m2.safetensors", "m3.safetensors"]
    times = [p.stat().st_mtime_ns for p in first]
    matched[:] = [""] * 4
    found = align_many_checkpoints(paths[:6], tmp_path / "out", spec=spec, resume=True)
    assert matched[4:] == ["m4.safetensors", "m5.safetensors"]
    assert [p.stat().st_mtime_ns for p in first] == times
    assert [f.matching is None for f in found] == [True] * 4 + [False] * 2
    expected = load_file(paths[0])
    assert all(
        torch.equal(v, expected[k])
        for path in (tmp_path / "out").iterdir()
        for k, v in load_file(path).items()
    )
    assert not list(tmp_path.glob(".out*"))


def test_a_file_that_changed_is_matched_again(planted, tmp_path, monkeypatch):
    paths, spec = planted
    plain = many.write_merge

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(many, "write_merge", killed)
    with pytest.raises(KeyboardInterrupt):
        align_many_checkpoints(paths[:3], tmp_path / "out.safetensors", spec=spec, merge=MergeOptions())
    monkeypatch.setattr(many, "write_merge", plain)
    save_file(load_file(paths[5]), paths[2], metadata={"format": "pt"})
    found = align_many_checkpoints(
        paths[:3], tmp_path / "out.safetensors", spec=spec, merge=MergeOptions(), resume=True
    )
    assert [f.matching is None for f in found] == [True, True, False]
    out, expected = load_file(tmp_path / "out.safetensors"), load_file(paths[0])
    assert all(torch.allclose(v, expected[k], atol=1e-6) for k, v in out.items())


@pytest.mark.parametrize(("change", "message"), [
    (lambda paths, options: paths.append(paths[1]), "expected each checkpoint once|have the same name"),
    (lambda paths, options: paths.__delitem__(slice(1, None)), "expected at least two"),
    (lambda paths, options: options.update(reference=12), "reference: expected an index below 12"),
    (lambda paths, options: options.update(write=WriteOptions(merge=0.5)), "is for two checkpoints"),
    (lambda paths, options: options.update(merge=MergeOptions(base="x")), "has an order of units of its own"),
    (lambda paths, options: options.update(merge=MergeOptions([1.0])), "weights: expected 12"),
    (lambda paths, options: options.update(merge=MergeOptions(blocks={"x": [0.1] * 11})), r"blocks\['x'\]: fits no tensor"),
])  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(planted, tmp_path, change, message):
    paths, spec = planted
    options = {"spec": spec}
    change(paths, options)
    with pytest.raises(ValueError, match=message):
        align_many_checkpoints(paths, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_numbers_that_are_not_finite_are_told_before_the_proof(tmp_path, monkeypatch):
    """A NaN in a file is likelier than a proof that fails."""
    diffusion = pytest.importorskip("helpers.diffusion")
    state = diffusion.random_file(diffusion.small_shapes("unet"), torch.Generator().manual_seed(fresh_seed()))
    name = "model.diffusion_model.out.2.bias"
    for file, tensor in (("a", state[name]), ("b", torch.full_like(state[name], float("inf")))):
        save_state(state | {name: tensor}, tmp_path / f"{file}.safetensors")
    proved = []
    monkeypatch.setattr(many, "prove_checkpoint", lambda *args: proved.append(args))
    paths = [tmp_path / f"{x}.safetensors" for x in "ab"]
    with pytest.raises(ValueError, match=rf"b\.safetensors: tensor '{name}' holds 4 NaN or infinite"):
        align_many_checkpoints(paths, tmp_path / "out")
    assert not proved
    save_file(state, paths[1])
    align_many_checkpoints(paths, tmp_path / "out")
    assert len(proved) == 1


def test_files_of_diffusion_models_are_traced_once_and_merged(tmp_path, capsys, monkeypatch):
    diffusion = pytest.importorskip("helpers.diffusion")
    shapes, spec = diffusion.small_shapes("unet"), diffusion.small_spec("unet")
    generator = torch.Generator().manual_seed(fresh_seed())
    a = diffusion.random_file(shapes, generator)
    traced = []
    plain = many.trace_checkpoint
    monkeypatch.setattr(many, "trace_checkpoint", lambda *args: traced.append(args) or plain(*args))
    paths = [str(tmp_path / f"{x}.safetensors") for x in "abc"]
    for k, path in enumerate(paths):
        save_state(a if k == 0 else apply_permutations(a, spec, spec.random(generator)), path)
    out = str(tmp_path / "out.safetensors")
    arguments = ["align-many", *paths, "--reference", "first", "--out", out, "--merge-all"]
    assert main([*arguments, "--weights", "0.5", "0.25", "0.25"]) == 0
    assert len(traced) == 1
    assert all(
        torch.allclose(v.float(), a[k].float(), rtol=2e-3, atol=1e-6) for k, v in load_file(out).items()
    )
    said = capsys.readouterr().out
    assert said.count("proved to keep the function") == 2
    assert f"wrote {out}" in said
    assert main(["align-many", *paths, "--out", str(tmp_path / "folder"), "--reference", paths[1]]) == 0
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["a.safetensors", "c.safetensors"]
    b = load_file(paths[1])
    assert all(torch.equal(v, b[k]) for k, v in load_file(tmp_path / "folder" / "a.safetensors").items())


@pytest.mark.parametrize(("options", "message"), [
    (["--reference", "z"], "--reference: expected 'first' or one of the checkpoints"),
    (["--strategy", "merge-many"], "--strategy: merge-many needs --model"),
    (["--matcher", "activations", "--data", "x:y"], "--matcher: "),
    (["--weights", "1", "1"], "--weights: is an option of --merge-all"),
    (["--out", "x", "y"], "--out: expected one"),
    ([], "--model: needed unless"),
])  # fmt: skip
def test_bad_options_are_one_line(planted, capsys, tmp_path, options, message):
    paths, _ = planted
    assert main(["align-many", *map(str, paths[:2]), "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
