"""Models that read numbers in Python and go on by them: the paths that other numbers lead to are followed, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastmatch as fm
from fastmatch.spec import choices, follow
from fastmatch.spec.other_answers import tries
from helpers.networks import fresh_seed

Body = Callable[["Net", torch.Tensor], torch.Tensor]

Cutter = Callable[[torch.Tensor, Any], torch.Tensor]


class Net(nn.Module):
    """Layers of 8 units, used as a function says."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x)


def rounds(s: Net, x: torch.Tensor) -> torch.Tensor:
    h = s.a(x)
    while h.norm() > 2:
        h = 0.5 * torch.tanh(s.b(h))
    return s.c(h)


def exits(s: Net, x: torch.Tensor) -> torch.Tensor:
    h = s.a(x)
    for block in s.blocks:
        h = block(h).relu()
        if s.c(h).softmax(1).amax() > 0.6:
            break
    return s.c(h)


def settles(s: Net, x: torch.Tensor) -> torch.Tensor:
    h = s.a(x)
    for _ in range(9):
        before, h = h, torch.tanh(s.b(h) + s.a(x))
        if torch.dist(before, h).item() < 0.1:
            break
    return s.c(h)


def repeated(s: Net, x: torch.Tensor) -> torch.Tensor:
    h = s.a(x)
    for _ in range(int(h.abs().sum()) % 3):
        h = s.b(h).relu()
    return s.c(h)


def turned(s: Net, x: torch.Tensor) -> torch.Tensor:
    h = s.a(x)
    return s.c(torch.where(h.sum() > 0, h, h.flip(1)) if bool(x.mean() > 5) else h)


def rolled(s: Net, x: torch.Tensor) -> torch.Tensor:
    h = s.a(x)
    count = int((h.sum(0) > 0).sum())
    return s.c(torch.cat([h[:, count:], h[:, :count]], 1))


def ordered(s: Net, x: torch.Tensor) -> torch.Tensor:
    h = s.a(x)
    for k in h.sum(0).argsort()[:3].tolist():
        h = s.blocks[k % 4](h).relu()
    return s.c(h)


def first(s: Net, x: torch.Tensor) -> torch.Tensor:
    h = s.a(x)
    for k in np.argsort(h.square().sum(1).numpy())[:2]:
        h = s.blocks[k % 4](h).relu()
    return s.c(h)


def each(s: Net, x: torch.Tensor) -> torch.Tensor:
    h = s.a(x)
    chosen = s.b(h)[:, :3].argmax(1).tolist()
    return s.c(torch.stack([s.blocks[k](row).relu() for k, row in zip(chosen, h, strict=True)]))


BODIES: dict[str, tuple[Body, bool]] = {
    "a loop until a norm is small": (rounds, True),
    "an exit once a class is likely": (exits, True),
    "a loop until it settles": (settles, True),
    "as many rounds as a sum says": (repeated, True),
    "a branch by the inputs": (turned, False),
    "units turned by their count": (rolled, False),
    "blocks in the order of units": (ordered, False),
    "blocks in the order of rows": (first, True),
    "a block for each row": (each, True),
}
"""Name -> how the layers are used, and whether ``a``'s units move all the same."""


@pytest.mark.parametrize("name", BODIES)
def test_paths_that_the_example_does_not_take_keep_their_function(name):
    body, moves = BODIES[name]
    torch.manual_seed(fresh_seed())
    model, x = Net(body).double().eval(), torch.randn(3, 12).double()
    spec = fm.PermutationSpec.trace(model, x, unread="ignore")
    assert bool(spec.axes_of("a.weight")) == moves
    with torch.no_grad():
        for size in (0.01, 0.3, 1, 3, 30):
            moved = fm.Alignment(spec.random(), spec).apply(model)
            y = size * torch.randn(5, 12).double() + size
            assert torch.allclose(moved(y), model(y), rtol=0, atol=1e-9 * (1 + size))


def loop_count(x: torch.Tensor) -> int:
    rounds = 0
    while x.norm() > 4 * 2**rounds:
        rounds += 1
    return rounds


