"""Merges on disk: weights, weights by block, added differences, and what the checkpoints do not have in common."""

from __future__ import annotations

import logging
import re
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastmatch as fm
from fastmatch.checkpoint import (
    MergeOptions,
    align_checkpoints,
    apply_to_checkpoint,
    merge_checkpoints,
    reader,
    unet_blocks,
)
from fastmatch.cli.main import main

UNET = "model.diffusion_model."
INPUTS, OUTPUTS = 3, 2
NAMES = [
    *(f"{UNET}input_blocks.{i}.0.weight" for i in range(INPUTS)), f"{UNET}middle_block.1.proj.weight",
    *(f"{UNET}output_blocks.{i}.0.weight" for i in range(OUTPUTS)), f"{UNET}time_embed.0.weight", f"{UNET}out.2.weight",
    "first_stage_model.decoder.conv_in.weight",
]  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """Paths of files a, b, c and base, whose entries are all 1, 2, 4 and 8."""
    for name, value in (("a", 1.0), ("b", 2.0), ("c", 4.0), ("base", 8.0)):
        state = {key: torch.full((2, 3), value, dtype=torch.float16) for key in NAMES}
        state["step"] = torch.tensor(int(value))
        save_file(
            state, tmp_path / f"{name}.safetensors", metadata={"format": "pt", "from": name, "by": "me"}
        )
    return {name: tmp_path / f"{name}.safetensors" for name in ("a", "b", "c", "base", "out")}


def merged(files, names, options):
    merge_checkpoints([files[n] for n in names], files["out"], options)
    out = load_file(files["out"])
    assert out.pop("step") == 1
    assert sorted(out) == sorted(NAMES)
    assert all(t.dtype == torch.float16 and bool((t == t[0, 0]).all()) for t in out.values())
    return {name: float(t[0, 0]) for name, t in out.items()}


def test_weights_of_several_checkpoints(files):
    assert set(merged(files, "abc", MergeOptions([0.5, 0.25, 0.25])).values()) == {0.5 + 0.5 + 1.0}
    with safe_open(files["out"], framework="pt") as file:
        assert file.metadata() == {"format": "pt", "by": "me"}


