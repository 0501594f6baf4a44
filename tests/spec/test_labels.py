"""The algebra of axes, against the positions it stands for."""

from __future__ import annotations

import pytest

from fastmatch.spec import Axis
from fastmatch.spec.labels import (
    Label,
    find,
    is_pinned,
    pin,
    product,
    segments,
    split_product,
    split_sum,
    sum_of,
    unify,
)
from fastmatch.spec.places import places


def positions(label: Label) -> dict[int, list[int]]:
    """Leaf id -> every position it takes along the axis, in order."""
    found: dict[int, list[int]] = {}
    for p in places(label):
        axis = Axis("", 0, p.start, p.outer, p.stride, p.inner)
        found.setdefault(id(find(p.leaf)), []).extend(axis.positions(p.leaf.size).flatten().tolist())
    return found


def test_a_view_of_a_leaf_splits_it_and_both_factors_cover_the_axis():
    axis = Label(24)
    split = split_product([axis], [4, 6])
    assert split is not None
    assert [x.size for x in split] == [4, 6]
    assert [sorted(p) for p in positions(axis).values()] == [list(range(24))] * 2
    assert [(p.outer, p.stride, p.inner) for p in places(axis)] == [(1, 0, 6), (4, 6, 1)]


def test_a_flatten_joins_and_unites_with_a_fresh_axis():
    channels, pixels, weight = Label(512), Label(49, pinned="spatial"), Label(512 * 49)
    unify(weight, product([channels, pixels]), "addmm")
    first, second = places(weight)
    assert find(first.leaf) is channels
    assert (first.start, first.outer, first.inner) == (0, 1, 49)
    assert find(second.leaf).pinned == "spatial"


def test_concatenation_and_chunk():
    a, b, weight = Label(3), Label(5), Label(8)
    unify(weight, sum_of([a, b]), "conv")
    assert [(find(p.leaf) is x, p.start) for p, x in zip(places(weight), (a, b), strict=True)] == [
        (True, 0),
        (True, 3),
    ]
    fused = Label(10)
    halves = split_sum(fused, [5, 5])
    assert halves is not None
    unify(halves[0], halves[1], "mul")
    assert [p.start for p in places(fused)] == [0, 5]
    assert find(places(fused)[0].leaf) is find(places(fused)[1].leaf)


def test_sums_with_other_boundaries_meet_in_the_finer_cut():
    a, b = sum_of([Label(2), Label(6)]), sum_of([Label(5), Label(3)])
    unify(a, b, "add")
    assert [p.leaf.size for p in places(a)] == [2, 3, 3]
    assert positions(a) == positions(b)


def test_products_with_other_factors_meet():
    a = split_product([Label(24)], [4, 6])
    b = split_product([Label(24)], [2, 12])
    assert a is not None
    assert b is not None
    unify(product(a), product(b), "add")
    assert [p.leaf.size for p in places(product(a))] == [2, 2, 6]
    assert positions(product(a)) == positions(product(b))


def test_chunk_of_an_axis_already_factored_cuts_its_outer_factor():
    axis = Label(24)
    split_product([axis], [6, 4])
    parts = split_sum(axis, [8, 8, 8])
    assert parts is not None
    assert [p.start for p in places(axis) if p.inner == 4] == [0, 8, 16]


@pytest.mark.parametrize("a_sizes", [(4, 6)])
def test_what_cannot_be_said_is_pinned(a_sizes):
    a = split_product([Label(24)], list(a_sizes))
    b = split_product([Label(24)], [3, 8])
    assert a is not None
    assert b is not None
    unify(product(a), product(b), "clash")
    assert all(find(p.leaf).pinned == "clash" for x in (*a, *b) for p in places(x))


def test_an_axis_united_with_a_part_of_itself_is_pinned():
    part = Label(4)
    whole = product([part, Label(1)])
    assert find(whole) is part  # a factor of one position is no factor
    outer = product([part, Label(3)])
    unify(Label(12), outer, "ok")
    loop = Label(4)
    big = sum_of([loop, Label(0)])
    unify(loop, big, "self")
    assert find(loop).pinned is None


def test_pins_reach_parts_made_later_and_the_first_reason_stays():
    axis = Label(12)
    pin(axis, "first")
    pin(axis, "second")
    parts = split_product([axis], [3, 4])
    assert parts is not None
    assert [p.pinned for p in parts] == ["first", "first"]


def test_axes_of_unlike_length_do_not_unite():
    with pytest.raises(ValueError, match="3 and 4"):
        unify(Label(3), Label(4), "add")


@pytest.mark.parametrize("size", [20, 70, 5000])
def test_an_axis_beside_itself_moved_by_one_stays_in_place(size):
    axis = Label(size)
    front, back = split_sum(axis, [size - 1, 1]), split_sum(axis, [1, size - 1])
    unify(front[0], back[1], "a difference")
    assert all(is_pinned(part) for part in segments(axis))
