"""Architectures as people merge them: traced, permuted without a change of function, and nothing overlooked."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from fastmatch._internal.modules import with_state
from fastmatch._internal.states import state_of
from fastmatch.checkpoint import trace_config
from fastmatch.checkpoint.structure import compared
from fastmatch.permutations.apply import apply_permutations, permute_tensor
from fastmatch.permutations.precise import largest_difference, outputs_of
from fastmatch.spec import PermutationSpec
from fastmatch.spec.running import tensors_returned
from helpers.grid import sampled
from helpers.networks import fresh_seed

pytest.importorskip("transformers")

from helpers.architectures import PAGE, fallen, page, shares
from helpers.families import FAMILIES, GAPS, IDLE, UNMOVED, gaps, missing, sites_of, text, translations

CASES = [pytest.param(f, a, id=f"{f.name}-{a}") for f in FAMILIES for a in f.attentions]
EACH = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)


def moving(spec: PermutationSpec, generator: torch.Generator):
    """A permutation of every group that is not the identity."""
    permutations = {}
    for name, group in spec.groups.items():
        same = still = torch.arange(group.size)
        while torch.equal(same, still):
            same = torch.randperm(group.size, generator=generator)
        permutations[name] = same
    return permutations


def error(model, spec, permutations, inputs) -> float:
    """The largest difference of outputs that the permutations make, relative to the largest output."""
    moved = with_state(model, apply_permutations(state_of(model, "model"), spec, permutations))
    return largest_difference(outputs_of(model, (), inputs), outputs_of(moved, (), inputs))


def change_of_outputs(model, expected, spec, permutations, inputs) -> float:
    """As :func:`error`, where few tensors move: they move in place, and back."""
    state = state_of(model, "model")
    before = {axis.parameter: None for group in spec.groups.values() for axis in group.axes}
    before = {name: state[name].clone() for name in before}
    with torch.no_grad():
        for name, tensor in before.items():
            state[name].copy_(permute_tensor(tensor, name, spec, permutations))
        found = outputs_of(model, (), inputs)
        for name, tensor in before.items():
            state[name].copy_(tensor)
    return largest_difference(expected, found)


@pytest.mark.grid
@pytest.mark.parametrize(("family", "attention"), CASES)
def test_every_group_moves_without_a_change_of_function(family, attention):
    seed = fresh_seed()
    model, generator = family.build(seed, attention), torch.Generator().manual_seed(seed)
    spec = PermutationSpec.trace(model, (), kwargs=family.inputs(generator))
    assert error(model, spec, moving(spec, generator), family.inputs(generator)) < 1e-9
    lacking = missing(family, spec)
    sites = sites_of(family, spec)
    for name, kind in UNMOVED:
        if name == family.name:
            assert lacking.pop(kind, None) == sites[kind], f"{kind} moves: {UNMOVED[name, kind]}?"
    expected = gaps(family, attention)
    assert set(lacking) == set(expected), (
        f"not found and not in GAPS: { ({k: v for k, v in lacking.items() if k not in expected}) }; "
        f"found, to be taken out of GAPS: {sorted(set(expected) - set(lacking))}"
    )


@EACH
def test_every_parameter_matters(family):
    """Otherwise a wrong move of it would not show. A ReLU that is dead under one seed lives under another."""
    seed, idle = fresh_seed(), None
    for draw in range(seed, seed + 10):
        model, generator = family.build(draw), torch.Generator().manual_seed(draw)
        outputs = [
            t for t in tensors_returned(model.requires_grad_()(**family.inputs(generator))) if t.requires_grad
        ]
        sum((t * torch.randn(t.shape, generator=generator)).sum() for t in outputs).backward()
        now = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9}
        idle = now if idle is None else idle & now
        if not {name for name in idle if not re.search(IDLE, name)}:
            return
    pytest.fail(f"without effect: {idle}")


@sampled("family", FAMILIES)
def test_a_group_that_forgets_an_axis_is_caught(family):
    """What the first test would say of a wrong spec."""
    seed = fresh_seed()
    generator = torch.Generator().manual_seed(seed)
    models = [family.build(seed)]
    inputs = family.inputs(generator)
    outputs = [outputs_of(models[0], (), inputs)]
    spec = PermutationSpec.trace(models[0], (), kwargs=inputs)
    permutations = moving(spec, generator)
    weights = {name for name, p in models[0].named_parameters() if p.ndim > 1}
    tied = Counter(t.data_ptr() for t in models[0].state_dict().values())
    weights = {name for name in weights if tied[models[0].get_parameter(name).data_ptr()] == 1}
    for name, group in spec.groups.items():
        axes = [axis for axis in group.axes if axis.parameter in weights]
        forgotten = axes[int(torch.randint(len(axes), (), generator=generator))]
        kept = tuple(axis for axis in group.axes if axis != forgotten)
        rest = replace(group, axes=kept, within="", block=-1)
        wrong = replace(spec, groups={name: rest})
        change = {name: permutations[name]}
        for k in range(
            6
        ):  # again for the dead ReLUs: of several models, which are built when one is asked for
            if k == len(models):
                models.append(family.build(seed + k))
                outputs.append(outputs_of(models[k], (), inputs))
            if change_of_outputs(models[k], outputs[k], wrong, change, inputs) > 1e-9:
                break
        else:
            pytest.fail(f"not seen: {forgotten}")


def test_the_tables_name_families():
    names = {family.name for family in FAMILIES}
    assert len(names) == len(FAMILIES) == 37
    assert {name for name, _ in [*GAPS, *UNMOVED]} <= names
    assert not set(GAPS) & set(UNMOVED)


@sampled("family", FAMILIES)
def test_a_config_gives_the_structure_of_its_model(family, tmp_path):
    """Without the weights, and with inputs that come from the config."""
    model = family.build(fresh_seed())
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    traced = trace_config(tmp_path)
    expected = PermutationSpec.trace(model, (), kwargs=family.inputs(torch.Generator()), outputs=compared)
    assert (traced.groups, traced.shapes, traced.pins) == (expected.groups, expected.shapes, expected.pins)


@pytest.mark.slow
def test_the_page_of_architectures_is_current():
    assert PAGE.read_text() == page(), "write it again: PYTHONPATH=tests python -m helpers.architectures"


def test_the_share_that_moves_does_not_fall():
    """The page is that of the traces, and is not written if a family moves less than on the page before."""
    text = PAGE.read_text()
    assert len(shares(text)) == len(FAMILIES)
    assert fallen(text, text) == []
    row = next(line for line in text.splitlines() if line.startswith("| T5 |"))
    share = shares(text)["T5"]
    assert fallen(text, text.replace(row, row.replace(f"{share} %", f"{share - 0.1:.1f} %"))) == [
        f"T5: {share} %, now {share - 0.1:.1f} %"
    ]
    assert fallen(text, text.replace(row, "")) == [f"T5: {share} %, now 0 %"]


@sampled("family", (f for f in FAMILIES if f.inputs in (text, translations)))
def test_padding_holds_nothing(family):
    seed = fresh_seed()
    model, generator = family.build(seed), torch.Generator().manual_seed(seed)
    inputs = family.inputs(generator)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, -3:] = 0
    padded = {**inputs, "attention_mask": mask}
    spec = PermutationSpec.trace(model, (), kwargs=padded)
    assert spec.groups == PermutationSpec.trace(model, (), kwargs=inputs).groups
    assert error(model, spec, moving(spec, generator), padded) < 1e-9
