"""Partial merging: function preserved where it must be, equal to what it generalises, a module like any other."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn

import bench.reports.partial_merging as bench
import fastmatch as fm
from bench.lib import record as records
from fastmatch.merging.mixed_norms import normed_layers
from fastmatch.merging.rewire import Rewiring
from fastmatch.merging.units import matrix_maps
from fastmatch.renorm import endpoint_statistics
from fastmatch.spec.graph import trace_graph
from fastmatch.statistics.moments import CrossMoments
from fastmatch.studies.digits import Batches, digits, train
from helpers.networks import NETWORKS, build, fresh_seed, mlp

DOUBLE = torch.float64
RULES = ("identity", "permute", "zip", "cca")


def rule_of(word: str, data, **options):
    """The rule of that name; ``data`` is for those that match activations."""
    if word == "identity":
        return fm.Identity()
    return {"permute": fm.Permute, "zip": fm.Zip, "cca": fm.CCA}[word](data, **options)


def inputs_like(x: torch.Tensor, count: int = 96) -> Batches:
    """Random data of two batches, the last one short; in float64."""
    return Batches(torch.randn(count, *x.shape[1:], dtype=DOUBLE), torch.zeros(count), 64)


def two(name: str, seed: int, count: int = 2) -> tuple[list[nn.Module], torch.Tensor]:
    built = [build(name, seed + k) for k in range(count)]
    return [model.double() for model, _ in built], built[0][1].double()


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.grid
@pytest.mark.filterwarnings("ignore:merge_partial. the rule mixes units")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_merged_with_itself_is_itself(name, rule):
    seed = fresh_seed()
    model, x = build(name, seed)
    model, x = model.double(), x.double()
    data = inputs_like(x)
    count = len(fm.PermutationSpec.trace(model, x).flat().groups)
    for start_at in (0, count // 2):
        found = fm.merge_partial([model, model], x, rule_of(rule, data), start_at=start_at)
        torch.testing.assert_close(
            run(found.model, data.inputs), run(model, data.inputs), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("rule", RULES)
def test_named_groups_stay_apart(rule):
    (a, b), x = two("resnet", fresh_seed())
    data = inputs_like(x)
    found = fm.merge_partial([a, a], x, rule_of(rule, data), apart=["stage1.0.conv1", "stage2.0.conv2"])
    torch.testing.assert_close(run(found.model, x), run(a, x), rtol=1e-9, atol=1e-9)
    found = fm.merge_partial([a, b], x, rule_of(rule, data), apart=["stage1.0.conv1"])
    # Bit for bit what each model had.
    for k, model in enumerate((a, b)):
        kept = f"apart.{k}.stage1.0.conv1.weight"
        assert kept in found.apart
        assert torch.equal(found.model.get_parameter(kept), model.get_parameter("stage1.0.conv1.weight"))
    assert "merged.stage1.0.conv1.weight" not in dict(found.model.named_parameters())
    assert set(found.spec.groups) - set(found.merged) == {"stage1.0.conv1"}
    assert f"{len(found.merged)} of {len(found.spec.groups)} groups merged" in repr(found)


@pytest.mark.parametrize(
    "name",
    [
        "vgg",
        "encoder",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("mlp", "resnet", "resnet with layer norm")),
    ],
)
def test_permute_from_the_start_is_align_and_merge(name):
    (a, b), x = two(name, fresh_seed())
    data = inputs_like(x)
    spec = fm.PermutationSpec.trace(a, x).flat()  # whole heads stay, their channels move
    alignment = fm.align(a, b, x, fm.ActivationMatching(data), spec=spec)
    merged = fm.merge([a, alignment.apply(b)], [0.3, 0.7])
    found = fm.merge_partial([a, b], x, fm.Permute(data), weights=[0.3, 0.7])
    theirs = merged.state_dict()
    ours = {n.removeprefix("merged."): t for n, t in found.model.state_dict().items()}
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key
    assert torch.equal(run(found.model, x), run(merged, x))


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet", "dense", "functional", "encoder"])
def test_identity_from_the_start_is_a_plain_average(name):
    (a, b, c), x = two(name, fresh_seed(), count=3)
    found = fm.merge_partial([a, b, c], x, fm.Identity())
    assert torch.equal(run(found.model, x), run(fm.merge([a, b, c]), x))


@pytest.mark.parametrize("name", NETWORKS)
def test_kept_apart_to_the_end_it_is_the_ensemble(name):
    (a, b), x = two(name, fresh_seed())
    count = len(fm.PermutationSpec.trace(a, x).flat().groups)
    # Nothing is merged, so the data is not read.
    found = fm.merge_partial([a, b], x, fm.Zip([]), start_at=count, weights=[0.25, 0.75])
    expected = run(fm.Ensemble([a, b], [0.25, 0.75]), x)
    torch.testing.assert_close(run(found.model, x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(expected, 0.25 * run(a, x) + 0.75 * run(b, x), rtol=1e-12, atol=1e-12)
    assert not found.maps


@pytest.mark.filterwarnings("ignore:merge_partial. the rule mixes units")  # equal models merge exactly
def test_a_planted_permutation_is_undone_by_every_matching_rule():
    seed = fresh_seed()
    torch.manual_seed(seed)
    # Without ReLU no unit is dead: of dead ones nobody can tell which is which.
    a = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 12, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(192, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 5),
    ).double().eval()  # fmt: skip
    x = torch.randn(2, 3, 8, 8, dtype=DOUBLE)
    spec = fm.PermutationSpec.trace(a, x)
    planted = fm.Alignment(spec.random(torch.Generator().manual_seed(seed)), spec)
    data = inputs_like(x)
    for rule in ("permute", "zip", "cca"):
        for start_at in (0, 1):
            found = fm.merge_partial([a, planted.apply(a), a], x, rule_of(rule, data), start_at=start_at)
            torch.testing.assert_close(run(found.model, x), run(a, x), rtol=1e-7, atol=1e-7)


def test_zip_merges_units_within_a_model():
    """A holds every unit twice, B two kinds: pairs within the models lose nothing, pairs across must."""
    seed = fresh_seed()
    torch.manual_seed(seed)
    half_a, half_b = (nn.Linear(6, 8).double() for _ in range(2))

    def doubled(half: nn.Linear) -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).double()
        with torch.no_grad():
            for source, target in ((half.weight, model[0].weight), (half.bias, model[0].bias)):
                target.copy_(torch.cat([source, source]))
        return model

    a, b = doubled(half_a), doubled(half_b)
    x = torch.randn(200, 6, dtype=DOUBLE)
    apart = run(fm.Ensemble([a, b]), x)
    exact = fm.merge_partial([a, b], x, fm.Zip([x], b=1.0))
    torch.testing.assert_close(run(exact.model, x), apart, rtol=1e-10, atol=1e-10)
    across = fm.merge_partial([a, b], x, fm.Permute([x]))
    assert (run(across.model, x) - apart).abs().max() > 1e-3


def test_zip_maps_average_and_take_apart():
    """sum_k w_k R_k U_k = I, whatever the clusters and weights."""
    (a, b, c), x = two("mlp", fresh_seed(), count=3)
    weights = [0.5, 0.2, 0.3]
    for rule in RULES:
        found = fm.merge_partial(
            [a, b, c],
            x,
            rule_of(rule, inputs_like(x), **({"b": 0.5} if rule == "zip" else {})),
            weights=weights,
        )
        for group, maps in found.maps.items():
            eye = torch.eye(found.spec.groups[group].size, dtype=DOUBLE)
            there_and_back = [
                w * leave(read(eye, 0), 0)
                for w, leave, read in zip(weights, maps.leave, maps.read, strict=True)
            ]
            torch.testing.assert_close(sum(there_and_back), eye, rtol=1e-8, atol=1e-8)
            for enter, read in zip(maps.enter, maps.read, strict=True):
                torch.testing.assert_close(enter(eye, 0), read(eye, 0).T)


@pytest.mark.parametrize("rule", RULES)
def test_data_is_read_once(rule):
    (a, b, c), x = two("vgg", fresh_seed(), count=3)
    data = inputs_like(x, 80)
    fm.merge_partial([a, b, c], x, rule_of(rule, data), start_at=1)
    assert data.reads == (0 if rule == "identity" else 1)


@pytest.mark.grid
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["vgg", "grouped", "encoder"])
def test_the_merge_saves_copies_and_exports(name, rule, tmp_path):
    (a, b), x = two(name, fresh_seed())
    model = fm.merge_partial(
        [a, b],
        x,
        rule_of(rule, inputs_like(x)),
        start_at=1,
        apart=[list(fm.PermutationSpec.trace(a, x).flat().groups)[-1]],
    ).model
    expected = run(model, x)
    torch.save(model, tmp_path / "whole.pt")
    assert torch.equal(run(torch.load(tmp_path / "whole.pt", weights_only=False), x), expected)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(run(other, x), expected)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(run(exported, x), expected, rtol=1e-12, atol=1e-12)


def test_the_merge_runs_at_other_batch_sizes_and_trains():
    (a, b), x = two("resnet", fresh_seed())
    model = fm.merge_partial([a, b], x, fm.Zip(inputs_like(x)), start_at=2).model
    assert not model.training
    assert run(model, torch.cat([x] * 3)).shape == (6, 10)
    model(x).square().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.startswith("apart."))


def test_the_cost_of_apart_and_merged():
    (a, b), x = two("mlp", fresh_seed())
    single, pair = fm.model_cost(a, x), fm.model_cost(fm.Ensemble([a, b]), x)
    assert (pair.parameters, pair.flops) == (2 * single.parameters, 2 * single.flops)
    costs = [
        fm.model_cost(fm.merge_partial([a, b], x, fm.Zip(inputs_like(x)), start_at=k).model, x)
        for k in range(3)
    ]
    assert costs[0] == single
    assert costs[2] == pair
    layers = {n: sum(p.numel() for p in m.parameters()) for n, m in a.named_children()}
    assert costs[1].parameters == single.parameters + layers["0"]
    # Two products of a batch of 2: 12 x 24 once more than one network.
    assert costs[1].flops == single.flops + 2 * 2 * 12 * 24
    assert all(low.flops <= high.flops for low, high in pairwise(costs))


def test_shared_and_twice_used_modules_keep_their_ties():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.block, self.head = nn.Linear(12, 20), nn.Linear(20, 20), nn.Linear(20, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.block(torch.relu(self.up(x))))
            return self.head(torch.relu(self.block(x)))

    torch.manual_seed(fresh_seed())
    a, b, x = Twice().double(), Twice().double(), torch.randn(64, 12, dtype=DOUBLE)
    found = fm.merge_partial([a, b], x, fm.Permute([x]))
    assert sum(p.numel() for p in found.model.parameters()) == sum(p.numel() for p in a.parameters())
    (tied, other), x = two("tied", fresh_seed())
    found = fm.merge_partial([tied, other], x, fm.Permute(inputs_like(x)))
    assert fm.model_cost(found.model, x).parameters == fm.model_cost(tied, x).parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_stay(dtype):
    (a, b), x = two("mlp", fresh_seed())
    x = x.to(dtype)
    for rule in RULES:
        model = fm.merge_partial(
            [a.to(dtype), b.to(dtype)], x, rule_of(rule, [torch.randn(64, 12).to(dtype)]), start_at=1
        ).model
        assert {p.dtype for n, p in model.named_parameters() if n.startswith(("apart", "merged"))} == {dtype}
        assert run(model, x).dtype == dtype


def test_models_are_left_as_they_are():
    (a, b), x = two("vgg", fresh_seed())
    a.train()
    b.requires_grad_(False)
    before = copy.deepcopy(a.state_dict())
    fm.merge_partial([a, b], x, fm.CCA(inputs_like(x)), start_at=1)
    assert a.training
    assert all(module.training for module in a.modules())
    assert not any(p.requires_grad for p in b.parameters())
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("rule", ["identity", "permute", "zip"])
def test_renormalizing_a_partial_merge(rule):
    """Of a model with itself REPAIR is the identity; of two, every layer reaches its target."""
    (a, b), x = two("vgg without norm", fresh_seed())
    data = [1e4 * torch.randn(64, *x.shape[1:], dtype=DOUBLE)]  # eps is negligible next to such variances
    same = fm.merge_partial([a, a], x, rule_of(rule, data), start_at=1)
    repaired = fm.renormalize(same.model, same.endpoint_statistics([a, a], data), data, "repair")
    torch.testing.assert_close(run(repaired, x), run(a, x), rtol=1e-8, atol=1e-8)
    found = fm.merge_partial([a, b], x, rule_of(rule, data), start_at=1)
    endpoints = found.endpoint_statistics([a, b], data)
    repaired = fm.renormalize(found.model, endpoints, data, "repair")
    targets = endpoints.targets(found.weights)
    reached = endpoint_statistics([repaired], data).targets([1.0])
    assert targets.keys() == reached.keys()
    assert {name.split(".")[0] for name in targets} == {"apart", "merged"}
    for name in targets:
        for target, now in zip(targets[name], reached[name], strict=True):
            torch.testing.assert_close(now, target, rtol=1e-6, atol=1e-6)


def test_permuted_statistics_are_those_of_aligned_endpoints():
    (a, b), x = two("vgg without norm", fresh_seed())
    data = inputs_like(x)
    found = fm.merge_partial([a, b], x, fm.Permute(data))
    alignment = fm.align(a, b, x, fm.ActivationMatching(data))
    expected = fm.endpoint_statistics([a, alignment.apply(b)], data).targets([0.5, 0.5])
    targets = found.endpoint_statistics([a, b], data).targets([0.5, 0.5])
    assert targets.keys() == {f"merged.{name}" for name in expected}
    for name, pair in expected.items():
        for theirs, ours in zip(pair, targets[f"merged.{name}"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_reset_works_for_every_rule_and_repair_says_why_not_for_cca():
    (a, b), x = two("vgg", fresh_seed())
    data = inputs_like(x)
    found = fm.merge_partial([a, b], x, fm.CCA(data), start_at=1)
    reset = fm.renormalize(found.model, None, data, "reset")
    norm = reset.get_submodule("merged.features.5")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    assert bool((norm.running_var > 0).all())
    assert bool(torch.isfinite(run(reset, x)).all())
    with pytest.raises(ValueError, match="'cca' mixes units"):
        found.endpoint_statistics([a, b], data)


class Optional(nn.Module):
    """Takes a mask or none, and a number that keeps its default."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, *, scale: float = 2.0
    ) -> torch.Tensor:
        x = torch.relu(self.first(x))
        if mask is not None:
            x = x * mask
        return self.last(torch.relu(self.second(x)) * scale)


