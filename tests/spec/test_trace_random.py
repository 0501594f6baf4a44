"""Tracing hunted with random networks and with code that is easy to trace wrongly."""

from __future__ import annotations

import copy
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import comb

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmatch as fm
from fastmatch.permutations.disturb import RoundedSums
from fastmatch.spec import SiteReader
from helpers.network_fuzz import NOISE, Findings, change, fuzz, random_network
from helpers.networks import NETWORKS, build, fresh_seed


def sites_checked(net: nn.Module, *x: torch.Tensor) -> int:
    """Read a network and its permuted copy at every site; each must hand out the other's units, reordered.

    Traced on a batch of 2, read on another. Groups and the groups inside them are moved one after the other.
    """
    traced = tuple(t[:2] for t in x)
    spec = fm.PermutationSpec.trace(net, traced, unread="ignore")
    assert set(readings(spec, net, traced, "post")) == set(spec.sites)
    return sum(sites_of(part, net, x) for part in (spec.flat(), spec.select(spec.top_level())))


def readings(spec: fm.PermutationSpec, net: nn.Module, x: tuple[torch.Tensor, ...], position) -> dict:
    """Return what the sites that a pass reaches hand out."""
    found: dict = {}
    reader = SiteReader(spec.sites, lambda t, v: found.update({t: v.clone()}), net, site=position)
    with torch.no_grad(), reader:
        net(*x)
    return found


