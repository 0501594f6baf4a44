"""A LoRA that follows its model: merged with the LoRA, then aligned, is aligned, then merged with the permuted LoRA."""

from __future__ import annotations

import pytest
import torch
from numpy.random import SeedSequence
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastmatch as fm
from fastmatch.checkpoint.diffusion.lora import permute_lora
from fastmatch.checkpoint.diffusion.single_file import trace_file
from fastmatch.cli.main import main
from helpers.diffusion import CLIP, TINY_UNET, diffusers, names_in_file, random_file, small_shapes, small_spec

RANK = 3


@pytest.fixture(scope="module")
def model():
    """B in float64 under the names of its file, B permuted, and the alignment that permutes it."""
    seed = int(SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    shapes = small_shapes("tiny")
    b = random_file(shapes, generator, torch.float64)
    spec = small_spec("tiny")
    alignment = fm.Alignment(spec.random(generator), spec)
    return b, alignment.apply(b), alignment, generator


def weights(shapes=None):
    """(name of the module in diffusers, name in the file, shape) of every matrix and kernel that a LoRA can change."""
    shapes = small_shapes("tiny") if shapes is None else shapes
    names = names_in_file("tiny")
    return [
        (module.removesuffix(".weight"), name, shapes[name])
        for module, name in names.items()
        if name in shapes and module.endswith(".weight") and len(shapes[name]) > 1
    ]


def output(state):
    """The output of the UNet of diffusers with these tensors."""
    net = diffusers.UNet2DConditionModel(**TINY_UNET).double().eval()
    names = names_in_file("tiny")
    net.load_state_dict({name: state[names[name]] for name in net.state_dict()})
    inputs = torch.Generator().manual_seed(5)
    sample = torch.randn(2, 4, 8, 8, generator=inputs, dtype=torch.float64)
    text = torch.randn(2, 3, TINY_UNET["cross_attention_dim"], generator=inputs, dtype=torch.float64)
    with torch.no_grad():
        return net(sample, 50, text).sample


def matrix(shape, generator):
    return torch.randn(shape, generator=generator, dtype=torch.float64) / max(shape) ** 0.5


def lora(key, shape, generator):
    """LoRA of a linear layer or a convolution."""
    out, width, *kernel = shape
    return {
        f"{key}.lora_down.weight": matrix((RANK, width, *kernel), generator),
        f"{key}.lora_up.weight": matrix((out, RANK, *(1 for _ in kernel)), generator),
        f"{key}.alpha": torch.tensor(2.0, dtype=torch.float64),
    }


def peft(key, shape, generator):
    made = list(lora(key, shape, generator).values())
    return {f"{key}.lora_A.weight": made[0], f"{key}.lora_B.weight": made[1]}


def locon_with_core(key, shape, generator):
    """LoCon of a convolution with its kernel in the core (CP decomposition)."""
    out, width, *kernel = shape
    ones = [1 for _ in kernel]
    return {
        f"{key}.lora_down.weight": matrix((RANK, width, *ones), generator),
        f"{key}.lora_mid.weight": matrix((RANK, RANK, *kernel), generator),
        f"{key}.lora_up.weight": matrix((out, RANK, *ones), generator),
    }


def hadamard(key, shape, generator):
    out, width, *kernel = shape
    columns = width * torch.Size(kernel).numel()
    sides = {"a": (out, RANK), "b": (RANK, columns)}
    return {f"{key}.hada_w{n}_{x}": matrix(sides[x], generator) for n in (1, 2) for x in "ab"}


def hadamard_with_core(key, shape, generator):
    out, width, *kernel = shape
    made = {}
    for n in (1, 2):
        made[f"{key}.hada_t{n}"] = matrix((RANK, RANK, *kernel), generator)
        made[f"{key}.hada_w{n}_a"] = matrix((RANK, out), generator)
        made[f"{key}.hada_w{n}_b"] = matrix((RANK, width), generator)
    return made


def magnitudes(key, shape, generator):
    """DoRA: the columns of the changed weight get these norms."""
    made = lora(key, shape, generator)
    size = (1, shape[1], *(1 for _ in shape[2:]))
    return {**made, f"{key}.dora_scale": matrix(size, generator).abs() + 0.5}


def row_magnitudes(key, shape, generator):
    size = (shape[0], *(1 for _ in shape[1:]))
    return {**lora(key, shape, generator), f"{key}.dora_scale": matrix(size, generator).abs() + 0.5}


def difference(key, shape, generator):
    return {f"{key}.diff": matrix(shape, generator)}


def merged(weight, factors):
    """A weight with what LyCORIS and kohya add to it, written from their definitions."""
    f = factors
    if "lora_up" in f or "lora_B" in f:
        up, down = f.get("lora_up", f.get("lora_B")), f.get("lora_down", f.get("lora_A"))
        if "lora_mid" in f:
            add = torch.einsum("or,rs...,si->oi...", up.flatten(1), f["lora_mid"], down.flatten(1))
        else:
            add = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        add = add * (f["alpha"] / RANK if "alpha" in f else 1)
    elif "hada_t1" in f:
        parts = [
            torch.einsum("ij...,jr,ip->pr...", f[f"hada_t{n}"], f[f"hada_w{n}_b"], f[f"hada_w{n}_a"])
            for n in (1, 2)
        ]
        add = parts[0] * parts[1]
    elif "hada_w1_a" in f:
        add = ((f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"])).reshape(weight.shape)
    else:
        add = f["diff"]
    changed = weight + add
    if "dora_scale" in f:
        kept = 0 if f["dora_scale"].shape[0] == weight.shape[0] > 1 else 1
        dims = [d for d in range(weight.ndim) if d != kept]
        changed = changed * (f["dora_scale"] / changed.pow(2).sum(dims, keepdim=True).sqrt())
    return changed


def merge(state, tensors, keys):
    """A state with a LoRA merged into it."""
    result = dict(state)
    for key, name in keys.items():
        own = {
            k.removeprefix(key + ".").removesuffix(".weight"): t
            for k, t in tensors.items()
            if k.startswith(key + ".")
        }
        result[name] = merged(state[name], own)
    return result


def kohya(module, name):
    return "lora_unet_" + module.replace(".", "_")


def kohya_of_file(module, name):
    return "lora_unet_" + name.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(
        ".", "_"
    )


def name_in_file(module, name):
    return name.removesuffix(".weight")


def diffusers_name(module, name):
    return f"unet.{module}"


ANY = (lora, peft, hadamard, magnitudes, row_magnitudes, difference)
KERNELS = (locon_with_core, hadamard_with_core)


NAMINGS = (kohya, kohya_of_file, name_in_file, diffusers_name)


@pytest.mark.grid
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("make", [*ANY, *KERNELS])
def test_a_permuted_lora_adds_to_the_aligned_model_what_it_added_to_the_model(model, make, naming):
    b, aligned, alignment, generator = model
    tensors, keys = {}, {}
    for module, name, shape in weights():
        if make in KERNELS and len(shape) != 4:
            continue
        key = naming(module, name)
        keys[key] = name
        tensors |= make(key, shape, generator)
    moved = permute_lora(tensors, alignment)
    assert list(moved) == list(tensors)
    assert all(moved[name].shape == tensor.shape for name, tensor in tensors.items())
    with_lora = output(merge(b, tensors, keys))
    assert (with_lora - output(b)).abs().max() > 1e-3 * with_lora.abs().max()
    found = output(merge(aligned, moved, keys))
    assert (found - with_lora).abs().max() < 1e-9 * with_lora.abs().max()


@pytest.mark.parametrize("naming", NAMINGS)
def test_full_differences_of_norms_and_biases_follow(model, naming):
    b, aligned, alignment, generator = model
    tensors, names = {}, {}
    for module, name in names_in_file("tiny").items():
        shape = small_shapes("tiny").get(name, ())
        weight = name.removesuffix("weight").removesuffix("bias") + "weight"
        if len(shape) != 1 or weight not in small_shapes("tiny"):
            continue
        key = naming(module.rpartition(".")[0], weight)
        factor = f"{key}.{'diff' if name == weight else 'diff_b'}"
        tensors[factor], names[factor] = matrix(shape, generator), name
    assert {name.rpartition(".")[2] for name in names.values()} == {"weight", "bias"}
    moved = permute_lora(tensors, alignment)
    with_lora = output({**b, **{names[k]: b[names[k]] + t for k, t in tensors.items()}})
    found = output({**aligned, **{names[k]: aligned[names[k]] + t for k, t in moved.items()}})
    assert (with_lora - output(b)).abs().max() > 1e-3 * with_lora.abs().max()
    assert (found - with_lora).abs().max() < 1e-9 * with_lora.abs().max()


def test_a_kronecker_factor_follows_where_units_move_in_blocks(model):
    b, _, alignment, generator = model
    heads = next(
        group for group in alignment.spec.groups.values()
        if group.size == 2 and any(a.parameter.endswith("attn1.to_v.weight") for a in group.axes)
    )  # fmt: skip
    value = next(a.parameter for a in heads.axes if a.parameter.endswith("attn1.to_v.weight"))
    swapped = fm.Alignment({heads.name: torch.tensor([1, 0])}, alignment.spec)
    key = "lora_unet_" + value.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(
        ".", "_"
    )
    tensors = {
        f"{key}.lokr_w1": matrix((2, 4), generator), f"{key}.lokr_w2_a": matrix((64, RANK), generator),
        f"{key}.lokr_w2_b": matrix((RANK, 32), generator),
    }  # fmt: skip
    moved = permute_lora(tensors, swapped)

    def product(of):
        return torch.kron(of[f"{key}.lokr_w1"], of[f"{key}.lokr_w2_a"] @ of[f"{key}.lokr_w2_b"])

    assert torch.equal(swapped.apply({**b, value: product(tensors)})[value], product(moved))
    assert not torch.equal(product(moved), product(tensors))
    with pytest.raises(
        ValueError, match=rf"lora: tensor '{key}\.lokr_w1' is a factor of a Kronecker product"
    ):
        permute_lora(tensors, alignment)


def test_a_text_encoder_moves_by_every_customary_name():
    shapes = {n: s for n, s in small_shapes().items() if n.startswith("cond_stage_model.")}
    spec = trace_file(shapes, "b")
    generator = torch.Generator().manual_seed(2)
    alignment = fm.Alignment(spec.random(generator), spec)
    prefix = "cond_stage_model.transformer.text_model."
    name = prefix + "encoder.layers.1.mlp.fc2.weight"
    b = random_file(shapes, generator, torch.float64)
    added = (
        matrix((CLIP["hidden_size"], RANK), generator),
        matrix((RANK, CLIP["intermediate_size"]), generator),
    )
    for start in ("lora_te_text_model_", "lora_te1_text_model_", "text_encoder.text_model.", "text_encoder."):
        separator = "_" if start.startswith("lora") else "."
        key = start + separator.join(("encoder", "layers", "1", "mlp", "fc2"))
        moved = permute_lora(
            {f"{key}.lora_up.weight": added[0], f"{key}.lora_down.weight": added[1]}, alignment
        )
        expected = alignment.apply({**b, name: added[0] @ added[1]})[name]
        assert torch.allclose(
            moved[f"{key}.lora_up.weight"] @ moved[f"{key}.lora_down.weight"], expected, atol=1e-12
        )


def test_words_that_a_lora_was_trained_with_stay(model):
    _, _, alignment, generator = model
    module, name, shape = weights()[20]
    words = {"bundle_emb.robe.clip_l": matrix((2, 32), generator)}
    moved = permute_lora({**lora(kohya(module, name), shape, generator), **words}, alignment)
    assert torch.equal(moved["bundle_emb.robe.clip_l"], words["bundle_emb.robe.clip_l"])


@pytest.mark.parametrize(("name", "message"), [
    ("lora_unet_down_blocks_9_conv.lora_up.weight", "no weight of the permuted model is known by the name"),
    ("lora_unet_conv_in.oft_blocks", "tensor 'lora_unet_conv_in.oft_blocks' is no factor of a LoRA whose rule is known"),
    ("lora_unet_conv_out.lora_up.weight", r"has shape \(5, 3\), but the weight has 4 channels"),
])  # fmt: skip
def test_what_a_lora_has_besides_is_refused_by_name(model, name, message):
    _, _, alignment, _ = model
    with pytest.raises(ValueError, match=message):
        permute_lora({name: torch.zeros(5, 3)}, alignment, "detail.safetensors")


def test_the_command_permutes_a_lora_and_keeps_what_its_file_says(model, tmp_path, capsys):
    _, _, alignment, generator = model
    alignment.save(tmp_path / "p.safetensors")
    module, name, shape = weights()[20]
    tensors = {k: t.half() for k, t in lora(kohya(module, name), shape, generator).items()}
    save_file(
        tensors,
        tmp_path / "detail.safetensors",
        metadata={"ss_network_module": "networks.lora", "sshs_model_hash": "0"},
    )
    paths = [str(tmp_path / f"{x}.safetensors") for x in ("p", "detail", "out")]
    assert main(["apply", *paths[:2], "--out", paths[2]]) == 0
    assert "permuted the LoRA" in capsys.readouterr().out
    moved = permute_lora(tensors, alignment)
    found = load_file(paths[2])
    assert all(torch.equal(found[k], t) and found[k].dtype == torch.float16 for k, t in moved.items())
    with safe_open(paths[2], framework="pt") as file:
        assert file.metadata() == {"format": "pt", "ss_network_module": "networks.lora"}, (
            "the hash was of other tensors"
        )