def test_inputs_by_position_by_name_and_left_out():
    torch.manual_seed(fresh_seed())
    a, x = Optional().double(), torch.randn(30, 12, dtype=DOUBLE)
    mask = torch.rand(30, 8, dtype=DOUBLE)
    examples = (
        ((x,), {}, x),
        ((x, mask), {}, (x, mask)),
        ((), {"x": x, "mask": mask}, {"x": x, "mask": mask}),
    )
    for args, kwargs, example in examples:
        data = [x] if isinstance(example, torch.Tensor) else None
        rule = fm.Zip(data) if data else fm.Identity()
        model = fm.merge_partial([a, a], example, rule, start_at=1).model
        with torch.no_grad():
            torch.testing.assert_close(model(*args, **kwargs), a(*args, **kwargs))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


def test_what_it_cannot_do_is_said():
    (a, b), x = two("mlp", fresh_seed())
    data = inputs_like(x)
    wrong = {
        "models: expected at least two": {"models": [a]},
        "start_at: unknown group 'nowhere'": {"start_at": "nowhere"},
        "start_at: expected a position of 0 to 2": {"start_at": 3},
        "apart: unknown group 'nowhere'": {"apart": ["nowhere"]},
        "weights: expected positive numbers": {"weights": [1.5, -0.5]},
        "weights: expected 2": {"weights": [1.0]},
        "data: yielded no batch": {"rule": fm.Permute([])},
        "activations of group '0' hold NaN": {
            "rule": fm.Permute([torch.full((4, 12), float("nan"), dtype=DOUBLE)])
        },
        "models\\[1\\]: tensor '0.weight' has shape": {"models": [a, mlp(8).double()]},
    }
    for message, arguments in wrong.items():
        given = {"models": [a, b], "example_inputs": x, "rule": fm.Permute(data), **arguments}
        with pytest.raises(ValueError, match=message):
            fm.merge_partial(**given)
    with pytest.raises(ValueError, match="models: expected the 2 that were merged, got 1"):
        fm.merge_partial([a, b], x, fm.Permute(data)).endpoint_statistics([a], data)
    with pytest.raises(TypeError, match=r"models\[1\]: expected a torch module"):
        fm.merge_partial([a, b.state_dict()], x, fm.Permute(data))
    with pytest.raises(ValueError, match="control flow"):
        fm.merge_partial([Branching(), Branching()], torch.randn(2, 12), fm.Permute(data))
    for not_a_rule, named in (("union", "str"), (fm.Zip, "Zip"), (None, "NoneType")):
        with pytest.raises(TypeError, match=rf"rule: expected fm.Identity\(\), .*{named}"):
            fm.merge_partial([a, b], x, not_a_rule)