def sites_of(spec: fm.PermutationSpec, net: nn.Module, x: tuple[torch.Tensor, ...]) -> int:
    """Return how many sites hand out what they name. The rows may be reordered too, where another group moves them.

    A pass may take another path than the traced one, and leave sites out. Sites whose values another order of sums
    changes as much are not counted.
    """
    permutations = spec.random()
    turned = fm.Alignment(permutations, spec).apply(net)
    checked = 0
    for position in ("pre", "post"):
        seen, moved = (readings(spec, model, x, position) for model in (net, turned))
        noise: dict | None = None
        places: dict[tuple, list] = {}
        for site in spec.sites:
            places.setdefault((site.op, site.role, site.axis.dim), []).append(site)
        for (op, role, dim), sites in places.items():
            difference = torch.inf
            if all((site in seen) == (site in moved) for site in sites):
                sites = [site for site in sites if site in seen]
                if not sites:
                    continue
                values, others = seen[sites[0]].clone(), moved[sites[0]].movedim(dim, -1)
                for site in sites:
                    part, index = site.axis.slice_of(values), torch.arange(values.shape[dim])
                    positions = site.axis.positions(spec.groups[site.group].size)
                    index[positions] = positions[:, permutations[site.group], :]
                    part.copy_(part.index_select(dim, index))
                difference = far(others, values.movedim(dim, -1))
            if difference > 1e-8:
                noise = magnified(spec, net, x, position, seen) if noise is None else noise
                assert difference <= NOISE * noise[sites[0]], f"{role} at operation {op}, {position}"
            else:
                checked += 1
    return checked


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return how far the rows of two tensors are from each other, relative to values above 1, in any order of rows."""
    rows = (t.reshape(-1, t.shape[-1]) for t in (one, other))
    one, other = ((t.real + 2 * t.imag if t.is_complex() else t).double().sort(0).values for t in rows)
    apart = (one - other).abs() / (1 + other.abs())
    same = one.eq(other) | (one.isnan() & other.isnan())
    return float(apart.nan_to_num(torch.inf, torch.inf).masked_fill(same, 0).max())


def magnified(
    spec: fm.PermutationSpec, net: nn.Module, x: tuple[torch.Tensor, ...], position, seen: dict
) -> dict:
    """Return how far other orders of sums move what each site hands out; infinitely if a pass leaves it out."""
    found = dict.fromkeys(spec.sites, 0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        with RoundedSums(torch.finfo(torch.float64).eps, generator):
            rounded = readings(spec, net, x, position)
        for site in spec.sites:
            if site in seen and site in rounded:
                found[site] = max(found[site], far(rounded[site], seen[site]))
            elif site in seen or site in rounded:
                found[site] = torch.inf
    return found


def hunt(count: int) -> None:
    """Judge networks of fresh seeds; a failure names the networks, and ``python -m helpers.network_fuzz`` repeats them."""
    found = Findings()
    for found in fuzz(fresh_seed(), count):
        assert not found.changed, found.changed
        assert not found.failed, found.failed
    doubtful = found.alarms + found.undecided
    assert len(doubtful) <= max(1, count / 1000), doubtful
    assert all(reason.startswith("aten.as_strided ") for reason in found.rules), found.rules
    assert found.groups > count  # networks in which nothing moves would prove nothing


@pytest.mark.filterwarnings("ignore")
def test_random_networks_keep_their_function():
    hunt(25)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_twenty_thousand_random_networks_keep_their_function():
    hunt(20_000)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_random_networks_hand_out_the_units_of_their_sites():
    seeds, sites, failed = random.Random(fresh_seed()), 0, {}
    for _ in range(12):
        seed = seeds.randrange(2**31)
        net, x = random_network(seed, batch=5)
        try:
            sites += sites_checked(net, *x)
        except AssertionError as error:
            failed[seed] = str(error)
    assert not failed  # by the seeds of their networks
    assert sites > 36


def test_sites_of_a_path_that_other_inputs_do_not_take_are_left_out():
    def body(s, x):
        h = s.a(x)
        return s.c(F.relu(h * s.scale if x.abs().sum() > 1e3 else s.b(h)))

    x = torch.randn(5, 12, dtype=torch.float64)
    x[2:] *= 1e3
    assert (
        sites_checked(Tricky(body).eval().double(), x) == 8
    )  # what a makes and c reads: twice, of two specs


def test_rows_picked_by_units_are_no_site_where_every_row_has_an_order_of_its_own():
    def body(s, x):
        rows = torch.tanh(s.table[s.a(x).argmax(1)])
        return s.c(F.relu(rows.view(-1, 8, 3).amax(2)))

    model, x = Tricky(body), torch.randn(5, 12, dtype=torch.float64)
    del model.b, model.scale
    model.table = nn.Parameter(torch.randn(8, 24))
    model = model.eval().double()
    spec = fm.PermutationSpec.trace(model, x[:2], unread="ignore")
    assert {g.within for g in spec.groups.values() if g.size == 3} == {"table"}  # inside the rows
    outer = next(g.name for g in spec.groups.values() if any(axis.parameter == "c.weight" for axis in g.axes))
    assert [(s.op_name, s.role) for s in spec.sites if s.group == outer] == [
        ("aten.relu", "activation"),
        ("aten.addmm", "consumed"),
    ]
    assert sum(sites_checked(model, x) for _ in range(3)) > 0


def test_sites_that_magnify_rounding_are_not_judged():
    def body(s, x):
        h = s.a(x)
        return s.c(F.relu(s.b(h) * (2**53 * h.sum(1, keepdim=True)).sin()))

    model, x = Tricky(body).eval().double(), torch.randn(5, 12, dtype=torch.float64)
    assert sites_checked(model, x) < len(fm.PermutationSpec.trace(model, x, unread="ignore").sites) * 4


def test_rounding_that_an_inverse_magnifies_is_no_change_to_the_judge():
    table = torch.tensor([[comb(i + j, i) for j in range(14)] for i in range(14)])  # condition 2e14

    class Inverting(Tricky):
        def __init__(self, body) -> None:
            super().__init__(body)
            self.a, self.c = nn.Linear(12, 14), nn.Linear(14, 5)
            self.register_buffer("table", table)

    def right(s, x):
        return s.c(s.a(x) @ torch.linalg.inv(s.table.double()))

    x = torch.randn(5, 12, dtype=torch.float64)
    model = Inverting(right).double()
    spec = fm.PermutationSpec.trace(model, x, unread="ignore")
    assert set(spec.groups) == {"a", "table"}
    assert [change(model, spec, (x,), seed) for seed in range(3)] == [0.0] * 3
    model.body = lambda s, x: s.c(s.a(x).cumsum(1))
    assert change(model, spec, (x,), 0) > 0.01


def test_sites_of_other_groups_are_seen_by_the_judge():
    model, x = (
        Tricky(lambda s, x: s.c(F.relu(s.b(F.relu(s.a(x)))))).eval().double(),
        torch.randn(5, 12).double(),
    )
    spec = fm.PermutationSpec.trace(model, x, unread="ignore")
    other = {"a": "b", "b": "a"}
    wrong = replace(spec, sites=tuple(replace(site, group=other[site.group]) for site in spec.sites))
    assert sites_of(spec, model, (x,)) == 2 * len(spec.sites)
    with pytest.raises(AssertionError, match="at operation"):
        sites_of(wrong, model, (x,))


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


def copied_deeply(s, x):
    return s.c(F.relu(copy.deepcopy(s.a(x))))


def given_the_values_of_another(s, x):
    h, other = s.a(x), s.b(s.a(x))
    h.data = other
    return s.c(F.relu(h))


def mapped_by_python(s, x):
    h = s.a(x)
    h.map_(s.b(s.a(x)), lambda a, b: a + b)
    return s.c(F.relu(h))


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
        (copied_deeply, []),
        (given_the_values_of_another, []),
        (mapped_by_python, []),
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


def test_a_model_that_runs_modules_on_another_thread_is_refused():
    def body(s, x):
        with ThreadPoolExecutor(1) as pool:
            return s.c(F.relu(pool.submit(s.a, x).result()))

    with pytest.raises(ValueError, match="runs 'a' on another thread"):
        fm.PermutationSpec.trace(Tricky(body), torch.randn(2, 12), unread="ignore")


def test_a_model_can_be_traced_while_another_thread_runs_it():
    started, ended = threading.Event(), threading.Event()

    def body(s, x):
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=lambda: (started.set(), s(x.detach()), ended.set()))
            other.start()  # as a caller elsewhere would, in the middle of this pass
            other.join()
        return s.c(F.relu(s.a(x)))

    model, x = Tricky(body), torch.randn(2, 12)
    spec = fm.PermutationSpec.trace(model, x, unread="ignore")
    assert ended.is_set()
    assert list(spec.groups) == ["a"]


def test_inputs_that_a_model_writes_to_are_left_alone():
    def body(s, x):
        return s.c(F.relu(s.a(x.mul_(2))))

    model, x = Tricky(body).eval().double(), torch.randn(3, 12, dtype=torch.float64)
    before = x.clone()
    spec = fm.PermutationSpec.trace(model, x, unread="ignore")
    assert fm.verify(model, spec, x).groups == ("a",)
    assert torch.equal(x, before)


def test_buffers_that_every_pass_changes_are_left_alone_by_a_proof():
    def body(s, x):
        h = s.a(x)
        s.calls += 1
        s.mean.mul_(0.9).add_(0.1 * h.mean(0))
        return s.c(F.relu(h - s.mean)) * s.calls, s.mean.sum()

    model, x = Tricky(body).eval(), torch.randn(3, 12)
    model.register_buffer("calls", torch.zeros(()))
    model.register_buffer("mean", torch.randn(8))
    before = model.mean.clone()
    spec = fm.PermutationSpec.trace(model, x, unread="ignore")
    assert {axis.parameter for axis in spec.groups["a"].axes} == {"a.weight", "a.bias", "c.weight", "mean"}
    assert fm.verify(model, spec, x).error < 1e-12
    assert torch.equal(model.mean, before)


@pytest.mark.parametrize("lazy", [nn.LazyLinear(8), nn.LazyBatchNorm1d(affine=False)], ids=["linear", "norm"])
def test_a_lazy_model_that_has_not_run_is_refused_by_name(lazy):
    model = nn.Sequential(nn.Linear(12, 8), lazy)
    with pytest.raises(ValueError, match=r"model: '1\.\w+' has no shape yet.*run the model once"):
        fm.PermutationSpec.trace(model, torch.randn(2, 12))


def test_a_model_that_returns_no_tensor_is_an_error():
    with pytest.raises(ValueError, match="returned NoneType with no tensor"):
        fm.PermutationSpec.trace(Tricky(lambda s, x: None), torch.randn(2, 12))