def test_a_torch_file_has_no_metadata_in_common_with_another(files):
    other = files["b"].with_suffix(".ckpt")
    torch.save(load_file(files["b"]), other)
    merge_checkpoints([files["a"], other], files["out"], MergeOptions())
    with safe_open(files["out"], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_differences_to_a_base_are_added_to_the_first(files):
    found = merged(files, "abc", MergeOptions([0.5, 0.25], base=files["base"]))
    assert set(found.values()) == {1 + 0.5 * (2 - 8) + 0.25 * (4 - 8)}


def test_the_first_pattern_that_fits_a_name_counts(files):
    blocks = {"*input_blocks.0.*": 1, "*input_blocks.*": 0.75, "first_stage_model.*": 0}
    found = merged(files, "ab", MergeOptions([0.5, 0.5], blocks))
    expected = {NAMES[0]: 2.0, NAMES[1]: 1.75, NAMES[2]: 1.75, NAMES[-1]: 1.0}
    assert found == {name: expected.get(name, 1.5) for name in NAMES}


def test_a_pattern_has_one_weight_for_each_checkpoint_but_the_first(files):
    found = merged(files, "abc", MergeOptions(blocks={"*middle_block*": [0.25, 0.5]}, weights=[1, 0, 0]))
    assert found[NAMES[INPUTS]] == 0.25 + 0.5 + 2
    assert found[NAMES[0]] == 1
    with pytest.raises(ValueError, match="expected 2 numbers, one for each checkpoint but the first, got 1"):
        merged(files, "abc", MergeOptions(blocks={"*middle_block*": 0.5}))


def test_numbers_are_input_blocks_the_middle_and_output_blocks(files):
    numbers = [0.0, 0.25, 0.5, 0.75, 1.0, 0.5]
    found = merged(files, "ab", MergeOptions([1, 0], unet_blocks(numbers, NAMES)))
    inner = dict(zip(NAMES[:6], numbers, strict=True)) | {NAMES[6]: 0.0, NAMES[7]: 0.5, NAMES[8]: 0.0}
    assert found == {name: 1 + value for name, value in inner.items()}
    with pytest.raises(
        ValueError, match=r"expected 6 numbers \(3 input blocks, .* 2 output blocks\), got 25"
    ):
        unet_blocks([0.5] * 25, NAMES)


@pytest.mark.parametrize("pattern", ["out.*", "time_embed.*", "label_emb.*", "*diffusion_model.label_emb.*"])
def test_a_pattern_that_fits_nothing_is_refused(files, pattern):
    with pytest.raises(ValueError, match=rf"blocks\['{re.escape(pattern)}'\]: fits no tensor"):
        merged(files, "ab", MergeOptions([0.5, 0.5], {pattern: 0.1}))
    assert pattern not in unet_blocks([0.5] * 6, NAMES)


def test_a_pattern_means_the_same_whatever_the_weights_are(files):
    with pytest.warns(UserWarning, match=r"weights sum to 1\.5"):
        found = merged(files, "ab", MergeOptions([1.0, 0.5], {NAMES[0]: 0.5}))
    assert found[NAMES[0]] == 0.5 + 0.5 * 2
    assert found[NAMES[1]] == 1 + 0.5 * 2


@pytest.mark.parametrize("second", [torch.float32, torch.int64])
@pytest.mark.parametrize("count", [2, 3])
def test_equal_tensors_stay_as_they_are(tmp_path, second, count):
    """As the positions of CLIP, which some files have in float32: one that is rounded below a whole number is another position."""
    paths = [tmp_path / f"{k}.safetensors" for k in range(count + 1)]
    ids = torch.arange(77)[None]
    for k, path in enumerate(paths[:-1]):
        save_file(
            {"position_ids": ids.to(second if k else torch.float32), "w": torch.full((3,), float(k))}, path
        )
    for share in (0.1, 0.3, 0.45, 0.7, 0.9):
        weights = [1 - share, *[share / (count - 1)] * (count - 1)]
        merge_checkpoints(paths[:-1], paths[-1], MergeOptions(weights), force=True)
        found = load_file(paths[-1])
        assert torch.equal(found["position_ids"], ids.float())
        assert found["w"].tolist() == pytest.approx([share if count == 2 else 1.5 * share] * 3)
    with pytest.warns(UserWarning, match="weights sum to 2"):
        merge_checkpoints(paths[:-1], paths[-1], MergeOptions([2.0, *[0.0] * (count - 1)]), force=True)
    assert torch.equal(load_file(paths[-1])["position_ids"], 2 * ids.float())


def test_running_means_follow_the_blocks_of_their_weights(tmp_path):
    means = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in NAMES[:-1]}
    paths = [tmp_path / f"{x}.safetensors" for x in ("a", "b", "out")]
    for path, value in zip(paths, (1.0, 2.0), strict=False):
        save_file({name: torch.full((2,), value) for name in [*NAMES, *means.values()]}, path)

    def values(blocks):
        merge_checkpoints(paths[:2], paths[2], MergeOptions([0.875, 0.125], blocks), force=True)
        return {name: float(tensor[0]) for name, tensor in load_file(paths[2]).items()}

    found = values(unet_blocks([0.0, 0.25, 0.5, 0.75, 1.0, 0.5], [*NAMES, *means.values()]))
    assert {found[name] for name in NAMES} == {1.0, 1.25, 1.5, 1.75, 2.0, 1.125}
    assert all(found[mean] == found[name] for name, mean in means.items())
    found = values({"*input_blocks.0.*": 1, "*input_blocks*": 0.5, "*.out.*": 0.25})
    assert [found[NAMES[0]], found[NAMES[1]], found[NAMES[7]]] == [2, 1.5, 1.25]
    assert all(found[mean] == found[name] for name, mean in means.items())
    found = values({"model_ema.*": 0})
    assert {found[mean] for mean in means.values()} == {1}
    assert {found[name] for name in NAMES} == {1.125}


def test_the_command_takes_numbers_patterns_and_a_base(files, capsys):
    paths = [str(files[x]) for x in "ab"]
    arguments = ["merge", *paths, "--out", str(files["out"]), "--force"]
    assert main([*arguments, "--weights", "1", "0", "--block-weights", "0,0.25,0.5,0.75,1,0.5"]) == 0
    assert load_file(files["out"])[NAMES[1]][0, 0] == 1.25
    assert main([*arguments, "--block-weights", "*middle_block.*=0.25"]) == 0
    assert load_file(files["out"])[NAMES[INPUTS]][0, 0] == 1.25
    assert main([*arguments, "--add-difference", str(files["base"]), "--dtype", "float32"]) == 0
    assert load_file(files["out"])[NAMES[0]].dtype == torch.float32
    assert load_file(files["out"])[NAMES[0]][0, 0] == 1 + 2 - 8
    capsys.readouterr()