@pytest.mark.parametrize(("rule", "options", "message"), [
    ("zip", {"a": 0.0}, "a: expected a finite number above 0; got 0.0"),
    ("zip", {"b": -0.1}, "b: expected a finite number of at least 0"),
    ("zip", {"b": 1.5}, "b: expected a number from 0 to 1; got 1.5"),
    ("cca", {"gamma": -1.0}, "gamma: expected a finite number above 0; got -1.0"),
    ("cca", {"ridge": -1.0}, "ridge: expected a finite number of at least 0; got -1.0"),
    ("cca", {"ridge": 0.2, "gamma": 0.1}, "gamma: it replaces ridge"),
    ("permute", {"site": "sideways"}, "site: expected one of 'post', 'pre'; got 'sideways'"),
    ("zip", {"site": "after"}, "site: expected one of"),
])  # fmt: skip
def test_a_rule_refuses_its_options_by_name(rule, options, message):
    with pytest.raises(ValueError, match=message):
        rule_of(rule, [torch.zeros(2, 12)], **options)


@pytest.mark.parametrize("rule", ["permute", "zip", "cca"])
def test_a_rule_checks_its_data_and_forward(rule):
    for data in ("abc", torch.zeros(2, 12), (torch.zeros(2, 12), torch.zeros(2)), 3):
        with pytest.raises(TypeError, match="data: expected"):
            rule_of(rule, data)
    with pytest.raises(TypeError, match="forward: expected a function of a model and a batch, got int"):
        rule_of(rule, [torch.zeros(2, 12)], forward=3)
    assert "tensor" not in repr(rule_of(rule, [torch.zeros(2, 12)]))