CONDITIONS: dict[str, Callable[[torch.Tensor], object]] = {
    "a sum": lambda x: x.sum() > 50,
    "a number of a list": lambda x: x.sum().tolist() > 50,
    "a sum of a list": lambda x: sum(x[0].tolist()) > 50,
    "a list's largest whole number": lambda x: max(x.long().flatten().tolist()) > 3,
    "a truth value of a list": lambda x: any((x > 5).flatten().tolist()),
    "an array": lambda x: x.numpy().sum() > 50,
    "a count": lambda x: int((x > 1).sum()) > 30,
    "a whole number": lambda x: int(x.sum()) > 90,
    "one whole number": lambda x: (x[0, 0] > 2).long().mul(4321).item() == 4321,
    "one number of a list": lambda x: 77 in (x[0] > 2).long().mul(77).tolist(),
    "a number between two": lambda x: 612 < (x[0, 0] > 2).long().mul(615).item() < 620,
    "a float between two": lambda x: 3.2 < (x[0, 0] > 2).double().mul(3.5).item() < 3.6,
    "one of many numbers": lambda x: (x[0, 0] > 2).long().mul(37).item() in (5, 9, 11, 17, 23, 29, 31, 37),
    "how many positions there are": lambda x: len((x > 5).nonzero()) > 0,
    "the size of what a mask selects": lambda x: x[x > 5].numel() > 0,
    "the size of what is selected": lambda x: len(x.masked_select(x > 5)) > 0,
    "a list of many": lambda x: max(x.long().repeat(1, 500).flatten().tolist()) > 3,
    "distinct values of a list": lambda x: (
        len(set((x[0] > 0.9 * torch.arange(12)).long().cumsum(0).tolist())) > 9
    ),
    "how many values are distinct": lambda x: len(x.sign().unique()) == 1,
    "questions of one line": lambda x: (
        x[0, 0] > 2 and x[0, 1] > 2 and x[0, 2] > 2 and x[0, 3] > 2 and x[0, 4] > 2
    ),
    "a question in a loop": lambda x: all(bool(x[0, k] > 2) for k in range(6)),
    "a largest of many": lambda x: max(x.flatten()) > 5,
    "how often the answer is yes": lambda x: sum(bool(row.norm() > 9) for row in x) >= 3,
    "how long a loop takes": lambda x: loop_count(x) > 3,
}
"""Name -> whether an input takes the other path, as people write it."""


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_path_that_the_example_does_not_take_is_followed_however_it_is_asked_for(name):
    def either(s: Net, x: torch.Tensor) -> torch.Tensor:
        h = s.a(x).relu()
        g = s.b(h).relu()
        return s.c(h if CONDITIONS[name](x) else g)

    torch.manual_seed(fresh_seed())
    model, x = Net(either).double().eval(), torch.randn(3, 12).double().clamp(-0.9, 0.9)
    other = torch.rand(5, 12).double() * 9 + 9
    assert bool(CONDITIONS[name](other)) != bool(CONDITIONS[name](x))
    spec = fm.PermutationSpec.trace(model, x, unread="ignore")
    assert len(spec.groups) == 1
    moved = fm.Alignment(spec.random(), spec).apply(model)
    with torch.no_grad():
        assert all(torch.allclose(moved(y), model(y), rtol=0, atol=1e-9) for y in (x, other))


class Cut(nn.Module):
    """Units of which a part is used, as an argument says."""

    def __init__(self, cut: Cutter) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.cut = cut

    def forward(self, x: torch.Tensor, k: Any) -> torch.Tensor:
        return self.c(self.b(self.cut(self.a(x).relu(), k)).relu())


