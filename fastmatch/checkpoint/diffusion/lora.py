"""Permute a LoRA with the model that it was trained on.

A LoRA adds a product of small matrices to a weight. Moving the rows of the weight moves the rows of the left factor, and
moving its columns moves the columns of the right one, so the permuted LoRA adds to the permuted model what the LoRA adds
to the model. Kronecker factors follow only permutations that are a product themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from fastmatch.checkpoint.diffusion.components import CONTROLNET, find_components
from fastmatch.checkpoint.diffusion.layout import Layout, Part, Shapes, Source
from fastmatch.permutations.alignment import Alignment
from fastmatch.permutations.apply import dimension_indices, is_identity, permute_tensor, slice_indices

__all__ = ["is_lora", "permute_lora"]

FACTORS = re.compile(
    r"[._](?P<factor>lora_embedding_[AB]|lora_down|lora_up|lora_mid|lora_A|lora_B|lora\.down|lora\.up|lora_linear_layer\.down|"
    r"lora_linear_layer\.up|lora_magnitude_vector|alpha|dora_scale|hada_[wt]\d(?:_[ab])?|lokr_[wt]\d(?:_[ab])?|"
    r"diff|diff_b|w_norm|b_norm)(?:\.default)?(?:\.(?P<kind>weight|bias))?$"
)
"""The end of a name in a LoRA: a factor of a weight."""

PREFIXES = (
    (re.compile(r"^(?:lora_unet|lora_transformer|unet|transformer|diffusion_model)_"), "image"),
    (re.compile(r"^(?:lora_te|lora_te1|text_encoder|te|te1)_"), "text 1"),
    (re.compile(r"^(?:lora_te2|text_encoder_2|te2)_"), "text 2"),
    (re.compile(r"^(?:lora_te3|text_encoder_3|te3)_"), "text 3"),
)
"""What names of kohya, LyCORIS, diffusers and peft start with, without dots -> the network that is meant."""

PEFT = "base_model.model."
"""What the names in an adapter of peft start with, before those of the model."""

WORDS = "bundle_emb."
"""What names of textual inversions in a LoRA start with. They are inputs of the text encoder, whose order stays."""

UP = ("lora_up", "lora_B", "lora_embedding_B", "lora.up", "lora_linear_layer.up")
DOWN = ("lora_down", "lora_A", "lora_embedding_A", "lora.down", "lora_linear_layer.down")
UNMOVED = ("alpha", "lora_mid", "hada_t1", "hada_t2", "lokr_t2")


@dataclass(frozen=True)
class Target:
    """A weight that a LoRA can add to: its size, and how the alignment moves it (None where nothing moves).

    Attributes:
        shape: output and input channels.
        rows: row ``i`` of the result is row ``rows[i]``.
        columns: the same for columns.
    """

    shape: tuple[int, int]
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None


def is_lora(names: Mapping[str, torch.Tensor], *, alone: bool = False) -> bool:
    """Whether a file holds factors of a LoRA, by the names of its tensors; with ``alone`` whether it holds nothing else."""
    found = [bool(FACTORS.search(name)) for name in names if not name.startswith(WORDS)]
    return bool(found) and all(found) if alone else any(found)


def permute_lora(
    lora: Mapping[str, torch.Tensor],
    alignment: Alignment,
    argument: str = "lora",
    *,
    is_transposed: bool = False,
) -> dict[str, torch.Tensor]:
    """Return a LoRA of model B for B aligned.

    Args:
        lora: the tensors of its file, with names of kohya, LyCORIS, diffusers or peft.
        alignment: the permutations of B.
        argument: the file in errors.
        is_transposed: the weights have a row for each input (``fan_in_fan_out`` of peft), where their shapes allow that.

    Returns:
        Tensors of the same names, shapes and types.

    Raises:
        ValueError: a name or shape is unknown, or the permuted weight has no such factors. The tensor is named.
    """
    targets = _Targets(alignment, argument)
    modules: dict[str, dict[str, str]] = {}
    moved = {}
    for name in lora:
        if name.removeprefix(PEFT) in alignment.spec.shapes and name.startswith(PEFT):
            moved[name] = _whole(lora[name], name, alignment, argument)
            continue
        if name.startswith(WORDS):
            moved[name] = lora[name]
            continue
        found = FACTORS.search(name)
        if not found:
            raise ValueError(f"{argument}: tensor {name!r} is no factor of a LoRA whose rule is known")
        factor = found["factor"] + ("_bias" if found["kind"] == "bias" else "")
        modules.setdefault(name[: found.start()], {})[factor] = name
    for module, factors in modules.items():
        target = targets.find(module)
        is_embedding = any(factor.startswith("lora_embedding") for factor in factors)
        if target is not None and (
            is_embedding or (is_transposed and _fits_transposed(target, factors, lora))
        ):
            outputs, inputs = target.shape
            target = Target((inputs, outputs), target.columns, target.rows)
        sizes = _KroneckerSizes.of({factor: lora[name] for factor, name in factors.items()})
        tucker = {factor.removeprefix("hada_t") for factor in factors if factor.startswith("hada_t")}
        for factor, name in factors.items():
            try:
                moved[name] = _moved(factor, lora[name], target, sizes, tucker)
            except _Inexact as error:
                raise ValueError(f"{argument}: tensor {name!r} {error}") from error
    return {name: moved[name] for name in lora}


def _whole(tensor: torch.Tensor, name: str, alignment: Alignment, argument: str) -> torch.Tensor:
    """Return a layer or bias that an adapter holds whole, in its new order."""
    own = name.removeprefix(PEFT)
    if tuple(tensor.shape) != alignment.spec.shapes[own]:
        raise ValueError(
            f"{argument}: tensor {name!r} has shape {tuple(tensor.shape)}, the model's has {alignment.spec.shapes[own]}"
        )
    return permute_tensor(tensor, own, alignment.spec, alignment.permutations)


def _fits_transposed(target: Target, factors: Mapping[str, str], lora: Mapping[str, torch.Tensor]) -> bool:
    rows, columns = target.shape
    ups = [lora[name].shape[0] for factor, name in factors.items() if factor in UP]
    downs = [lora[name].shape[1] for factor, name in factors.items() if factor in DOWN]
    return set(ups) <= {columns} and set(downs) <= {rows}


class _Inexact(Exception):
    """Why a factor cannot follow a permutation."""


def _moved(
    factor: str, tensor: torch.Tensor, target: Target | None, sizes: _KroneckerSizes | None, tucker: set[str]
) -> torch.Tensor:
    """Return one factor of a permuted weight."""
    if target is None or factor in UNMOVED:
        return tensor
    if factor in UP or factor in ("diff_b", "b_norm", "w_norm", "lora_B_bias", "lora_magnitude_vector"):
        return _select(tensor, 0, target.rows, target.shape[0])
    if factor in DOWN:
        return _select(tensor, 1, target.columns, target.shape[1])
    if factor == "diff":
        if tensor.ndim == 1:  # of a norm
            return _select(tensor, 0, target.rows, target.shape[0])
        return _select(_select(tensor, 0, target.rows, target.shape[0]), 1, target.columns, target.shape[1])
    if factor == "dora_scale":
        if tensor.numel() == target.shape[0] == tensor.shape[0]:
            return _select(tensor, 0, target.rows, target.shape[0])
        return _select(tensor, 1, target.columns, target.shape[1])
    if factor.startswith("hada_w"):
        is_left, is_tucker = factor.endswith("_a"), factor[len("hada_w")] in tucker
        rows = (target.rows, target.shape[0]) if is_left else (target.columns, target.shape[1])
        return _select(tensor, 0 if is_left and not is_tucker else 1, *rows, is_flat=not is_left)
    if factor.startswith("lokr_w") and sizes is not None:
        return _kronecker(factor, tensor, target, sizes)
    raise _Inexact("has no rule to follow a permutation")


def _select(
    tensor: torch.Tensor, dim: int, index: torch.Tensor | None, size: int, *, is_flat: bool = False
) -> torch.Tensor:
    """Return ``tensor`` reordered along a dimension of ``size`` units.

    ``is_flat``: the positions of a kernel follow each other at every unit.
    """
    length = tensor.shape[dim] if dim < tensor.ndim else 0
    if length != size and not (is_flat and length and length % size == 0):
        raise _Inexact(
            f"has shape {tuple(tensor.shape)}, but the weight has {size} channels along axis {dim}"
        )
    if index is None:
        return tensor
    inner = length // size
    if inner > 1:
        index = (index[:, None] * inner + torch.arange(inner, device="cpu")).flatten()
    return tensor.index_select(dim, index.to(tensor.device))


@dataclass(frozen=True)
class _KroneckerSizes:
    """Rows and columns of the two factors of a Kronecker product."""

    first: tuple[int, int]
    second: tuple[int, int]
    is_tucker: bool

    @classmethod
    def of(cls, factors: Mapping[str, torch.Tensor]) -> _KroneckerSizes | None:
        is_tucker = "lokr_t2" in factors
        try:
            first = factors["lokr_w1"].shape if "lokr_w1" in factors else (
                factors["lokr_w1_a"].shape[0], factors["lokr_w1_b"].shape[1],
            )  # fmt: skip
            if "lokr_w2" in factors:
                second = factors["lokr_w2"].shape
            else:
                second = (factors["lokr_w2_a"].shape[int(is_tucker)], factors["lokr_w2_b"].shape[1])
        except KeyError:
            return None
        return cls((first[0], first[1]), (second[0], second[1]), is_tucker)


def _kronecker(factor: str, tensor: torch.Tensor, target: Target, sizes: _KroneckerSizes) -> torch.Tensor:
    which = 0 if factor.startswith("lokr_w1") else 1
    own = (sizes.first, sizes.second)[which]
    if not factor.endswith("_b"):
        rows = _product(target.rows, sizes.first[0], target.shape[0], "rows")[which]
        tensor = _select(tensor, int(factor.endswith("_a") and which == 1 and sizes.is_tucker), rows, own[0])
    if not factor.endswith("_a"):
        columns = _product(target.columns, sizes.first[1], target.shape[1], "columns")[which]
        size = target.shape[1] // sizes.first[1] if which else own[1]
        tensor = _select(tensor, 1, columns, size, is_flat=which == 1)
    return tensor


def _product(
    index: torch.Tensor | None, first: int, size: int, what: str
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return a permutation as a product of one of ``first`` blocks and one inside every block."""
    if size % first:
        raise _Inexact(f"has {first} blocks of {what}, which do not divide the weight's {size}")
    if index is None:
        return None, None
    blocks = index.reshape(first, size // first)
    outer, inner = blocks[:, 0] // blocks.shape[1], blocks[0] % blocks.shape[1]
    if not torch.equal(blocks, outer[:, None] * blocks.shape[1] + inner):
        raise _Inexact(
            f"is a factor of a Kronecker product, and the alignment moves the weight's {what} across its blocks; merge "
            "this LoRA into B before aligning, or align without that group"
        )
    return outer, inner


@dataclass(frozen=True)
class _Network:
    """A network whose weights a LoRA can change: ``layout`` is that of a :class:`Component`."""

    role: str
    prefix: str
    shapes: Shapes
    layout: Layout
    order: tuple[bool, int] = (False, 0)
    """Of text encoders: CLIP before T5, the narrow before the wide."""


PIPELINE = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
"""Starts of names in a pipeline. What follows are the names of the modules."""


def _networks(shapes: Shapes, argument: str) -> list[_Network]:
    """Return the image model and the text encoders by the shapes of a spec, in the order in which LoRAs number them."""
    found = []
    for start in PIPELINE:
        own = {name.removeprefix(start): shape for name, shape in shapes.items() if name.startswith(start)}
        if own and not any(
            name.startswith("resblocks.") for name in own
        ):  # a text encoder in a file of its own
            role = "text_encoder" if start.startswith("text") else "unet"
            found.append(_Network(role, start, own, {}, _order(own)))
    if not found:
        found = [
            _Network(c.kind.role, c.prefix, c.shapes, c.layout, _order(c.shapes))
            for c in find_components(shapes, argument)
            if c.kind.role not in ("vae", CONTROLNET)
        ]
    if not found:  # one folder of a pipeline
        is_image = any("transformer_blocks." in name for name in shapes)
        found = [_Network("unet" if is_image else "text_encoder", "", dict(shapes), {})]
    return sorted(found, key=lambda network: network.order)


def _order(shapes: Shapes) -> tuple[bool, int]:
    is_t5 = any(".SelfAttention." in name for name in shapes)
    words = [shape[1] for name, shape in shapes.items() if name.endswith("token_embedding.weight")]
    return is_t5, max(words, default=0)


class _Targets:
    """The weights of a model by the names that LoRAs have for them."""

    def __init__(self, alignment: Alignment, argument: str) -> None:
        self.alignment, self.argument = alignment, argument

    @cached_property
    def tables(self) -> dict[str, dict[str, Target]]:
        """Return the weights of each network by their names without dots."""
        alignment, argument = self.alignment, self.argument
        tables: dict[str, dict[str, Target]] = {}
        texts = 0
        for network in _networks(alignment.spec.shapes, argument):
            texts += network.role == "text_encoder"
            label = f"text {texts}" if network.role == "text_encoder" else "image"
            tables[label] = self._table(network)
        if texts:
            # A refiner's only encoder is called the second one, and Flux's second one the third.
            tables |= {f"text {n}": tables[f"text {texts}"] for n in range(texts + 1, 4)}
        return tables

    def find(self, module: str) -> Target | None:
        """Return the weight of a module; None for a text encoder if the model has none, because then it does not move."""
        shapes, name = self.alignment.spec.shapes, module.removeprefix(PEFT) + ".weight"
        if shapes.get(name):  # the name in the model's own file
            rows = shapes[name][0]
            return self._target(_Network("model", "", shapes, {}), Source((Part(name, 0, rows, rows),)))
        flat = module.replace(".", "_").removeprefix("base_model_model_")
        for pattern, label in PREFIXES:
            if not pattern.match(flat):
                continue
            if label not in self.tables and label.startswith("text"):
                return None
            target = self.tables.get(label, {}).get(pattern.sub("", flat).replace("_processor_", "_"))
            if target is not None:
                return target
        raise ValueError(f"{self.argument}: no weight of the permuted model is known by the name {module!r}")

    def _table(self, network: _Network) -> dict[str, Target]:
        """Return the weights by the names of the file and by those of the module, without dots."""
        sources = {}
        for name, shape in network.shapes.items():
            if shape and name.endswith(("weight", "in_proj_weight")):
                sources[name.removesuffix("weight").rstrip("._")] = Source(
                    (Part(name, 0, shape[0], shape[0]),)
                )
        for name, source in network.layout.items():
            if name.endswith(".weight"):
                sources[name.removesuffix(".weight")] = source
        table: dict[str, Target] = {}
        for name, source in sources.items():
            flat, target = name.replace(".", "_"), self._target(network, source)
            table[flat] = target
            if network.role == "text_encoder":
                table["text_model_" + flat.removeprefix("text_model_")] = target
            if flat.endswith("_to_out_0"):
                table[flat.removesuffix("_0")] = target  # before attention processors
        return table

    def _target(self, network: _Network, source: Source) -> Target:
        """Return how a parameter moves, from how the tensors of the file move that it is made of."""
        rows: list[torch.Tensor] = []
        columns: list[torch.Tensor] = []
        width = begin = 0
        for part in source.parts:
            name, shape = network.prefix + part.name, network.shapes[part.name]
            spec, permutations = self.alignment.spec, self.alignment.permutations
            if slice_indices(name, spec, permutations):
                raise ValueError(
                    f"{self.argument}: weight {name!r} moves in parts, which a LoRA cannot follow"
                )
            found = dimension_indices(name, spec, permutations)
            width = shape[1] if len(shape) > 1 else 1
            row = found.get(0, torch.arange(part.rows, device="cpu"))[part.start : part.stop] - part.start
            if int(row.min()) < 0 or int(row.max()) >= part.stop - part.start:
                raise ValueError(f"{self.argument}: weight {name!r} mixes rows of several weights")
            rows.append(row + begin)
            columns.append(found.get(1, torch.arange(width, device="cpu")))
            begin += part.stop - part.start
        if not all(torch.equal(column, columns[0]) for column in columns):
            raise ValueError(f"{self.argument}: parts of one weight have columns in different orders")
        target = Target((begin, width), _unless_identity(torch.cat(rows)), _unless_identity(columns[0]))
        if source.transposed:
            return Target((width, begin), target.columns, target.rows)
        return target


def _unless_identity(index: torch.Tensor) -> torch.Tensor | None:
    return None if is_identity(index) else index