@pytest.mark.parametrize("rule", ["permute", "zip", "cca"])
def test_a_rule_that_matches_activations_needs_data(rule):
    with pytest.raises(ValueError, match=f"data: needed by rule '{rule}'"):
        rule_of(rule, None)
    with pytest.raises(TypeError, match=r"argument '(a|gamma)'"):  # an option of another rule
        rule_of(rule, [], **({"a": 0.5} if rule == "cca" else {"gamma": 0.5}))


def test_the_site_is_where_activations_are_read():
    (a, b), x = two("vgg", fresh_seed())
    data = inputs_like(x)
    post, pre = (fm.merge_partial([a, b], x, fm.CCA(data, site=site)) for site in ("post", "pre"))
    assert not torch.allclose(run(post.model, x), run(pre.model, x))


@pytest.mark.slow
def test_on_digits_partial_zip_beats_merging_everything():
    """Two conv nets trained apart: the more layers stay apart, the nearer the merge is to the ensemble."""
    seed = fresh_seed()
    training, test = digits(256)
    models = []
    for k in range(2):
        torch.manual_seed(seed + k)
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10),
        )  # fmt: skip
        models.append(train(net, training, epochs=8, seed=seed + k, lr=3e-3))
    losses = []
    for start_at in range(5):
        found = fm.merge_partial(models, test.inputs[:2], fm.Zip(training), start_at=start_at)
        losses.append(fm.evaluate(found.model, test)[0])
    print(losses)
    ends = [fm.evaluate(model, test)[0] for model in models]
    assert losses[3] < losses[0]
    assert losses[4] < losses[0]
    assert losses[4] <= max(ends)