@pytest.mark.parametrize(("options", "message"), [
    (["--block-weights", "0,0.5"], "expected 6 numbers"),
    (["--block-weights", "midle=0.5"], r"blocks\['midle'\]: fits no tensor"),
    (["--block-weights", "x=half"], "--block-weights: expected numbers after 'x='"),
    (["--biases", "remove"], "--biases: needs --model"),
    (["--weights", "1"], "weights: expected 2"),
    (["--dtype", "int8"], "--dtype: expected a floating point type"),
])  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(files, capsys, options, message):
    assert main(["merge", *(str(files[x]) for x in "ab"), "--out", str(files["out"]), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not files["out"].exists()


def test_what_another_checkpoint_lacks_or_has_wider_is_the_firsts_and_named(files, caplog):
    state = load_file(files["b"])
    state[NAMES[0]] = torch.full((2, 4), 2.0, dtype=torch.float16)
    del state[NAMES[-1]]
    state["extra"] = torch.ones(1)
    save_file(state, files["b"])
    with caplog.at_level(logging.WARNING, logger="fastmatch"):
        found = merged(files, "abc", MergeOptions([0.5, 0.25, 0.25]))
    assert found[NAMES[0]] == found[NAMES[-1]] == 0.75 + 1
    assert found[NAMES[1]] == 2
    text = caplog.text
    assert f"has another size of 1 of the {len(NAMES) + 1} tensors" in text
    assert f"lacks 1 of the {len(NAMES) + 1} tensors" in text
    assert "1 tensors that" in text
    assert "left out, such as extra" in text
    found = merged_with_force(files, "ab", MergeOptions([0.5], base=files["base"]))
    assert found[NAMES[0]] == found[NAMES[-1]] == 1
    assert found[NAMES[1]] == 1 - 3


def test_nothing_is_added_to_what_the_base_need_not_have(tmp_path, caplog):
    """A pruned base has no running means, VAE, schedules or positions."""
    parts = [
        f"{UNET}out.2.weight",
        "model_ema.diffusion_modelout2weight",
        "first_stage_model.conv_in.weight",
        "alphas_cumprod",
    ]
    text = "cond_stage_model.text_model."
    paths = {x: tmp_path / f"{x}.safetensors" for x in ("a", "b", "base", "out")}
    for role, value in (("a", 1.0), ("b", 2.0), ("base", 8.0)):
        state = {
            name: torch.full((2,), value)
            for name in [*parts, f"{text}final.weight", f"{text}position_ids", "ids"]
        }
        state |= {"ids": torch.arange(3), f"{UNET}count": torch.tensor(1)}
        if role == "base":
            state = {name: state[name] for name in (parts[0], f"{text}final.weight")} | {
                "ids": torch.arange(4)
            }
        save_file(state, paths[role])
    call = [paths["a"], paths["b"]], paths["out"], MergeOptions(base=paths["base"])
    merge_checkpoints(*call)
    found = load_file(paths["out"])
    assert {float(found[name][0]) for name in (parts[0], f"{text}final.weight")} == {1 + 2 - 8}
    assert all(found[name].tolist() == [1, 1] for name in [*parts[1:], f"{text}position_ids"])
    (line,) = [record.getMessage() for record in caplog.records]
    assert "base.safetensors: lacks 4 of the 8 tensors" in line
    assert "nothing is added to those" in line
    save_file({f"{UNET}other.weight": torch.ones(2), f"{text}final.weight": torch.ones(2)}, paths["base"])
    with pytest.raises(
        ValueError,
        match=r"base\.safetensors: has no tensor 'model\.diffusion_model\.out\.2\.weight', which .*a\.",
    ):
        merge_checkpoints(*call)
    save_file({"x": torch.ones(2)}, paths["base"])
    with pytest.raises(ValueError, match=r"base\.safetensors: has none of the tensors of .*a\.safetensors"):
        merge_checkpoints(*call)


def merged_with_force(files, names, options):
    files["out"].unlink()
    return merged(files, names, options)


@pytest.mark.parametrize(("inputs", "options", "shared", "own"), [
    ((9, 4, 4), MergeOptions([0.5, 0.5]), 1.5, [1.0]),
    ((4, 9, 4), MergeOptions([0.5, 0.5]), 1.5, []),
    ((9, 4, 4), MergeOptions([1.0], base="base"), 1.0 + (2 - 8), [1.0]),
    ((4, 9, 4), MergeOptions([1.0], base="base"), 1.0 + (2 - 8), []),
    ((9, 8, 4), MergeOptions([0.5, 0.5]), 1.5, [1.0]),
    ((8, 9, 4), MergeOptions([0.5, 0.5]), 1.5, [1.0]),
    ((5, 9, 4), MergeOptions([0.5, 0.5]), 1.5, [1.0]),
    ((9, 8, 5), MergeOptions([1.0], base="base"), 1.0 + (2 - 8), [1.0]),
    ((9, 9, 8), MergeOptions([1.0], base="base"), 1.0 + (2 - 8), [1.0]),
    ((5, 9, 9), MergeOptions([1.0], base="base"), 1.0 + (2 - 8), [1.0]),
])  # fmt: skip
def test_of_other_input_channels_only_the_latents_are_merged(tmp_path, caplog, inputs, options, shared, own):
    """As of a UNet for inpainting (9) and a plain one (4), of pix2pix (8) or of depth (5)."""
    name, path = f"{UNET}input_blocks.0.0.weight", {}
    for role, count, value in zip(("a", "b", "base"), inputs, (1.0, 2.0, 8.0), strict=True):
        path[role] = tmp_path / f"{role}.safetensors"
        save_file({name: torch.full((2, count, 3, 3), value), "x": torch.full((2,), value)}, path[role])
    options = replace(options, base=options.base and path["base"])
    with caplog.at_level(logging.WARNING, logger="fastmatch"):
        merge_checkpoints([path["a"], path["b"]], tmp_path / "out.safetensors", options)
    found = load_file(tmp_path / "out.safetensors")[name]
    assert found.shape[1] == inputs[0]
    assert found[:, :4].unique().tolist() == [shared]
    assert found[:, 4:].unique().tolist() == own
    line = "has other input channels in 1 of the 2 tensors"
    assert (line in caplog.text) == (inputs[0] != inputs[1])


def test_numbers_of_eight_bits_are_merged(tmp_path):
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_file({"x": torch.full((2, 3), value).to(torch.float8_e4m3fn)}, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{x}.safetensors" for x in ("a", "b", "out")]
    merge_checkpoints(paths[:2], paths[2])
    found = load_file(paths[2])["x"]
    assert found.dtype == torch.float8_e4m3fn
    assert bool((found.float() == 1.5).all())
    both = fm.merge([load_file(path) for path in paths[:2]])
    assert torch.equal(both["x"].float(), found.float())


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale", "scale_input"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_numbers_of_eight_bits_with_scales_are_refused(tmp_path, scale, dtype):
    paths = {x: tmp_path / f"{x}.safetensors" for x in ("a", "b", "out")}
    plain = {"l.weight": torch.ones(4, 4), f"l.{scale}": torch.tensor(0.5)}
    save_file(plain, paths["a"])
    save_file(plain | {"l.weight": torch.ones(4, 4).to(dtype)}, paths["b"])
    message = (
        rf"b\.safetensors: tensor 'l\.weight' is {str(dtype)[6:]} and counts only with its scale 'l\.{scale}'"
    )
    spec = fm.PermutationSpec({}, {})
    for call in (
        lambda: merge_checkpoints([paths["a"], paths["b"]], paths["out"]),
        lambda: merge_checkpoints([paths["a"]] * 2, paths["out"], MergeOptions(base=paths["b"])),
        lambda: align_checkpoints(paths["a"], paths["b"], paths["out"], spec=spec),
        lambda: apply_to_checkpoint(fm.Alignment({}, spec), paths["b"], paths["out"]),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not paths["out"].exists()


def test_what_is_no_list_or_number_is_named(files):
    with pytest.raises(TypeError, match="paths: expected a list of at least two checkpoints, got '"):
        merge_checkpoints(str(files["a"]), files["out"], MergeOptions())
    for value in ("x", [None], {}):
        with pytest.raises(TypeError, match=r"blocks\['\*input_blocks\*'\]: expected a number"):
            merged(files, "ab", MergeOptions(blocks={"*input_blocks*": value}))


def test_a_lora_and_permutations_are_no_models(files, capsys):
    lora, moved = files["b"].with_name("lora.safetensors"), files["b"].with_name("moved.safetensors")
    save_file({"lora_unet_x.lora_up.weight": torch.ones(2, 1), "lora_unet_x.alpha": torch.ones(())}, lora)
    spec = fm.PermutationSpec({}, {NAMES[0]: (2, 3)})
    fm.Alignment({}, spec).save(moved)
    a = str(files["a"])
    for wrong, message in (
        (lora, "holds a LoRA, not a model; `fastmatch apply"),
        (moved, "holds permutations, as"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_checkpoints([a, wrong], files["out"], MergeOptions())
        for arguments in ([a, str(wrong)], [str(wrong), a]):
            assert main(["align", *arguments, "--out", str(files["out"])]) == 2
            assert message in capsys.readouterr().err
    assert main(["apply", str(moved), str(moved), "--out", str(files["out"])]) == 2
    assert "holds permutations, as" in capsys.readouterr().err


def test_another_architecture_is_refused(files):
    save_file({name: torch.ones(3, 3) for name in NAMES}, files["b"])
    with pytest.raises(ValueError, match="architectures must be equal"):
        merged(files, "ab", MergeOptions())
    save_file({"x": torch.ones(3, 3)}, files["b"])
    with pytest.raises(ValueError, match="architectures must be equal"):
        merged(files, "ab", MergeOptions())


def layers(inputs, hidden, outputs):
    return {
        "a.weight": torch.ones(hidden, inputs), "a.bias": torch.ones(hidden), "b.weight": torch.ones(outputs, hidden),
        "b.bias": torch.ones(outputs),
    }  # fmt: skip


def test_other_classes_are_left_out_and_other_hidden_units_are_refused(tmp_path, caplog):
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("first", "classes", "hidden", "out")}
    save_file(layers(4, 6, 3), paths["first"])
    save_file({name: 3 * t for name, t in layers(4, 6, 2).items()}, paths["classes"])
    save_file(layers(4, 5, 3), paths["hidden"])
    with caplog.at_level(logging.WARNING, logger="fastmatch"):
        merge_checkpoints([paths["first"], paths["classes"]], paths["out"])
    assert "has another size of 2 of the 4 tensors" in caplog.text
    found = load_file(paths["out"])
    assert found["a.weight"].unique().tolist() == [2]
    assert found["b.weight"].unique().tolist() == [1]
    with pytest.raises(
        ValueError,
        match=r"hidden.*: has 5 units between 'a\.weight' and 'b\.weight', .* has 6; architectures",
    ):
        merge_checkpoints([paths["first"], paths["hidden"]], tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


def test_a_merge_that_overflows_is_refused_by_name(files):
    with pytest.raises(ValueError, match=r"nothing is written: the merge: tensor .* holds 6 NaN or infinite"):
        merged(files, "ab", MergeOptions([1.0], base=files["base"], blocks={"*": 1e6}))
    assert not files["out"].exists()


def test_every_tensor_is_read_once_and_three_are_held(files, monkeypatch):
    reads, held, most = [], set(), 0
    plain = reader.read_entry

    def counted(name, entry):
        nonlocal most
        tensor = plain(name, entry)
        reads.append((entry.file, name))
        held.add(id(tensor))
        weakref.finalize(tensor, held.discard, id(tensor))
        most = max(most, len(held))
        return tensor

    monkeypatch.setattr(reader, "read_entry", counted)
    merged(files, "abc", MergeOptions())
    floats = [r for r in reads if r[1] != "step"]
    assert len(floats) == len(set(floats)) == 3 * len(NAMES)
    assert most <= 3


def test_masks_must_be_equal_and_stay_as_they_are(tmp_path):
    mask = torch.tensor([1.0, 0.0, 1.0])
    for name, value in (("a", 1.0), ("b", 3.0), ("base", 2.0)):
        save_file({"weight_orig": torch.full((3,), value), "weight_mask": mask}, tmp_path / name)
    save_file({"weight_orig": torch.ones(3), "weight_mask": 1 - mask}, tmp_path / "other")
    for base, expected in ((None, 2.0), (tmp_path / "base", 1.5)):
        options = MergeOptions([0.5] if base else [0.5, 0.5], base=base)
        merge_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "out", options, force=True)
        found = load_file(tmp_path / "out")
        assert torch.equal(found["weight_mask"], mask)
        assert found["weight_orig"].tolist() == [expected] * 3
        with pytest.raises(ValueError, match=r"other: tensor 'weight_mask'.*prune.remove"):
            merge_checkpoints([tmp_path / "a", tmp_path / "other"], tmp_path / "no", options)
    assert not (tmp_path / "no").exists()
