"""The reports on diffusion models at their smallest sizes, and the names that they are about."""

from __future__ import annotations

from argparse import Namespace
from math import prod

import pytest

from bench.lib.diffusion_shapes import SD1, SDXL, UNET, sd35_shapes, shapes_of, unet_shapes
from bench.reports import diffusion_alignment, diffusion_many, diffusion_names
from fastmatch.checkpoint.diffusion.single_file import prove_file, trace_file
from helpers.diffusion import listed_shapes


@pytest.mark.parametrize(("file", "unet"), [("sd1-ldm", SD1), ("sdxl-sgm", SDXL)])
def test_made_names_of_a_unet_are_those_of_real_files(file, unet):
    made = {UNET + name: shape for name, shape in unet_shapes(unet).items()}
    assert made == listed_shapes(file, "diffuser")


PUBLISHED = {
    "SD 2.x": 0.866, "SDXL refiner": 2.3, "SD 3.5 medium": 2.5, "SD 3.5 large": 8.1, "Flux dev": 11.9, "Flux schnell": 11.9,
}  # fmt: skip
"""Billions of parameters of the UNet or the transformer, as their makers say."""


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_network_has_as_many_parameters_as_published(model):
    total = sum(prod(shape) for name, shape in shapes_of(model).items() if name.startswith(UNET))
    assert total / 1e9 == pytest.approx(PUBLISHED[model], rel=0.03)


@pytest.mark.parametrize("width", [128, pytest.param(1536, marks=pytest.mark.slow)])
def test_a_file_of_sd35_with_norms_of_heads_and_a_second_attention_is_proved(width):
    shapes = sd35_shapes(width, layers=2, side=32, double=1)
    spec = trace_file(shapes, "sd3.5")
    assert prove_file(shapes, spec, "sd3.5").error < 1e-12
    assert any(axis.parameter.endswith("attn2.proj.weight") for g in spec.groups.values() for axis in g.axes)


@pytest.mark.slow
def test_names_are_traced_and_proved():
    found = diffusion_names.measure(Namespace(tiny=True))
    (row,) = found["rows"]
    assert row["networks"] == ["unet"]
    assert row["can move"] > 0.5
    assert row["error"] < 1e-12
    assert "| tiny | unet |" in diffusion_names.page(found)


@pytest.mark.slow
def test_a_planted_file_is_recovered(tmp_path):
    options = Namespace(tiny=True, models=["SD 1.5"], pairs=["planted"], dir=tmp_path / "work")
    found = diffusion_alignment.measure(options)
    assert found["rows"][0]["recovered"] is True
    assert found["rows"][0]["bound"] > 0
    assert "to the last bit" in diffusion_alignment.page(found)


@pytest.mark.slow
def test_many_files_are_merged_and_a_killed_run_is_resumed(tmp_path):
    found = diffusion_many.measure(Namespace(tiny=True, dir=tmp_path / "work"))
    assert [row["files"] for row in found["rows"]] == [3, 5, 5]
    assert found["rows"][-1]["run"].endswith("equal bits")
    assert "equal bits" in diffusion_many.page(found)
