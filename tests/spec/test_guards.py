"""What a pass with other answers may not do."""

from __future__ import annotations

import pytest
import torch

from fastmatch.spec.guards import Limits, PathLeft, _are_in_range

aten = torch.ops.aten
ROWS = torch.randn(5, 3)
ONES = torch.ones(2, 3)

INDEXED = {
    "embedding": (aten.embedding.default, lambda i: (ROWS, i)),
    "index_select": (aten.index_select.default, lambda i: (ROWS, 0, i)),
    "gather": (aten.gather.default, lambda i: (ROWS, 0, i[:, None])),
    "scatter_add": (aten.scatter_add.default, lambda i: (ROWS, 0, i[:, None], ONES)),
    "take": (aten.take.default, lambda i: (ROWS[:, 0], i)),
    "index": (aten.index.Tensor, lambda i: (ROWS, [i])),
    "index_put": (aten.index_put.default, lambda i: (ROWS, [i], ONES)),
}  # fmt: skip
"""Operation -> it, and its arguments for two positions among five."""


@pytest.mark.parametrize("name", INDEXED)
@pytest.mark.parametrize(("index", "fits"), [([0, 4], True), ([0, 5], False), ([-9, 1], False)])
def test_positions_beyond_their_axis_are_seen_before_a_gpu_reads_them(name, index, fits):
    func, arguments = INDEXED[name]
    assert _are_in_range(func, arguments(torch.tensor(index)), {}) == fits


@pytest.mark.parametrize("name", INDEXED)
def test_positions_from_the_end_are_for_some_operations(name):
    func, arguments = INDEXED[name]
    assert _are_in_range(func, arguments(torch.tensor([-1, -5])), {}) == (
        name.startswith("index_put") or name in ("index", "take")
    )


def test_operations_without_positions_are_in_range():
    assert _are_in_range(aten.add.Tensor, (ROWS, ROWS), {})
    assert _are_in_range(aten.index.Tensor, (ROWS, [torch.tensor([True, False, True, True, False])]), {})


def test_a_pass_keeps_to_the_size_and_the_length_of_the_first():
    limits = Limits()
    limits.note(10, torch.zeros(300, 300))
    limits.check(5, aten.ones.default, ([600, 600],), {"device": torch.device("cpu")})
    with pytest.raises(PathLeft):
        limits.check(5, aten.ones.default, ([9000, 9000],), {"device": torch.device("cpu")})
    with pytest.raises(PathLeft):  # an outer sum
        limits.check(5, aten.add.Tensor, (torch.zeros(9000, 1), torch.zeros(1, 9000)), {})
    limits.check(1000, aten.relu.default, (ROWS,), {})
    with pytest.raises(PathLeft):
        limits.check(1041, aten.relu.default, (ROWS,), {})
