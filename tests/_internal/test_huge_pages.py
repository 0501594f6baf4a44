"""Tensors that are read into huge pages are those that the library reads, whatever their type."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from fastmatch._internal import safetensors_file
from fastmatch._internal.safetensors_file import DTYPES, read_entry, read_header
from fastmatch.permutations.precise import Wide


@pytest.mark.parametrize("dtype", sorted(DTYPES.values(), key=str), ids=str)
def test_every_type_is_read_into_huge_pages(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(safetensors_file, "HUGE", 0)
    given = torch.randint(0, 2, (3, 8)).to(dtype)
    save_file({"x": given, "none": given[:0].clone()}, tmp_path / "x.safetensors")
    entries, _ = read_header(tmp_path / "x.safetensors")
    with Wide():
        found = read_entry("x", entries["x"])
        assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), given.view(torch.uint8))
    assert read_entry("none", entries["none"]).shape == (0, 8)
