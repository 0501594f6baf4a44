"""Numbers that depend on the order of hidden units: positions, masks, memory, values that leave torch.

Each body computes with them. Whatever the tracer leaves free to move must not change the function, on the traced
inputs or on others.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmatch as fm
from helpers.networks import fresh_seed

Body = Callable[["Net", torch.Tensor], torch.Tensor]


class Net(nn.Module):
    """Layers and tables of 8 units, used as a function says."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.scale, self.table = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8, 8))
        self.rows = nn.Parameter(torch.randn(20, 12))
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x)


def places(h: torch.Tensor) -> torch.Tensor:
    """Values turned into numbers from 0 to 7."""
    return (h.sigmoid() * 8).long().clamp(0, 7)


def one(s: Net, x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(x), 1, dtype=torch.long)


def padded(h: torch.Tensor) -> torch.Tensor:
    return F.pad(h, (0, 8 - h.shape[1]))


def in_front(s: Net, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    found = torch.zeros_like(h)
    found[:, : int(mask.sum())] = h[:, mask]
    return s.c(found)


def halved(s: Net, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    count = int(mask.sum())
    first, second = torch.cat([h[:, mask], h[:, ~mask]], 1).split([count, 8 - count], 1)
    return s.c(torch.cat([2 * first, second], 1))


def count(s: Net, x: torch.Tensor) -> int:
    return int((s.a(x).sum(0) > 0).sum())


def count_by_loop(s: Net, x: torch.Tensor) -> int:
    found, number = (s.a(x).sum(0) > 0).sum(), 0
    while found > number:
        number += 1
    return number


def split_at(s: Net, x: torch.Tensor) -> torch.Tensor:
    first, second = s.a(x).split([count(s, x), 8 - count(s, x)], 1)
    return s.c(torch.cat([2 * first, second], 1))


def steps(at: int) -> torch.Tensor:
    return torch.cat([2 * torch.ones(at), torch.ones(8 - at)])


def halves(h: torch.Tensor, at: int) -> torch.Tensor:
    return torch.cat([2 * h[:, :at], h[:, at:]], 1)


PINNED: dict[str, Body] = {
    "the largest unit is returned": lambda s, x: s.a(x).argmax(1),
    "the places of the top three are returned": lambda s, x: s.a(x).topk(3, 1)[1],
    "a position as a number": lambda s, x: s.c(s.a(x)) * s.a(x).argmax(1, keepdim=True).to(x.dtype),
    "a position among other numbers": lambda s, x: s.c(s.a(x)) * (s.a(x).argmax(1)[:, None] + 1),
    "a position written by scatter": lambda s, x: one(s, x).scatter(1, one(s, x), s.a(x).argmax(1, True)) + s.c(s.a(x)),
    "a position reinterpreted": lambda s, x: s.a(x).argmax(1).view(torch.float64)[:, None] + s.c(s.a(x)),
    "equal zeros ranked": lambda s, x: s.b(s.a(x)).gather(1, F.relu(s.a(x) - 0.8).topk(4, 1)[1]).sum(1),
    "equal signs sorted": lambda s, x: s.b(s.a(x)).gather(1, s.a(x).sign().sort(1)[1])[:, :2].sum(1),
    "a copy next to itself ranked": lambda s, x: s.a(x).repeat(1, 2).argmax(1)[:, None] + s.c(s.a(x)),
    "a cut where a count says": lambda s, x: s.c(halves(s.a(x), count(s, x))),
    "a cut where a loop's count says": lambda s, x: s.c(halves(s.a(x), count_by_loop(s, x))),
    "a cut where half a count says": lambda s, x: s.c(halves(s.a(x), count(s, x) // 2)),
    "a cut where a quarter of a count says": lambda s, x: s.c(halves(s.a(x), count(s, x) // 4)),
    "a cut where a count says, if it is small": lambda s, x: s.c(halves(s.a(x), min(count(s, x), 4))),
    "parts as long as a count says": split_at,
    "weights cut where a count says": lambda s, x: F.linear(s.a(x)[:, : count(s, x)], s.c.weight[:, : count(s, x)]),
    "a sum cut where a count says": lambda s, x: s.c(
        halves(s.a(x) + torch.zeros(len(x), 8).to(x), count(s, x))
    ),
    "units scaled up to where a count says": lambda s, x: s.c(s.a(x) * steps(count(s, x)).to(x)),
    "what a mask selects before others": lambda s, x: s.c(torch.cat([s.a(x)[:, s.a(x).sum(0) > 0], s.a(x)], 1)[:, :8]),
    "units chosen by a mask": lambda s, x: s.a(x)[s.a(x) > 0][:1] * s.c(s.a(x)),
    "units added at places that units give": lambda s, x: s.c(
        torch.zeros(len(x), 8).to(x).index_add(1, places(s.a(x)[0]), s.a(x))
    ),
    "the transposed memory of a square": lambda s, x: F.linear(s.a(x), s.table.as_strided((8, 8), (1, 8))),
    "the memory behind a slice": lambda s, x: s.c(s.a(x)[:, :4].as_strided((len(x), 8), (8, 1))),
    "a list": lambda s, x: s.c(s.a(x)) * s.a(x).tolist()[0][2],
    "an array": lambda s, x: s.c(s.a(x)) * float(s.a(x).numpy()[0, 2]),
    "an array by numpy": lambda s, x: s.c(s.a(x)) * float(np.asarray(s.a(x))[0, 2]),
    "an item": lambda s, x: s.c(s.a(x)) * s.a(x)[0, 2].item(),
    "a list of positions": lambda s, x: s.c(s.a(x)) * s.a(x).argmax(1).tolist()[0],
    "unique values": lambda s, x: s.c(s.a(x)) * torch.unique(s.a(x), return_inverse=True)[1].reshape(-1)[1],
    "the identity turned": lambda s, x: s.c(s.a(x) @ torch.eye(8).to(x).roll(1, 0)),
    "a row of the identity": lambda s, x: s.c(s.a(x) * torch.eye(8).to(x)[2]),
    "the sign of a determinant": lambda s, x: s.c(s.a(x) * s.table.slogdet()[0] * torch.eye(8, 9).to(x).sum(0)[:8].cumsum(0)),
    "what a mask selects, put in front": lambda s, x: in_front(s, s.a(x), s.a(x).sum(0) > 0),
    "what a mask selects, padded": lambda s, x: s.c(padded(s.a(x)[:, s.a(x).sum(0) > 0])),
    "what is not zero, padded": lambda s, x: s.c(padded(s.a(x)[:, (s.a(x).sum(0) > 0).nonzero()[:, 0]])),
    "what a mask selects in front of the others": lambda s, x: halved(s, s.a(x), s.a(x).sum(0) > 0),
    "a parameter made of turned units": lambda s, x: s.c(F.relu(nn.Parameter(s.a(x).roll(1, 1)))),
    "a parameter made of turned weights": lambda s, x: s.c(F.linear(x, nn.Parameter(s.a.weight.flip(0).clone()))),
    "random numbers per unit": lambda s, x: s.c(s.a(x) + torch.randn(8)),
}  # fmt: skip

FREE: dict[str, Body] = {
    "a unit picked by position": lambda s, x: s.scale.gather(0, s.a(x).argmax(1)),
    "a unit picked by the median": lambda s, x: s.scale[s.a(x).median(1)[1]],
    "rows looked up by units": lambda s, x: s.c(s.scale[places(s.a(x))]),
    "rows looked up by two": lambda s, x: s.c(s.table[places(s.a(x)), places(s.b(s.a(x)))]),
    "rows selected by units": lambda s, x: s.c(s.rows[:, 0].index_select(0, places(s.a(x)[0]))),
    "a vector looked up for every unit": lambda s, x: s.c(F.embedding(places(s.a(x)), s.table).mean(2)),
    "a row that the sign of a sum chooses": lambda s, x: s.c(s.table[int(s.a(x).sum() > 0)] * s.a(x)),
    "units written at positions": lambda s, x: s.c(
        torch.zeros(len(x), 8).to(x).index_put((torch.arange(len(x)), s.a(x).argmax(1)), s.a(x).amax(1))
    ),
    "units zeroed by a mask": lambda s, x: s.c(s.a(x).index_put((s.b(s.a(x)) > 0,), torch.zeros(()).to(x))),
    "solved with the identity and a table": lambda s, x: s.c(
        torch.linalg.solve(5 * torch.eye(8).to(x) + s.table, s.a(x).t()).t()
    ),
    "an orthogonal matrix by Cayley": lambda s, x: s.c(
        F.linear(s.a(x), torch.linalg.solve(torch.eye(8).to(x) + s.table - s.table.t(), torch.eye(8).to(x)))
    ),
    "an orthogonal matrix by an exponential": lambda s, x: s.c(
        F.linear(s.a(x), torch.linalg.matrix_exp(s.table - s.table.t()))
    ),
    "the inverse and its volume": lambda s, x: s.c(F.linear(s.a(x), s.table.inverse())) * s.table.slogdet()[1],
    "the determinant of products of units": lambda s, x: s.c(s.a(x)) * (torch.eye(8).to(x) + s.a(x).t() @ s.a(x)).det(),
    "rounded to a grid": lambda s, x: s.c(
        torch.fake_quantize_per_channel_affine(s.a(x).float(), s.scale.float(), torch.zeros(8), 1, -8, 7).to(x)
    ),
    "a parameter made of units": lambda s, x: s.c(F.relu(nn.Parameter(s.a(x)) * s.scale)),
    "a parameter made of weights": lambda s, x: s.c(F.linear(x, nn.Parameter(2 * s.a.weight)) * s.scale),
    "sorted values": lambda s, x: s.b(s.a(x)).sort(1)[0] @ s.table,
}  # fmt: skip


def difference(model: Net, spec: fm.PermutationSpec) -> float:
    model, worst = model.double(), 0.0
    with torch.no_grad():
        for count in (3, 3, 9, 9):
            x = torch.randn(count, 12).double()
            moved = fm.Alignment(spec.random(), spec).apply(model)
            torch.manual_seed(0)
            expected = model(x)
            torch.manual_seed(0)
            worst = max(worst, float((moved(x) - expected).abs().max()))
    return worst


@pytest.mark.parametrize("name", PINNED)
def test_what_depends_on_the_order_of_units_holds_them(name):
    torch.manual_seed(fresh_seed())
    model, x = Net(PINNED[name]).eval(), torch.randn(3, 12)
    spec = fm.PermutationSpec.trace(model.double(), x.double(), unread="ignore")
    assert not spec.axes_of("a.weight")
    assert difference(model, spec) < 1e-10


@pytest.mark.parametrize("selected", [0, 1, 2, 7, 8])
@pytest.mark.parametrize(
    "name", [name for name in PINNED if "a mask selects" in name or "count says" in name]
)
def test_a_count_of_units_holds_them_however_many_the_example_shows(name, selected):
    torch.manual_seed(fresh_seed())
    model, x = Net(PINNED[name]).double().eval(), torch.randn(3, 12).double()
    with torch.no_grad():
        sums, _ = model.a(x).sum(0).sort(descending=True)
        edges = torch.cat([sums[:1] + 1, sums, sums[-1:] - 1])
        model.a.bias -= (edges[selected] + edges[selected + 1]) / 6
    assert count(model, x) == selected
    spec = fm.PermutationSpec.trace(model, x, unread="ignore")
    assert not spec.axes_of("a.weight")
    assert difference(model, spec) < 1e-10


@pytest.mark.parametrize("name", FREE)
def test_what_moves_with_the_units_holds_nothing(name):
    torch.manual_seed(fresh_seed())
    model, x = Net(FREE[name]).eval(), torch.randn(3, 12)
    spec = fm.PermutationSpec.trace(model.double(), x.double(), unread="ignore")
    assert spec.axes_of("a.weight")
    assert difference(model, spec) < 1e-10


def test_rows_that_the_example_is_too_short_for_stay_in_place():
    model = Net(lambda s, x: s.c(F.relu(s.a(x + s.rows[: len(x)]))))
    spec = fm.PermutationSpec.trace(model, torch.randn(3, 12), unread="ignore")
    assert list(spec.groups) == ["a"]
    assert difference(model, spec) < 1e-10
