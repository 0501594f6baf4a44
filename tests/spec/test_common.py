"""What two models have in common: sizes along axes that no group moves."""

from __future__ import annotations

import torch

from fastmatch.spec import Axis, Group, PermutationSpec
from fastmatch.spec.common import moved_dimensions, other_sizes


def test_a_dimension_in_which_slices_are_positions_counts_as_moved():
    """Where it had another size, the slices would be other rows."""
    slices = {f"e{i}": Group(f"e{i}", 6, (Axis("w", 1, at=((0, 5 * i, 5),)),)) for i in (0, 3)}
    spec = PermutationSpec({**slices, "h": Group("h", 4, (Axis("head", 1),))}, {"w": (20, 6), "head": (3, 4)})
    assert moved_dimensions(spec) == {("w", 0), ("w", 1), ("head", 1)}
    a = {"w": torch.empty(20, 6), "head": torch.empty(3, 4)}
    assert other_sizes(spec, a, {"w": torch.empty(40, 6), "head": torch.empty(5, 4)}) == ["head"]
    assert other_sizes(spec, a, {"head": torch.empty(3, 5)}) == []
