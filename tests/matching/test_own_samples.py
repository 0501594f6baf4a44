"""Networks that choose their own samples, as routers choose the tokens of experts: two of them show other samples."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmatch as fm
from fastmatch.statistics.fisher import diagonal_fisher
from helpers.networks import fresh_seed


class Routed(nn.Module):
    """Each sample goes to the expert that the router likes best."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.router, self.c = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 16)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x).relu()
        weight, chosen = self.router(h).softmax(-1).max(-1)
        mixed = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            rows = torch.where(chosen == number)[0]
            if len(rows):
                mixed[rows] = expert(h[rows]) * weight[rows, None]
        return self.c(h + mixed)


class Choosing(nn.Module):
    """Each expert takes the half of the samples that it likes best."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.c = nn.Linear(6, 2), nn.Linear(20, 4)
        self.experts = nn.ModuleList(nn.Linear(6, 20) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = x.new_zeros(len(x), 20)
        for expert, liked in zip(self.experts, self.router(x).T, strict=True):
            rows = liked.topk(len(x) // 2).indices
            mixed[rows] += expert(x[rows]).relu()
        return self.c(mixed)


class Sorted(nn.Module):
    """Samples in the order of their experts, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.a, self.c = nn.Linear(6, 3), nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        order = self.router(x).argmax(-1).argsort()
        return self.c(self.a(x[order]).relu()[order.argsort()])


class Pruned(nn.Module):
    """The tokens that a score likes best, and a hidden layer of them."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.a, self.c = nn.Linear(6, 1), nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best = self.score(x)[..., 0].topk(4, 1).indices
        kept = x.gather(1, best[..., None].expand(-1, -1, 6))
        return self.c(self.a(kept).relu())


class Ranked(nn.Module):
    """Samples in an order that a buffer tells, the same in each network; values sorted along units, and codes of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.register_buffer("rank", torch.tensor([3.0, 1.0, 2.0, 0.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.b(self.a(x[:, self.rank.argsort()]).relu()).relu()
        _, code = torch.unique(h.sum(2) > 1, return_inverse=True)
        best = self.b(h.sort(1).values).relu()  # the largest of each unit, whichever sample has it
        return self.c(h + best) + code.to(h.dtype)[..., None] + h.sort(2).values[..., :4]


def batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(64, 6), torch.randint(0, 4, (64,))) for _ in range(count)]


@pytest.mark.parametrize("build", [Sorted, Pruned])
def test_samples_that_a_network_sorts_or_selects_are_chosen(build):
    x = torch.randn(8, 6) if build is Sorted else torch.randn(8, 7, 6)
    spec = fm.PermutationSpec.trace(build(), x)
    readable = {site.role for site in spec.sites if not site.chosen}
    assert readable == ({"consumed"} if build is Sorted else set())  # after the way back
    assert {site.role for site in spec.sites if site.chosen} >= {"produced", "activation"}


def test_samples_that_every_network_takes_in_one_order_are_not_chosen():
    spec = fm.PermutationSpec.trace(Ranked(), torch.randn(8, 4, 6))
    assert "a" in spec.groups
    assert not any(site.chosen for site in spec.sites)


def test_a_partial_merge_takes_such_groups_as_they_are():
    torch.manual_seed(fresh_seed())
    a, b, data = Pruned(), Pruned(), [torch.randn(64, 7, 6) for _ in range(2)]
    with pytest.warns(UserWarning, match="1 groups are merged unit by unit as they are"):
        merged = fm.merge_partial([a, b], data[0], fm.Permute(data), start_at=0)
    assert torch.isfinite(merged.model(data[1])).all()


def test_units_are_compared_where_both_networks_show_the_same_samples():
    torch.manual_seed(0)
    a, b, order = Choosing(), Choosing(), torch.randperm(20)
    with torch.no_grad():  # only the routers differ
        for first, second in zip(a.experts, b.experts, strict=True):
            second.weight.copy_(first.weight[order])
            second.bias.copy_(first.bias[order])
        b.c.weight.copy_(a.c.weight[:, order])
    data = [torch.randn(1024, 6) for _ in range(8)]
    found = fm.align(a, b, data[0], fm.ActivationMatching(data))
    ((_, permutation),) = found.permutations.items()
    assert int((order[permutation] == torch.arange(20)).sum()) >= 8  # one, by chance


@pytest.mark.parametrize("rows", [1, 64])
def test_experts_stay_in_place_and_a_warning_names_them(rows):
    torch.manual_seed(fresh_seed())
    model, data = Routed(), batches()
    spec = fm.PermutationSpec.trace(model, torch.randn(rows, 6))
    hidden = fm.Alignment(spec.random(), spec)
    with pytest.warns(UserWarning, match=r"3 groups stay in place.*router.*experts.*WeightMatching"):
        found = fm.ActivationMatching(data).match(model, hidden.apply(model), spec)
    experts = {name for name in spec.groups if name.startswith("experts.") and spec.groups[name].size == 12}
    assert len(experts) == 3
    for name, permutation in found.permutations.items():
        wanted = torch.arange(12) if name in experts else hidden.invert().permutations[name]
        assert torch.equal(permutation, wanted), name


def test_a_report_and_a_mixture_do_without_the_experts():
    torch.manual_seed(fresh_seed())
    a, b, data = Routed(), Routed(), batches()
    x = data[0][0]
    report = fm.align(a, b, x).report(a, b, data)
    shown = {matrix.name for matrix in report.matrices}
    assert shown
    assert not any("experts" in name for name in shown)
    spec = fm.PermutationSpec.trace(a, x)
    mixed = fm.Mixture(fm.WeightMatching(), fm.ActivationMatching(data), 0.5).match(a, b, spec)
    assert mixed.permutations.keys() == spec.groups.keys()


def test_a_spec_as_text_knows_where_networks_choose_their_samples():
    spec = fm.PermutationSpec.trace(Routed(), torch.randn(64, 6))
    assert {site.chosen for site in spec.sites} == {False, True}
    assert fm.PermutationSpec.from_json(spec.to_json()).sites == spec.sites


def test_fisher_information_of_a_network_that_branches_on_values():
    torch.manual_seed(fresh_seed())
    model, data = Routed().double(), [(x.double(), y) for x, y in batches(1)]
    found = diagonal_fisher(model, data)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for sample, target in zip(*data[0], strict=True):
        model.zero_grad()
        F.cross_entropy(model(sample[None]), target[None]).backward()
        for name, p in model.named_parameters():
            expected[name] += (0 if p.grad is None else p.grad**2) / 64
    assert all(torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-15) for name in expected)


def test_merges_of_experts_are_renormalized_where_both_ran():
    torch.manual_seed(0)
    a, b, data = Routed(), Routed(), batches()
    with torch.no_grad():
        b.router.weight *= 5
        a.router.bias[0] += 100  # no sample goes to the others
    merged = fm.merge([a, b])
    for method in ("repair", "rescale"):
        with pytest.warns(
            UserWarning, match=r"leaves these alone.*experts\.1\.0: is not run on the data by every"
        ):
            new = fm.renormalize(merged, [a, b], data, method)
        assert torch.isfinite(new(data[0][0])).all()
        assert torch.equal(new.experts[1][0].weight, merged.experts[1][0].weight)
        assert not torch.equal(new.a.weight, merged.a.weight)
    with pytest.raises(ValueError, match=r"'experts\.0\.0' has other samples in each endpoint.*router"):
        fm.renormalize(merged, [a, b], data, "least-squares")
    with pytest.warns(UserWarning, match="leaves these alone"):
        assert torch.isfinite(fm.renormalize(merged, [a, b], data)(data[0][0])).all()