def test_the_page_holds_the_committed_run():
    record = records.read(bench.NAME)
    assert bench.table(record) in bench.PAGE.read_text()
    assert bench.PICTURE.stat().st_size > 1000
    assert record["versions"]["torch"]
    found = bench.means(record["rows"])
    # Nothing apart costs one model, all apart is the ensemble.
    for rule in ("identity", "permute", "zip"):
        assert found[rule, "-", 0]["parameters"] == found[rule, "-", 0]["flops"] == 1
        assert found[rule, "-", 5]["accuracy"] == found["ensemble", "-", None]["accuracy"]


def test_gamma_is_added_to_covariances_as_published_and_ridge_follows_their_scale():
    torch.manual_seed(fresh_seed())
    n, scale = 5, 100.0
    joint = [CrossMoments() for _ in range(2)]
    rows = torch.randn(200, 2 * n).double() @ torch.randn(2 * n, 2 * n).double()
    for moments, factor in zip(joint, (1.0, scale), strict=True):
        moments.update(rows * factor, rows * factor)
    covariance = joint[0].similarity("covariance")

    def transform(shifts):
        parts = [
            covariance[s, s] + shift * torch.eye(n)
            for s, shift in zip((slice(n), slice(n, None)), shifts, strict=True)
        ]
        (va, ua), (vb, ub) = (torch.linalg.eigh(part) for part in parts)
        root_a, inverse_a = ua @ va.sqrt().diag() @ ua.T, ua @ va.rsqrt().diag() @ ua.T
        inverse_b = ub @ vb.rsqrt().diag() @ ub.T
        left, _, right = torch.linalg.svd(inverse_a @ covariance[:n, n:] @ inverse_b)
        return root_a @ left @ right @ inverse_b

    def found(rule, moments):
        return rule.maps([moments], [0.5, 0.5]).leave[1].matrix

    published = found(fm.CCA([], gamma=0.1), joint[0])
    torch.testing.assert_close(published, transform([0.1, 0.1]))
    fractions = [0.1 * covariance[s, s].diagonal().mean() for s in (slice(n), slice(n, None))]
    relative = found(fm.CCA([]), joint[0])
    torch.testing.assert_close(relative, transform(fractions))
    torch.testing.assert_close(found(fm.CCA([]), joint[1]), relative)
    assert not torch.allclose(found(fm.CCA([], gamma=0.1), joint[1]), published, rtol=1e-3)


def test_a_partial_merge_is_shown_in_a_line():
    ends = [build("resnet", fresh_seed())[0] for _ in range(2)]
    x = torch.randn(2, 3, 16, 16)
    for start_at in (0, 2, 3):
        text = repr(fm.merge_partial(ends, x, fm.Identity(), start_at=start_at))
        assert text.startswith("PartialMerge(rule='identity', weights=(0.5, 0.5), ")
        assert len(text) < 250
        assert ("apart: nothing" in text) == (start_at == 0)