def filled(h: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(h, (0, 8 - h.shape[1]))


CUTS: dict[str, tuple[Cutter, list[object]]] = {
    "as many as an argument says": (lambda h, k: filled(h[:, :k]), [8, 4, 3, 0]),
    "half of what an argument says": (lambda h, k: filled(h[:, : k // 2]), [16, 6, 2]),
    "parts of given lengths": (
        lambda h, k: torch.cat([2 * part for part in h.split(k.tolist(), 1)[:1]] + [h[:, k.tolist()[0] :]], 1),
        [torch.tensor([4, 4]), torch.tensor([2, 6]), torch.tensor([7, 1])],
    ),
    "parts of given lengths, one by one": (
        lambda h, k: torch.cat([(1 + i) * part for i, part in enumerate(h.split([int(v) for v in k], 1))], 1),
        [torch.tensor([3, 3, 2]), torch.tensor([1, 1, 6]), torch.tensor([6, 1, 1])],
    ),
    "parts at given places": (
        lambda h, k: torch.cat([(1 + i) * part for i, part in enumerate(h.tensor_split(k, 1))], 1),
        [torch.tensor([3, 6]), torch.tensor([1, 2]), torch.tensor([6, 7])],
    ),
    "parts of as many units as an argument says": (
        lambda h, k: h.view(len(h), k, -1).cumsum(1).flatten(1),
        [2, 4, 8, 1],
    ),
    "as many as are counted": (
        lambda h, k: filled(h[:, : len(torch.bincount(k))]),
        [torch.tensor([7, 0]), torch.tensor([1, 3]), torch.tensor([5, 5])],
    ),
    "the largest of a list": (
        lambda h, k: filled(h[:, : max(k.tolist())]),
        [torch.tensor([8, 2]), torch.tensor([1, 3]), torch.tensor([5, 5])],
    ),
    "as many as there are distinct values": (
        lambda h, k: filled(h[:, : 2 * len(k.unique())]),
        [torch.tensor([1, 2, 3, 4]), torch.tensor([1, 1, 1, 1]), torch.tensor([1, 2, 2, 1])],
    ),
}  # fmt: skip
"""Name -> how units are cut, and arguments."""


@pytest.mark.parametrize("examples", [1, 2])
@pytest.mark.parametrize("name", CUTS)
def test_units_that_an_argument_cuts_stay_in_place(name, examples):
    cut, arguments = CUTS[name]
    torch.manual_seed(fresh_seed())
    model, x = Cut(cut).double(), torch.randn(3, 6).double()
    spec = fm.PermutationSpec.trace(model, fm.Examples(*((x, k) for k in arguments[:examples])))
    assert not spec.axes_of("a.weight")
    assert spec.axes_of("b.weight")
    moved = fm.Alignment(spec.random(), spec).apply(model)
    assert all(torch.allclose(moved(x, k), model(x, k), rtol=0, atol=1e-10) for k in arguments)


def test_a_pass_that_fails_reads_nothing():
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor, k: int = 0, y: torch.Tensor | None = None) -> torch.Tensor:
            h = self.a(x).relu()
            if k > 3:
                assert y is not None, self.b(h)  # b is read before it fails
                h = h + self.b(h) * y
            return self.c(h)

    with pytest.raises(ValueError, match=r"does not read all of 'b\.weight'"):
        fm.PermutationSpec.trace(Conditional(), (torch.randn(3, 6), 0))


SELECTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "the first": lambda x, k: x[:, : int(k.sum())],
    "one": lambda x, k: x[int(k.sum())],
    "rows": lambda x, k: x[k],
    "columns": lambda x, k: x[:, k],
    "entries": lambda x, k: x[x[..., 0] > x[..., 0].median()],
    "entries by rows": lambda x, k: x[x[..., 0] > x[..., 0].median()].reshape(2, -1, 4),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_lengths_of_none_hold_no_stream(name):
    class Selecting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return self.c(self.a(SELECTIONS[name](x, k)).relu()).sum(-2)

    torch.manual_seed(fresh_seed())
    model, x = Selecting(), torch.randn(8, 8, 4)
    spec = fm.PermutationSpec.trace(model, (x, torch.tensor([1, 0, 1, 1, 0, 0, 0, 0]).bool()))
    assert list(spec.groups) == ["a"]


def changed_list(s: Net, x: torch.Tensor) -> torch.Tensor:
    sizes = (x[0] > 2).long().tolist()
    while sizes and sizes.pop() == 0:
        pass
    h = s.a(x).relu()
    return s.c(h if x.sum() > 50 else s.b(h).relu())


def two_counts(s: Net, x: torch.Tensor) -> torch.Tensor:
    first, second = int((x[:, 0] > 0).sum()), int((x[:, 1] > 0).sum())
    rows = x[x[:, 1] > 0].reshape(second, 12).sum()  # fails if it is told the other count
    return s.c(s.b(filled(s.a(x).relu()[:, :first])).relu()) + rows


class Deep(nn.Module):
    """A layer that asks by a list; many of them are asked in one line of code."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        g = self.layer(h).relu()
        return g + h if sum(x[0].tolist()) > 50 else g


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.layers = (
            nn.Linear(12, 8),
            nn.Linear(8, 3),
            nn.ModuleList(Deep() for _ in range(5)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x).relu()
        for layer in self.layers:
            h = layer(h, x)
        return self.c(h)


@pytest.mark.parametrize("name", ["a list that the model changes", "equal counts", "five layers"])
def test_answers_that_depend_on_each_other_are_told_apart(name):
    torch.manual_seed(fresh_seed())
    model = Stack() if name == "five layers" else Net(changed_list if "list" in name else two_counts)
    model, x = model.double().eval(), torch.randn(4, 12).double().clamp(-0.9, 0.9)
    x[:, :2] = torch.tensor([[0.5], [0.5], [-0.5], [-0.5]])  # two counts of two
    others = [x + 20, x * torch.tensor([-1.0] + [1.0] * 11), x.abs()]
    spec = fm.PermutationSpec.trace(model, x, unread="ignore")
    moved = fm.Alignment(spec.random(), spec).apply(model)
    with torch.no_grad():
        assert all(torch.allclose(moved(y), model(y), rtol=0, atol=1e-8) for y in (x, *others))


def test_lists_of_lengths_among_the_arguments_are_told_otherwise():
    torch.manual_seed(fresh_seed())
    model = Cut(lambda h, k: torch.cat([(1 + i) * part for i, part in enumerate(h.split(k, 1))], 1)).double()
    x = torch.randn(3, 6).double()
    spec = fm.PermutationSpec.trace(model, (x, [4, 4]))
    assert not spec.axes_of("a.weight")
    moved = fm.Alignment(spec.random(), spec).apply(model)
    assert all(torch.allclose(moved(x, k), model(x, k), rtol=0, atol=1e-10) for k in ([4, 4], [2, 6], [7, 1]))


def test_other_numbers_do_not_fill_the_memory():
    made: list[int] = []

    def square(s: Net, x: torch.Tensor) -> torch.Tensor:
        n = int(x[0, 0].long())
        mask = torch.ones(n, n)
        made.append(mask.numel())
        return s.c(s.a(x)) * mask.tril().mean()

    x = torch.randn(3, 12)
    x[0, 0] = 300
    fm.PermutationSpec.trace(Net(square), x, unread="ignore")
    assert len(set(made)) > 3
    assert max(made) <= 8 * 300**2 + 2**20


def test_a_number_is_alone_or_with_its_equals_and_every_question_is_asked_before_any_is_asked_again():
    first = choices.Choices()
    for place, value in (("a", 3), ("b", 3), ("c", True)):
        first.told(value, place)
    found = tries(first, 0, False, {})
    ranks = [one.rank for one in found]
    assert ranks == sorted(ranks)
    assert {one.position for one in found if one.rank == 0} == {0, 1, 2}
    assert {one.ties for one in found if one.position == 0} == {True, False}
    assert {one.ties for one in found if one.position == 1} == {True}  # nothing equal follows
    told = choices.Choices({0: 4}, limits=first.limits)
    assert [told.told(3, place) for place in "ab"] == [4, 4]
    alone = choices.Choices({0: 4}, ties=False, limits=first.limits)
    assert [alone.told(3, place) for place in "ab"] == [4, 3]


def test_every_task_that_a_number_chooses_is_read():
    class Tasks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Linear(12, 8)
            self.heads = nn.ParameterList(nn.Parameter(torch.randn(3, 8)) for _ in range(5))

        def forward(self, x: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
            return self.trunk(x).relu() @ self.heads[int(task)].t()

    spec = fm.PermutationSpec.trace(Tasks(), (torch.randn(2, 12), torch.tensor(2)))
    assert {axis.parameter for axis in spec.groups["trunk"].axes} >= {f"heads.{k}" for k in range(5)}


def test_what_another_path_writes_and_keeps_is_undone():
    class Initialized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c, self.calls = nn.Linear(12, 8), nn.Linear(8, 3), 0
            self.register_buffer("ready", torch.tensor(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.ready.item() == 0:
                self.a.weight.data.copy_(torch.full((8, 12), x.mean().item()))
                self.calls += 1
                self.ready.fill_(1)
                self.a.bias.data = torch.zeros(8)
            return self.c(self.a(x).relu())

    model = Initialized()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    fm.PermutationSpec.trace(model, torch.randn(2, 12))
    assert model.calls == 0
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_checks_of_values_hold_nothing():
    def checked(s: Net, x: torch.Tensor) -> torch.Tensor:
        h = s.a(x)
        assert torch.isfinite(h).all()
        if torch.isnan(h).any():
            raise ValueError("not a number")
        while not bool((h.abs() <= 4).all()):
            h = h / 2
        return s.c(h)

    spec = fm.PermutationSpec.trace(Net(checked), torch.randn(3, 12), unread="ignore")
    assert spec.axes_of("a.weight")


def test_more_paths_than_are_followed_are_told(monkeypatch):
    monkeypatch.setattr(follow, "MOST_PASSES", 2)
    with pytest.warns(UserWarning, match=r"more paths than the 2 that.*fm\.Examples"):
        fm.PermutationSpec.trace(Net(exits), torch.randn(3, 12), unread="ignore")


def test_experts_that_get_no_tokens_hold_nothing():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.gate, self.c = nn.Linear(6, 12), nn.Linear(12, 3), nn.Linear(12, 3)
            self.first, self.second, self.third = (nn.Linear(12, 12) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x)
            chosen = self.gate(h).argmax(1)
            mixed = torch.zeros_like(h)
            for number, expert in enumerate((self.first, self.second, self.third)):
                rows = chosen == number
                if rows.any():
                    heads = expert(h[rows]).view(-1, 3, 4).relu()
                    mixed[rows] = heads.reshape(-1, 12)
            return self.c(h + mixed)

    torch.manual_seed(fresh_seed())
    model = Experts().double()
    spec = fm.PermutationSpec.trace(model, torch.randn(1, 6).double())
    assert {axis.parameter for axis in spec.groups["a"].axes} >= {
        "first.weight",
        "second.weight",
        "third.weight",
    }
    moved, y = fm.Alignment(spec.random(), spec).apply(model), torch.randn(50, 6).double()
    assert torch.allclose(moved(y), model(y), rtol=0, atol=1e-10)
