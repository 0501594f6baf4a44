"""The gain of one large group, whose blocks are multiplied by all ranks: the same bits on any number of them."""

from __future__ import annotations

import time

import pytest
import torch

import fastmatch as fm
from fastmatch._internal.ranks import Ranks, RanksError, current
from fastmatch.assignment import bounded_gain
from fastmatch.matching import gains
from fastmatch.matching.ascent import Hooks
from fastmatch.matching.weights import match_weights
from fastmatch.permutations.apply import permute_tensor
from helpers.networks import fresh_seed
from helpers.ranked import on_ranks

SIZES = (1, 2, 3, 5)
LAYERS, STREAM, HIDDEN = 6, 20, 48


class Residual(torch.nn.Module):
    """A stream that many blocks read and write, so that it is alone in its level of groups."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = torch.nn.Linear(7, STREAM)
        self.up = torch.nn.ModuleList(torch.nn.Linear(STREAM, HIDDEN) for _ in range(LAYERS))
        self.down = torch.nn.ModuleList(torch.nn.Linear(HIDDEN, STREAM) for _ in range(LAYERS))
        self.leave = torch.nn.Linear(STREAM, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return self.leave(x)


class Reads(dict):
    """A state as if it were on disk, which counts the numbers that are read from it."""

    def __init__(self, state):
        super().__init__(state)
        self.headers, self.device, self.numbers = dict(state), torch.device("cpu"), 0

    def __getitem__(self, name):
        tensor = super().__getitem__(name)
        self.numbers += tensor.numel()
        return tensor


def match(seed, near, *, in_blocks=True):
    """Match two states as if they were on disk; return the result, what was read, and the groups that were divided."""
    torch.manual_seed(seed)
    a, b = Residual(), Residual()
    spec = fm.PermutationSpec.trace(a, torch.randn(2, 7))
    states = [{k: t.detach() for k, t in model.state_dict().items()} for model in (a, b)]
    if near:
        order = spec.random()
        moved = {k: permute_tensor(t, k, spec, order) for k, t in states[0].items()}
        states[1] = {k: t + 1e-3 * torch.randn_like(t) for k, t in moved.items()}
    counted = [Reads(state) for state in states]
    divided = []
    # Bounds and blocks from a few units and features on, so that small networks have them; one tensor tells whether bounds pay.
    sizes = {"BOUNDED_UNITS": STREAM, "BOUNDED_PRODUCTS": 1, "BLOCK_FEATURES": 2}
    whole = gains.Gains.in_blocks

    def noted(self, blocks, group, permutations, *ranks):
        divided.append((group.name, len(blocks), ranks[0].size if ranks else 1))
        return whole(self, blocks, group, permutations, *ranks)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setattr(gains, name, value)
        patch.setattr(bounded_gain, "JUDGED", 20)
        patch.setattr(gains.Gains, "in_blocks", noted)
        hooks = Hooks(out_of_core=True, in_blocks=in_blocks, ranks=current())
        found = match_weights(*counted, spec, fm.WeightMatching(seed=3), hooks, progress=False)
    return found, sum(state.numbers for state in counted), divided


def failing(seed):
    """What a rank says if the last one cannot read its part."""
    ranks, build = current(), gains.Gains._build

    def failed(self, *args):
        if ranks.rank == ranks.size - 1:
            raise OSError("the disk is gone")
        return build(self, *args)

    gains.Gains._build = failed
    began = time.monotonic()
    try:
        match(seed, False)
    except (OSError, RanksError) as error:
        return str(error), time.monotonic() - began
    finally:
        gains.Gains._build = build
    return "", 0.0


def of_ranks(seed):
    failed = failing(seed) if current().size > 1 else None
    return match(seed, False), match(seed, True), failed, match(seed, True, in_blocks=False)


@pytest.fixture(scope="module")
def seed():
    return fresh_seed()


@pytest.fixture(scope="module")
def results(seed, tmp_path_factory):
    return on_ranks(tmp_path_factory.mktemp("ranks"), SIZES, [of_ranks], seed)[0]


def described(found):
    numbers = (found.objective, found.order, found.sweeps, found.solves, found.gaps)
    return {name: p.tolist() for name, p in found.permutations.items()}, numbers


@pytest.mark.slow
@pytest.mark.parametrize("near", [False, True])
def test_a_divided_gain_has_the_bits_of_one_process(seed, results, near):
    torch.set_num_threads(1)
    expected = match(seed, near)[0]
    for size in SIZES:
        for found in results[size]:
            assert described(found[near][0]) == described(expected)


@pytest.mark.slow
def test_all_ranks_multiply_the_gain_of_a_stream_whose_bounds_do_not_pay(seed, results):
    alone = match(seed, False)
    assert any(blocks > 4 for _, blocks, _ in alone[2])
    for size in SIZES[1:]:
        found = [value[False] for value in results[size]]
        shared = [{step for step in divided if step[2] == size} for _, _, divided in found]
        assert shared[0]
        assert all(other == shared[0] for other in shared)
        assert max(read for _, read, _ in found) < alone[1]  # no rank reads all that one process reads


@pytest.mark.slow
def test_bounds_that_pay_are_left_to_one_rank(results):
    for size in SIZES:
        for _, _, divided in (value[True] for value in results[size]):
            assert all(blocks == 1 for _, blocks, _ in divided)


@pytest.mark.slow
def test_near_copies_are_read_as_often_as_without_blocks(results):
    for size in SIZES:
        divided, undivided = (sum(value[k][1] for value in results[size]) for k in (True, 3))
        assert divided <= undivided


@pytest.mark.slow
def test_a_rank_that_fails_in_its_part_ends_the_others_at_once(results):
    for size in SIZES[1:]:
        *others, last = [value[2] for value in results[size]]
        assert last[0] == "the disk is gone"
        for said, seconds in others:
            assert f"rank {size - 1} failed: OSError: the disk is gone" in said
            assert seconds < 100  # ranks wait 300 seconds for one that does not answer


def test_blocks_hold_every_axis_once_and_are_about_equal():
    torch.manual_seed(fresh_seed())
    spec = fm.PermutationSpec.trace(Residual(), torch.randn(2, 7))
    group = max(spec.groups.values(), key=lambda g: len(g.axes))
    state = {name: torch.zeros(shape) for name, shape in spec.shapes.items()}
    found = gains.Gains(state, state, spec, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gains, "BOUNDED_UNITS", STREAM)
        patch.setattr(gains, "BOUNDED_PRODUCTS", 1)
        for features in (1, 3, 100):
            patch.setattr(gains, "BLOCK_FEATURES", features)
            blocks = found.blocks(group, group.axes)
            assert [axis for block in blocks for axis in block] == list(group.axes)
            sizes = [sum(state[axis.parameter].numel() for axis in block) for block in blocks]
            assert len(blocks) == 1 or max(sizes) <= 2 * HIDDEN * STREAM + sum(sizes) / len(sizes)
            assert (len(blocks) == 1) == (features == 100)


def test_the_tree_gives_what_is_merged_to_the_first_rank_alone():
    from fastmatch._internal.tree import MergeTree

    tree = MergeTree[list[int]](Ranks(), 5, lambda left, right: left + right)
    for k in range(5):
        tree.add(k, [k])
    assert tree.first() == [0, 1, 2, 3, 4]