class Tasks(nn.Module):
    """A trunk, and a head for some number of classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.BatchNorm1d(8), nn.ReLU()
        )
        self.head = nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x))


def tasks(*classes: int) -> list[nn.Module]:
    torch.manual_seed(fresh_seed())
    return [Tasks(count).double().eval() for count in classes]


@pytest.mark.parametrize("rule", RULES)
def test_networks_of_different_tasks_share_a_trunk_and_keep_their_heads(rule):
    a, b = tasks(3, 5)
    x = torch.randn(4, 6, dtype=DOUBLE)
    data = inputs_like(x)
    found = fm.merge_partial([a, b], x, rule_of(rule, data), stop_at="trunk.2")
    of_a, of_b = run(found.model, x)
    assert (of_a.shape, of_b.shape) == ((4, 3), (4, 5))
    assert not any("trunk" in name for name in found.apart)
    for k, model in enumerate((a, b)):
        for name, tensor in model.head.state_dict().items():
            assert torch.equal(found.model.state_dict()[f"apart.{k}.head.{name}"], tensor)
    assert "merged.head.0.weight" not in found.model.state_dict()
    reset = fm.renormalize(found.model, None, data, "reset")
    assert not torch.equal(reset(x)[0], of_a)


@pytest.mark.parametrize("rule", RULES)
def test_a_trunk_that_both_tasks_have_keeps_both_functions(rule):
    a, b = tasks(3, 5)
    b.trunk.load_state_dict(a.trunk.state_dict())
    data = inputs_like(torch.empty(1, 6))
    x, _ = next(iter(data))  # other inputs may need a unit that is zero on the data
    if rule != "identity":  # in another order
        spec = fm.PermutationSpec.trace(b, x).select(["trunk.0", "trunk.2"])
        b = fm.Alignment(spec.random(torch.Generator().manual_seed(1)), spec).apply(b)
    found = fm.merge_partial([a, b], x, rule_of(rule, data), stop_at="trunk.2")
    for model, output in zip((a, b), run(found.model, x), strict=True):
        torch.testing.assert_close(output, run(model, x), rtol=1e-8, atol=1e-8)


def test_cca_gives_no_output_to_units_that_both_models_hold_at_zero():
    (a, _), data = tasks(3, 5), inputs_like(torch.empty(1, 6))
    x = torch.cat([batch for batch, _ in data])
    with torch.no_grad():  # the three largest inputs stay a little below zero
        inputs = a.trunk[:4](x)
        a.trunk[3].bias[:5] = torch.rand(5, dtype=DOUBLE) - inputs.mean(0)[:5]
        a.trunk[3].bias[5:] = -inputs.max(0).values[5:] - torch.tensor([0.01, 0.1, 1.0], dtype=DOUBLE)
    spec = fm.PermutationSpec.trace(a, x).select(["trunk.2"])
    for seed in range(8):
        b = fm.Alignment(spec.random(torch.Generator().manual_seed(seed)), spec).apply(a)
        merged = fm.merge_partial([a, b], x, fm.CCA(data), stop_at="trunk.2").model
        for output in run(merged, x):
            torch.testing.assert_close(output, run(a, x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet"])
def test_between_two_boundaries_a_model_merged_with_itself_is_itself(name):
    model, x = build(name, fresh_seed())
    model, x = model.double(), x.double()
    groups = list(fm.PermutationSpec.trace(model, x).flat().groups)
    for stop_at in (groups[-1], len(groups) // 2):
        found = fm.merge_partial([model, model], x, fm.Permute(inputs_like(x)), start_at=1, stop_at=stop_at)
        for output in run(found.model, x):
            torch.testing.assert_close(output, run(model, x), rtol=1e-9, atol=1e-9)


def test_boundaries_and_heads_that_do_not_fit_are_named():
    a, b = tasks(3, 5)
    x = torch.randn(4, 6, dtype=DOUBLE)
    for stop_at, message in {
        "nothing": "stop_at: unknown group 'nothing'", 9: "stop_at: expected a position of 0 to 2",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            fm.merge_partial([a, b], x, fm.Identity(), stop_at=stop_at)
    with pytest.raises(ValueError, match="stop_at: 0 is not after start_at 2"):
        fm.merge_partial([a, b], x, fm.Identity(), start_at=2, stop_at=0)
    with pytest.raises(ValueError, match=r"models\[1\]: tensor 'head.2.weight' has shape"):
        fm.merge_partial([a, b], x, fm.Identity())
    b.trunk[2] = nn.Linear(10, 9)
    with pytest.raises(ValueError, match=r"models\[1\]: tensor 'trunk.2.weight' has shape"):
        fm.merge_partial([a, b], x, fm.Identity(), stop_at="trunk.2")


@pytest.mark.parametrize("only", [None, 0, 1])
def test_the_automatic_choice_judges_a_partial_merge_by_the_models_outputs(only):
    (a, b), x = two("vgg without norm", fresh_seed())
    data = inputs_like(x)
    found = fm.merge_partial([a, b], x, fm.Permute(data), start_at=1)
    weights = [0.5, 0.5] if only is None else [1.0]
    new = fm.renormalize(
        found.model, found.endpoint_statistics([a, b], data, only=only), data, weights=weights
    )
    plan = fm.applied_plan(new)
    assert plan is not None
    ends = [run(model, data.inputs) for model in (a, b)]
    target = (ends[0] + ends[1]) / 2 if only is None else ends[only]
    assert plan.scores.keys() == {"none", "repair", "rescale"}
    for method, model in (("none", found.model), (plan.method, new)):
        error = (run(model, data.inputs) - target).square().sum() / target.square().sum()
        assert plan.scores[method].error == pytest.approx(float(error), rel=1e-3)


def test_the_automatic_choice_leaves_a_partial_merge_with_heads_alone():
    (a, b), x = two("vgg without norm", fresh_seed())
    data = inputs_like(x)
    found = fm.merge_partial([a, b], x, fm.Permute(data), stop_at=1)
    statistics = found.endpoint_statistics([a, b], data)
    assert statistics.probes == ()
    with pytest.warns(
        UserWarning, match="leaves the merge as it is, because the endpoints' outputs are not known"
    ):
        fm.renormalize(found.model, statistics, data)


def test_the_first_models_statistics_alone_are_a_target_for_every_rule():
    (a, b), x = two("vgg", fresh_seed())
    data = inputs_like(x)
    expected = endpoint_statistics([a], data).targets([1.0])
    for rule in RULES:
        found = fm.merge_partial([a, b], x, rule_of(rule, data), start_at=1)
        statistics = found.endpoint_statistics([a, b], data, only=0)
        targets = statistics.targets([1.0])
        own = {n.removeprefix("merged."): t for n, t in targets.items() if n.startswith("merged.")}
        if rule != "zip":
            for name, target in own.items():
                torch.testing.assert_close(target.mean, expected[name].mean)
                torch.testing.assert_close(target.std, expected[name].std)
        options = fm.Renormalization("repair", mode="sequential")
        new = fm.renormalize(found.model, statistics, data, options, weights=[1.0])
        measured = endpoint_statistics([new], data).targets([1.0])
        for name, target in targets.items():
            torch.testing.assert_close(measured[name].mean, target.mean, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="take the first model's statistics"):
        found.endpoint_statistics([a, b], data)
    with pytest.raises(ValueError, match="only: expected a position below 2"):
        found.endpoint_statistics([a, b], data, only=2)


def normed(sizes: tuple[int, int, int, int]) -> tuple[list[nn.Linear], list[nn.BatchNorm1d], nn.Sequential]:
    """Return the layers, the norms and the whole of a network in eval mode, whose norms have drawn parameters."""
    layers = [nn.Linear(a, b).double() for a, b in pairwise(sizes)]
    norms = [nn.BatchNorm1d(size).double() for size in sizes[1:3]]
    with torch.no_grad():
        for norm in norms:
            for t in (norm.running_mean, norm.weight, norm.bias):
                assert t is not None
                t.normal_()
            spread(norm).uniform_(0.2, 5)
    return layers, norms, nn.Sequential(layers[0], norms[0], layers[1], norms[1], layers[2]).eval()


def spread(norm: nn.BatchNorm1d) -> torch.Tensor:
    assert norm.running_var is not None
    return norm.running_var


def test_cca_takes_the_scales_of_batch_norms_through_the_mixture():
    """Normalized channels in rotated units, with another scale before the norm and in it, are the same network."""
    torch.manual_seed(fresh_seed())
    layers, (norm, _), a = normed((10, 8, 7, 4))
    others, (other, _), b = normed((10, 8, 7, 4))
    b.load_state_dict(a.state_dict())
    x = torch.randn(500, 10).double()
    with torch.no_grad():
        rotation = torch.linalg.qr(torch.randn(8, 8).double())[0]
        scale = norm.weight / (spread(norm) + norm.eps).sqrt()
        other.weight.uniform_(0.1, 2)
        spread(other).uniform_(0.2, 5)
        back = (spread(other) + other.eps).sqrt() / other.weight
        others[0].weight.copy_(back[:, None] * (rotation @ (scale[:, None] * layers[0].weight)))
        others[0].bias.copy_(
            other.running_mean + back * (rotation @ (scale * (layers[0].bias - norm.running_mean)))
        )
        other.bias.copy_(rotation @ norm.bias)
        others[1].weight.copy_(layers[1].weight @ rotation.T)
    torch.testing.assert_close(run(b, x), run(a, x))
    merged = fm.merge_partial([a, b], x[:2], fm.CCA([x], ridge=0.0)).model
    torch.testing.assert_close(run(merged, x), run(a, x), rtol=1e-6, atol=1e-6)


class Halves(nn.Module):
    """A layer before a batch norm, whose units belong to two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(10, 8), nn.BatchNorm1d(8)
        self.left, self.right = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.norm(self.layer(x)))
        return self.left(h[:, :3]) + self.right(h[:, 3:])


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 4, 3, groups=2)
    )


def transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 4, 3))


@pytest.mark.parametrize(
    ("make", "names", "shape"),
    [
        (Halves, ("layer", "norm"), (10,)),
        (grouped, ("0", "1"), (3, 6, 6)),
        (transposed, ("0", "1"), (3, 6, 6)),
    ],
)
def test_cca_does_not_see_how_units_are_scaled_before_their_norm(make, names, shape):
    torch.manual_seed(fresh_seed())
    a = make().double().eval()
    x = torch.randn(60, *shape, dtype=DOUBLE)
    layer, norm = (a.get_submodule(name) for name in names)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.2, 5)
    b = copy.deepcopy(a)
    layer, norm = (b.get_submodule(name) for name in names)
    factor = torch.rand(8, dtype=DOUBLE) + 0.5
    with torch.no_grad():
        along = (
            factor[None, :, None, None]
            if make is transposed
            else factor.view(-1, *[1] * (layer.weight.ndim - 1))
        )
        layer.weight.mul_(along)
        layer.bias.mul_(factor)
        norm.running_mean.mul_(factor)
        norm.running_var.copy_((norm.running_var + norm.eps) * factor.square() - norm.eps)
    torch.testing.assert_close(run(b, x), run(a, x))
    merged = fm.merge_partial([a, b], x[:2], fm.CCA([x])).model
    torch.testing.assert_close(run(merged, x), run(a, x))


