"""Tracing hunted with random networks and with code that is easy to trace wrongly."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmatch as fm
from fastmatch.spec import SiteReader
from helpers.networks import NETWORKS, build, fresh_seed
from helpers.random_networks import RandomNetwork


def random_network(seed: int, batch: int) -> tuple[RandomNetwork, torch.Tensor]:
    torch.manual_seed(seed)
    net, x = RandomNetwork(seed).eval(), torch.randn(batch, 12)
    with torch.no_grad():
        net(x)  # makes its layers
    return net.double(), x.double()


def sites_checked(net: nn.Module, x: torch.Tensor) -> int:
    """Reads a network and its permuted copy at every site; each must hand out the other's units, reordered.

    Traced on a batch of 2, read on another. The rows may be reordered too, where another group moves them.
    """
    spec = fm.PermutationSpec.trace(net, x[:2], unread="ignore")
    permutations = spec.random()
    turned = fm.Alignment(permutations, spec).apply(net)
    checked = 0
    for position in ("pre", "post"):
        seen: list[dict] = []
        for model in (net, turned):
            found: dict = {}
            with (
                torch.no_grad(),
                SiteReader(spec.sites, lambda t, v, f=found: f.update({t: v.clone()}), model, site=position),
            ):
                model(x)
            seen.append(found)
        assert set(seen[0]) == set(seen[1]) == set(spec.sites)
        places: dict[tuple, list] = {}
        for site in spec.sites:
            places.setdefault((site.op, site.role, site.axis.dim), []).append(site)
        for (op, role, dim), sites in places.items():
            values, others = seen[0][sites[0]].clone(), seen[1][sites[0]].movedim(dim, -1)
            for site in sites:
                part, index = site.axis.slice_of(values), torch.arange(values.shape[dim])
                positions = site.axis.positions(spec.groups[site.group].size)
                index[positions] = positions[:, permutations[site.group], :]
                part.copy_(part.index_select(dim, index))
            expected = values.movedim(dim, -1).flatten(0, -2).sort(0).values
            torch.testing.assert_close(
                others.flatten(0, -2).sort(0).values,
                expected,
                rtol=1e-8,
                atol=1e-8,
                msg=f"{role} at operation {op}",
            )
            checked += 1
    return checked


def hunt(count: int) -> None:
    seeds = random.Random(fresh_seed())
    groups = sites = 0
    for _ in range(count):
        seed = seeds.randrange(2**31)
        print(f"network {seed}")
        net, x = random_network(seed, batch=5)
        spec = fm.PermutationSpec.trace(net, x[:2], unread="ignore")
        failed = {p.reason for p in spec.pins if "rule failed" in p.reason}
        assert all(reason.startswith("aten.as_strided ") for reason in failed)
        assert fm.verify(net, spec, x, seed=seed, tolerance=1e-8).groups == tuple(spec.groups)
        groups += len(spec.groups)
        sites += sites_checked(net, x)
    assert groups > 2 * count  # networks in which nothing moves would prove nothing
    assert sites > 3 * count


def test_random_networks_keep_their_function_and_their_sites():
    hunt(150)


@pytest.mark.slow
def test_many_random_networks():
    hunt(20_000)


@pytest.mark.parametrize("name", NETWORKS)
def test_sites_hand_out_the_units_they_name(name):
    model, x = build(name, fresh_seed())
    assert sites_checked(model.double(), torch.cat([x, x, x[:1]]).double()) or name == "unruly"


class Tricky(nn.Module):
    """Three linear layers and a scale, used as a function says."""

    def __init__(self, body) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def unsqueezed_in_place(s, x):
    h = s.a(x)
    h.unsqueeze_(0)
    return s.c(F.relu(h * s.scale))[0]


def transposed_in_place(s, x):
    h = s.a(x).clone()
    h.t_()
    return s.c(F.relu((h * 2.0).t() * s.scale))


def squeezed_in_place(s, x):
    h = s.a(x)[:, None]
    h.squeeze_(1)
    return s.c(F.relu(h * s.scale))


def resized_in_place(s, x):
    h = s.a(x).clone()
    h.resize_(1, len(x), 8)
    return s.c(F.relu(h * s.scale))[0]


def written_to_out(s, x):
    h = s.a(x)
    buffer = torch.empty(len(x), 16, dtype=x.dtype)
    earlier = buffer[:, :8]
    torch.cat([h, s.b(h)], 1, out=buffer)
    return s.c(F.relu(earlier)) + s.c(buffer[:, 8:])


def log_sigmoid(s, x):
    return s.c(F.logsigmoid(s.a(x)))


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value) -> None:
        self.value = value


def returned_in_slots(s, x):
    return Slotted(s.b(F.relu(s.a(x))))


def returned_deep_inside(s, x):
    return [[[[[[{"y": s.b(F.relu(s.a(x)))}]]]]]]


def through_vmap(s, x):
    return torch.vmap(lambda v: s.c(F.relu(s.a(v))))(x)


@pytest.mark.parametrize(
    ("body", "groups"),
    [
        (unsqueezed_in_place, ["a"]),
        (transposed_in_place, ["a"]),
        (squeezed_in_place, ["a"]),
        (resized_in_place, []),
        (written_to_out, ["a"]),
        (log_sigmoid, ["a"]),
        (returned_in_slots, ["a"]),
        (returned_deep_inside, ["a"]),
        (through_vmap, ["a"]),
    ],
)
def test_code_that_is_easy_to_trace_wrongly(body, groups):
    model, x = Tricky(body).eval(), torch.randn(3, 12)
    spec = fm.PermutationSpec.trace(model, x, unread="ignore")
    assert list(spec.groups) == groups
    assert fm.verify(model, spec, x).error < 1e-12


def test_parameters_in_one_memory_move_together_or_not_at_all():
    model, x = Tricky(lambda s, x: s.c(F.relu(s.d(F.relu(s.b(s.a(x))))))), torch.randn(3, 12)
    model.d = nn.Linear(8, 8, bias=False)
    model.d.weight = nn.Parameter(model.b.weight.data)  # another parameter, the same memory
    spec = fm.PermutationSpec.trace(model, x, unread="ignore")
    axes = {g.name: {a.parameter for a in g.axes} for g in spec.groups.values()}
    assert axes == {"a": {"a.weight", "a.bias", "b.weight", "b.bias", "c.weight", "d.weight"}}
    model.register_buffer("part", model.scale.data[:4])
    model.body = lambda s, x: s.c(F.relu(s.a(x) * s.scale)) * s.part.sum()
    pins = {p.parameter: p.reason for p in fm.PermutationSpec.trace(model, x, unread="ignore").pins}
    assert pins["scale"] == pins["part"] == "memory shared with another parameter"


def test_a_buffer_replaced_in_the_forward_pass_is_put_back():
    def count(s, x):
        s.calls = s.calls + 1
        return s.c(F.relu(s.a(x)))

    model = Tricky(count)
    model.register_buffer("calls", torch.zeros(()))
    before = model.calls
    fm.PermutationSpec.trace(model, torch.randn(2, 12), unread="ignore")
    assert model.calls is before
    assert before == 0


def test_tensors_made_in_the_forward_pass_do_not_shift_the_sites():
    def body(s, x):
        mask = torch.ones(len(x), 1)
        buffer = torch.zeros_like(s.a(x))
        buffer[:, :4] = s.a(x)[:, :4]
        buffer[:, 4:] = s.a(x)[:, 4:]
        return s.c(buffer * mask)

    model = Tricky(body).eval()
    spec = fm.PermutationSpec.trace(model, torch.randn(2, 12), unread="ignore")
    assert {t.role for t in spec.sites} == {"produced", "consumed"}
    assert sites_checked(model.double(), torch.randn(5, 12, dtype=torch.float64)) > 0


def test_a_model_that_returns_no_tensor_is_an_error():
    with pytest.raises(ValueError, match="returned NoneType with no tensor"):
        fm.PermutationSpec.trace(Tricky(lambda s, x: None), torch.randn(2, 12))
