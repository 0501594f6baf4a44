"""The numbers of a report: similarities of matched units, and the structure that is drawn."""

from __future__ import annotations

import base64
import io

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import nn

import fastmatch as fm
from fastmatch.report.measures import activation_pairs, families, layers_of, weight_pairs
from fastmatch.report.pictures import Scale, matrix_image
from fastmatch.report.structure import structure_of
from helpers.networks import build, fresh_seed


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


def planted(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, fm.Alignment]:
    """A model with its units in another order, and the alignment that finds them again."""
    spec = fm.PermutationSpec.trace(model, x)
    moved = fm.Alignment(spec.random(torch.Generator().manual_seed(fresh_seed())), spec)
    return moved.apply(model), moved.invert()


@pytest.mark.parametrize("name", ["mlp", "resnet", "encoder"])
def test_matched_units_of_a_planted_permutation_are_equal(name):
    torch.manual_seed(fresh_seed())
    model, x = build(name, fresh_seed())
    other, alignment = planted(model, x)
    pairs = weight_pairs(model.state_dict(), other.state_dict(), alignment)
    assert pairs
    for pair in pairs.values():
        torch.testing.assert_close(pair.after, torch.ones_like(pair.after), rtol=0, atol=1e-5)
        assert float(pair.before.abs().max()) <= 1 + 1e-5


def test_weight_similarities_are_the_cosines_of_the_units_weights():
    torch.manual_seed(fresh_seed())
    a, b = mlp(), mlp()
    alignment = fm.align(a, b, torch.randn(2, 6))
    aligned = alignment.apply(b)
    pairs = weight_pairs(a.state_dict(), b.state_dict(), alignment)

    def rows(model):
        return torch.cat([model[0].weight, model[2].weight.T], 1).double()

    for which, other in (("before", b), ("after", aligned)):
        expected = torch.cosine_similarity(rows(a), rows(other))
        torch.testing.assert_close(getattr(pairs["0"], which), expected, rtol=1e-5, atol=1e-6)
    blocks = pairs["0"].blocks
    assert blocks is not None
    normal = torch.nn.functional.normalize
    torch.testing.assert_close(blocks[1], normal(rows(a)) @ normal(rows(aligned)).T, rtol=1e-5, atol=1e-6)


def test_activation_similarities_are_the_correlations_on_the_data():
    torch.manual_seed(fresh_seed())
    a, b = mlp(), mlp()
    data = [torch.randn(64, 6) for _ in range(3)]
    alignment = fm.align(a, b, data[0][:2])
    aligned = alignment.apply(b)
    pairs = activation_pairs((a, b), alignment, data, lambda model, batch: model(batch), False)
    inputs = torch.cat(data)
    with torch.no_grad():
        x, y = (model[:2](inputs).double().numpy() for model in (a, aligned))
    for unit in range(20):
        if x[:, unit].std() and y[:, unit].std():
            expected = np.corrcoef(x[:, unit], y[:, unit])[0, 1]
            assert float(pairs["0"].after[unit]) == pytest.approx(expected, abs=1e-4)


def test_subgroups_of_a_kind_share_a_row():
    model, x = build("encoder", fresh_seed())
    spec = fm.PermutationSpec.trace(model, x)
    named = dict(families(spec))
    assert sorted(name for names in named.values() for name in names) == sorted(spec.groups)
    kinds = [names for names in named.values() if len(names) > 1]
    assert kinds
    assert all(len({spec.groups[name].within for name in names}) == 1 for names in kinds)
    alignment = fm.Alignment(spec.identity(), spec)
    rows = layers_of(alignment, weight_pairs(model.state_dict(), model.state_dict(), alignment))
    assert sum(row.units for row in rows) == sum(group.size for group in spec.groups.values())
    assert all(row.moved == 0 and row.gap is None for row in rows)


def test_groups_are_joined_by_the_tensors_that_they_share():
    spec = fm.PermutationSpec.trace(mlp(), torch.randn(2, 6))
    found = structure_of(spec)
    assert [node.name for node in found.nodes if node.role == "group"] == ["0", "2"]
    pins = {node.name: node.tensors for node in found.nodes if node.role == "pin"}
    assert pins["model output"] == ("4.weight:0 of 3", "4.bias:0 of 3")
    names = {(found.nodes[arc.first].name, found.nodes[arc.second].name): arc.tensors for arc in found.arcs}
    assert names["0", "2"] == ("2.weight",)
    assert names["2", "model output"] == ("4.weight",)


def test_a_matrix_becomes_an_image_of_its_signs_and_sizes():
    url = matrix_image(torch.tensor([[1.0, -1.0, 0.0], [0.5, float("nan"), 3.0]]))
    data = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    pixels = matplotlib.image.imread(io.BytesIO(data), format="png")
    assert pixels.shape == (2, 3, 4)
    assert pixels[0, :, 3].tolist() == [1, 1, 0]
    assert pixels[1, :, 3].tolist() == pytest.approx([128 / 255, 0, 1], abs=0.01)
    assert pixels[0, 0, 2] > pixels[0, 0, 0]  # blue
    assert pixels[0, 1, 0] > pixels[0, 1, 2]  # orange


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.0, 0.037), (-0.2, 1.0), (93.1, 98.7), (0.0, 12345.0)]
)
def test_ticks_are_round_and_inside_the_scale(low, high):
    scale = Scale(low, high, 0, 100)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 6
    for place, text in ticks:
        assert low - 1e-9 <= float(text) <= high + 1e-9
        assert place == pytest.approx(scale(float(text)), abs=0.02)