def test_cca_keeps_units_whose_scales_are_far_apart_and_those_that_are_dead():
    torch.manual_seed(fresh_seed())
    layers, (norm, _), a = normed((6, 5, 4, 3))
    b = normed((6, 5, 4, 3))[2]
    x = torch.randn(200, 6).double()
    with torch.no_grad():
        spread(norm)[0] = 0  # a constant unit beside others of large variance
        spread(norm)[1:] = 1e7
        norm.weight[1] *= 1e-5
        layers[1].weight[:, 1] *= 1e5
        norm.weight[2] = 0
    same = fm.merge_partial([a, a], x[:2], fm.CCA([x])).model
    torch.testing.assert_close(run(same, x), run(a, x))
    merged = fm.merge_partial([a, b], x[:2], fm.CCA([x])).model
    state = merged.state_dict()
    torch.testing.assert_close(state["merged.1.weight"], norm.weight.detach())
    torch.testing.assert_close(state["merged.1.running_var"], spread(norm))
    torch.testing.assert_close(state["merged.0.weight"][2], layers[0].weight[2].detach())
    assert all(bool(torch.isfinite(t).all()) for t in state.values())


def test_cca_leaves_scales_where_they_are_if_the_layer_computes_its_weight_or_shares_it():
    """Such a layer cannot be scaled; then neither is its bias."""
    torch.manual_seed(fresh_seed())
    x = torch.randn(60, 6, dtype=DOUBLE)
    layers, _, plain = normed((6, 5, 4, 3))
    state = copy.deepcopy(plain.state_dict())
    nn.utils.parametrizations.weight_norm(layers[0])
    merged = fm.merge_partial([plain, plain], x[:2], fm.CCA([x])).model
    torch.testing.assert_close(run(merged, x), run(plain, x))
    torch.testing.assert_close(merged.state_dict()["merged.0.bias"], state["0.bias"])
    plan = Rewiring(trace_graph(plain, x[:2]), 0, ())
    maps = dict.fromkeys(plan.joined, matrix_maps([torch.eye(5)], [torch.eye(5)]))
    assert [found.norm for found in normed_layers(plan.structure, plan.merged, maps)] == ["3"]
    tied = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4)).eval()
    tied[3].weight = tied[0].weight
    plan = Rewiring(trace_graph(tied, torch.randn(2, 4)), 0, ())
    maps = dict.fromkeys(plan.structure.spec.groups, matrix_maps([torch.eye(4)], [torch.eye(4)]))
    assert normed_layers(plan.structure, plan.merged, maps) == []


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, lambda n: nn.GroupNorm(1, n), nn.BatchNorm1d])
def test_cca_warns_of_norms_that_compute_their_scale_from_mixed_units(norm):
    torch.manual_seed(fresh_seed())
    x = torch.randn(60, 6)
    a, b = (nn.Sequential(nn.Linear(6, 8), norm(8), nn.ReLU(), nn.Linear(8, 3)).eval() for _ in range(2))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for rule in (fm.Identity(), fm.Permute([x]), fm.Zip([x]), fm.CCA([x])):
            fm.merge_partial([a, b], x[:2], rule)
        fm.merge_partial([a, b], x[:2], fm.CCA([x]), start_at=1)  # the norm stays apart
    texts = [str(w.message) for w in told]
    assert len(texts) == (norm is not nn.BatchNorm1d)
    assert all("norms except batch norms among the merged layers, got ['1']" in text for text in texts)
