"""The automatic choice is measured on the data."""

from __future__ import annotations

import copy
import pickle
from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmatch as fm
from fastmatch.renorm import least_squares, trial
from fastmatch.renorm.outputs import PREFERENCE, disagreement
from fastmatch.renorm.probes import SAMPLES, Probe, ProbeRecorder, spread
from fastmatch.studies.digits import Batches, digits, train_new
from fastmatch.studies.networks import vgg
from fastmatch.studies.pruning import global_magnitude
from helpers.networks import build, fresh_seed


def pair(name: str) -> list[nn.Module]:
    seed = fresh_seed()
    return [build(name, seed + k)[0] for k in range(2)]


def labelled(count: int = 96, size: int = 32) -> Batches:
    return Batches(torch.randn(count, 3, 16, 16), torch.zeros(count, dtype=torch.long), size)


@pytest.mark.grid
@pytest.mark.parametrize("name", ["vgg", "vgg without norm", "resnet with layer norm"])
@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_the_choice_is_the_method_with_the_nearest_outputs_and_repair_has_a_small_advantage(name, mode):
    ends, data = pair(name), labelled()
    merged = fm.merge(ends, [0.4, 0.6])
    measured = fm.endpoint_statistics(ends, data)
    new = fm.renormalize(merged, measured, data, fm.Renormalization(mode=mode))
    assert data.reads == 2
    plan = fm.applied_plan(new)
    assert plan is not None
    expected = {"none": merged}
    for method in ("repair", "rescale", *(["reset"] if name == "vgg" else [])):
        expected[method] = fm.renormalize(merged, ends, data, fm.Renormalization(method, mode))
    x = data.inputs
    with torch.no_grad():
        target = 0.4 * ends[0].eval()(x) + 0.6 * ends[1].eval()(x)
        scores = {}
        for method, model in expected.items():
            y = model.eval()(x)
            rows = [z - z.mean(1, keepdim=True) for z in (y, target)]
            scores[method] = (
                float((y.argmax(1) != target.argmax(1)).float().mean()),
                float(1 - torch.cosine_similarity(*rows).mean()),
            )
    assert set(plan.scores) == set(scores)
    for method, found in plan.scores.items():
        assert found[:2] == pytest.approx(scores[method], abs=1e-4)
    order = sorted(scores, key=lambda m: (scores[m][0], scores[m][1] * (PREFERENCE if m == "repair" else 1)))
    assert plan.method == order[0]
    torch.testing.assert_close(new.eval()(x), expected[plan.method].eval()(x))
    assert f"{plan.method}: nearest to the endpoints' outputs (" in str(plan)


@pytest.mark.slow
def test_repair_is_found_for_plain_networks_where_rescale_harms():
    train_data, test_data = digits()
    gaps = []
    for seed in range(3):
        dense = train_new(lambda: vgg(8), train_data, epochs=10, seed=seed, progress=False)
        pruned = global_magnitude(dense, 0.8)
        accuracy = {}
        for method in ("auto", "repair", "rescale"):
            new = fm.renormalize(pruned, [dense], train_data, method, progress=False)
            accuracy[method] = fm.evaluate(new, test_data, progress=False)[1]
        gaps.append(accuracy["repair"] - accuracy["rescale"])
        assert accuracy["auto"] >= max(accuracy.values()) - 0.01
    assert sum(gaps) / 3 > 0.1


def test_a_merge_that_every_method_would_harm_is_left_alone():
    (a, _), data = pair("vgg without norm"), labelled()
    with torch.no_grad():
        for layer in a.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.bias.normal_()
    merged = fm.merge([a, copy.deepcopy(a)])
    harmful = fm.Renormalization(std_factor=20.0)
    new = fm.renormalize(merged, [a, a], data, harmful)
    plan = fm.applied_plan(new)
    assert plan is not None
    assert plan.method == "none"
    assert all(torch.equal(t, merged.state_dict()[n]) for n, t in new.state_dict().items())


def trained_on_values(outputs: int) -> tuple[nn.Module, nn.Module, Batches]:
    """Two networks that predict values, apart from each other, and their data."""
    x = torch.randn(512, 8)
    y = torch.sin(2 * x @ torch.randn(8, outputs)) + torch.tanh(x @ torch.randn(8, outputs)) * x[:, :1]
    hidden = [module for _ in range(3) for module in (nn.Linear(32, 32), nn.ReLU())]
    first = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), *hidden, nn.Linear(32, outputs))
    ends = [first, build_alike(first)]
    for end in ends:
        optimizer = torch.optim.Adam(end.parameters(), lr=5e-3)
        for _ in range(60):
            optimizer.zero_grad()
            F.mse_loss(end(x), y).backward()
            optimizer.step()
    return ends[0], ends[1], Batches(x, y, 128)


def build_alike(model: nn.Sequential) -> nn.Module:
    new = copy.deepcopy(model)
    for module in new:
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    return new


@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("has_targets", [True, False])
def test_a_merge_of_regressors_is_never_farther_from_its_endpoints_than_if_it_were_left_alone(
    outputs, seed, has_targets
):
    torch.manual_seed(seed)
    a, b, data = trained_on_values(outputs)
    merged, x = fm.merge([a, b]), data.inputs
    given = data if has_targets else list(x.split(128))
    new = fm.renormalize(merged, fm.endpoint_statistics([a, b], given), given)
    plan = fm.applied_plan(new)
    assert plan is not None
    with torch.no_grad():
        target = (a(x) + b(x)) / 2
        error = {
            method: float((model(x) - target).square().sum() / target.square().sum())
            for method, model in (("none", merged), (plan.method, new))
        }
    assert error[plan.method] <= error["none"]
    assert plan.scores[plan.method].choices is None
    assert plan.scores[plan.method].error == pytest.approx(error[plan.method], rel=1e-3)
    assert plan.method == "none" or error[plan.method] < PREFERENCE * error["none"]
    assert f"none squared error {error['none']:.3g}" in plan.why


def test_a_merge_of_equal_regressors_is_left_alone_and_one_with_lost_variance_is_repaired():
    torch.manual_seed(0)
    a, _, data = trained_on_values(1)
    measured = fm.endpoint_statistics([a, a], data)
    plan = fm.applied_plan(fm.renormalize(fm.merge([a, a]), measured, data))
    assert plan is not None
    assert plan.method == "none"
    shrunk = copy.deepcopy(a)
    with torch.no_grad():
        shrunk.get_submodule("0").weight.mul_(0.5)
        shrunk.get_submodule("0").bias.mul_(0.5)
    plan = fm.applied_plan(fm.renormalize(shrunk, measured, data, weights=[0.5, 0.5]))
    assert plan is not None
    assert plan.method == "repair"
    assert plan.scores["repair"].error < 0.01


def test_without_outputs_to_compare_nothing_is_applied_unjudged():
    ends, data = pair("vgg without norm"), labelled()
    merged = fm.merge(ends)
    measured = fm.endpoint_statistics(ends, data)
    bare = fm.EndpointStatistics(measured.calls)

    def silent(model, batch):
        model(batch[0])

    for endpoints, forward, reason in (
        (bare, None, "outputs are not known"),
        (ends, silent, "outputs cannot be compared"),
    ):
        options = {} if forward is None else {"forward": forward}
        with pytest.warns(UserWarning, match=f"leaves the merge as it is, because the endpoints' {reason}"):
            new = fm.renormalize(merged, endpoints, data, **options)
        plan = fm.applied_plan(new)
        assert plan is not None
        assert plan.method == "none"
        assert reason in plan.why
        assert all(torch.equal(t, merged.state_dict()[n]) for n, t in new.state_dict().items())


@pytest.mark.parametrize("given", ["models", "statistics"])
@pytest.mark.parametrize("name", ["vgg", "mlp"])
def test_a_handful_of_samples_is_too_few_to_judge_by(name, given):
    """Calibrated on one sample, every method answers as the endpoints do on this sample."""
    seed = fresh_seed()
    (a, x), (b, _) = (build(name, seed + k) for k in range(2))
    merged = fm.merge([a, b])
    data = [(torch.randn(4, *x.shape[1:]), torch.zeros(4, dtype=torch.long))]
    ends = [a, b] if given == "models" else fm.endpoint_statistics([a, b], data)
    with pytest.warns(
        UserWarning, match='as it is: method "auto": 4 samples are too few to calibrate and judge by: 8'
    ):
        new = fm.renormalize(merged, ends, data)
    assert fm.applied_plan(new).method == "none"
    assert all(torch.equal(t, merged.state_dict()[k]) for k, t in new.state_dict().items())


def test_without_outputs_to_compare_batch_norm_is_reset():
    ends, data = pair("vgg"), labelled()
    merged = fm.merge(ends)
    new = fm.renormalize(merged, fm.EndpointStatistics(fm.endpoint_statistics(ends, data).calls), data)
    plan = fm.applied_plan(new)
    assert plan is not None
    assert plan.method == "reset"
    assert "the endpoints' outputs are not known" in plan.why
    expected = fm.renormalize(merged, None, data, "reset").state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in new.state_dict().items())


def plain(width: int = 40) -> nn.Module:
    torch.manual_seed(5)  # which method is nearest depends on the network
    return nn.Sequential(
        nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5)
    ).double()


def distance(model: nn.Module, target: nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """Fraction of other classes, and the mean angle."""
    with torch.no_grad():
        ours, theirs = model(x), target(x)
    rows = [z - z.mean(1, keepdim=True) for z in (ours, theirs)]
    other = float((ours.argmax(1) != theirs.argmax(1)).double().mean())
    return other, float(1 - torch.cosine_similarity(*rows).mean())


def squared_error(model: nn.Module, target: nn.Module, x: torch.Tensor) -> float:
    """The sum of squared differences as a fraction of the sum of squares."""
    with torch.no_grad():
        ours, theirs = model(x), target(x)
    return float((ours - theirs).square().sum() / theirs.square().sum())


SEQUENTIAL = fm.Renormalization("least-squares", mode="sequential")


def split(count: int) -> tuple[list[int], list[int]]:
    """The samples that the judged fit is made from, and those that are held out."""
    held_out = [k for k in range(count) if spread(k) < 2**30]
    return [k for k in range(count) if k not in held_out], held_out


@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_least_squares_is_chosen_where_it_is_nearest_on_samples_that_it_was_not_fitted_to(mode):
    dense = plain()
    pruned = global_magnitude(dense, 0.5)
    x = (
        torch.randn(800, 3).double() @ torch.randn(3, 12).double()
    )  # remaining weights make up for pruned ones
    data = Batches(x, torch.zeros(800, dtype=torch.long), 150)
    new = fm.renormalize(pruned, [dense], data, fm.Renormalization(mode=mode))
    assert data.reads == 2  # as without it
    plan = fm.applied_plan(new)
    assert plan is not None
    assert plan.method == "least-squares"
    assert plan.kept == {}
    by_name = fm.renormalize(pruned, [dense], data, SEQUENTIAL)
    for name, tensor in new.state_dict().items():
        torch.testing.assert_close(tensor, by_name.state_dict()[name])
    fitted, held_out = split(800)
    judged = fm.renormalize(pruned, [dense], [x[fitted]], SEQUENTIAL)
    assert plan.scores["least-squares"][:2] == pytest.approx(distance(judged, dense, x[held_out]), abs=1e-6)
    assert "on samples that least squares was not fitted to: least-squares" in plan.why


def test_least_squares_that_fits_only_the_samples_that_it_saw_is_not_chosen():
    dense = plain()
    pruned = global_magnitude(dense, 0.5)
    # What is held out is of another kind than what the fit is made from. Without classes, squared errors count.
    fitted, held_out = split(240)
    x = torch.empty(240, 12).double()
    x[fitted] = 0.01 * torch.randn(len(fitted), 12).double() + torch.randn(12)
    x[held_out] = 3 * torch.randn(len(held_out), 12).double()
    judged = fm.renormalize(pruned, [dense], [x[fitted]], SEQUENTIAL)
    plan = fm.applied_plan(fm.renormalize(pruned, [dense], [x]))
    assert plan is not None
    assert squared_error(judged, dense, x[fitted]) < 0.1 * squared_error(pruned, dense, x[fitted])
    assert plan.scores["least-squares"].error == pytest.approx(squared_error(judged, dense, x[held_out]))
    assert plan.method != "least-squares"


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.again(self.again(self.first(x).relu()).relu()).relu())


class Branch(nn.Module):
    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) if x.sum() > 0 else self.net[-1](self.net[:-3](x))


def test_where_least_squares_cannot_be_tried_the_plan_says_why(monkeypatch):
    dense, x = plain(), torch.randn(80, 12).double()
    pruned = global_magnitude(dense, 0.8)

    def found(model, end, data, options="auto"):
        plan = fm.applied_plan(fm.renormalize(model, end, data, options, weights=[1.0]))
        assert plan is not None
        assert plan.method != "least-squares"
        return plan

    for end, options in (
        (fm.endpoint_statistics([dense], [x]), "auto"),
        ([dense], fm.Renormalization(std_factor=1.1)),
        ([dense], fm.Renormalization(target="equal")),
    ):
        plan = found(pruned, end, [x], options)
        assert "least" not in str(plan)
    assert (
        "it takes 64 samples" in found(pruned, [dense], [x[:63]], fm.Renormalization(mode="sequential")).why
    )
    torch.manual_seed(fresh_seed())
    twice = Twice().double()
    assert "'again' runs more than once" in found(global_magnitude(twice, 0.5), [twice], [x]).why
    assert "take different paths" in found(Branch(pruned), [Branch(dense)], [x.abs(), -x.abs()]).why
    with monkeypatch.context() as patch:
        patch.setattr(trial, "MEMORY", 1000)
        assert "a layer's values take" in found(pruned, [dense], [x]).why
    fits = [least_squares.LayerFit(name, getattr(twice, name)) for name in ("first", "last")]
    with pytest.raises(least_squares.CannotFit, match="one has no module 'first'"):
        least_squares.fit_sequentially(
            twice, fits, ([dense], [1.0]), [x], lambda m, b: m(b), SEQUENTIAL, progress=False
        )
    monkeypatch.setattr(trial, "WORK", 1000.0)
    assert "multiplications, more than" in found(pruned, [dense], [x]).why


def test_the_work_of_a_fit_is_counted_from_rows_inputs_and_groups():
    net = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(6 * 25, 3))
    probe = Probe(torch.zeros(2, 4, 5, 5), ())
    found = trial._work(net, ["0", "2"], probe, 10, lambda model, batch: model(batch))
    sums = 10 * (25 * 2 * 18**2 + 150**2)
    values = 10 * 4 * 25 * (4 + 6)
    assert found == (sums + 2 * 18**3 + 150**3, values)
    with torch.no_grad():
        net[2].weight[0, 0] = 0  # now each output has a system of its own
    found = trial._work(net, ["0", "2"], probe, 10, lambda model, batch: model(batch))
    assert found == (sums + 2 * 18**3 + 3 * 150**3, values)


def test_batch_norm_without_endpoints_is_reset():
    ends, data = pair("vgg"), labelled()
    merged = fm.merge(ends)
    plan = fm.applied_plan(fm.renormalize(merged, None, data))
    assert plan is not None
    assert plan.method == "reset"
    assert "no endpoints were given" in plan.why
    assert data.reads == 1
    with pytest.raises(ValueError, match="endpoints: expected the merged models"):
        fm.renormalize(pair("vgg without norm")[0], None, data)


def test_every_merge_of_a_curve_has_a_choice_of_its_own_from_one_read():
    ends, data = pair("vgg without norm"), labelled()
    statistics = fm.endpoint_statistics(ends, data)
    data.reads = 0
    rows = [[1.0, 0.0], [0.5, 0.5]]
    merges = [fm.merge(ends, row) for row in rows]
    together = fm.renormalize_many(merges, statistics, data)
    assert data.reads == 1
    for new, merged in zip(together, merges, strict=True):
        alone = fm.renormalize(merged, statistics, data)
        assert fm.applied_plan(new) == fm.applied_plan(alone)
        torch.testing.assert_close(new(data.inputs), alone(data.inputs))


def test_outputs_are_kept_for_samples_of_all_the_data_and_survive_permutation_and_joining():
    ends = pair("vgg without norm")
    count = 2 * SAMPLES + 64
    data = Batches(torch.randn(count, 3, 16, 16), torch.zeros(count), 96)
    both = fm.endpoint_statistics(ends, data)
    kept = sum(len(probe.batch[0]) for probe in both.probes)
    assert SAMPLES <= kept < SAMPLES + 96
    assert torch.equal(both.probes[0].batch[0], data.inputs[:96])
    assert torch.equal(both.probes[-1].batch[0][-1], data.inputs[-1]) or kept < count
    with torch.no_grad():
        for probe in both.probes:
            for end, output in zip(ends, probe.outputs, strict=True):
                torch.testing.assert_close(output, end(probe.batch[0]), rtol=1e-4, atol=1e-5)
    apart = [fm.endpoint_statistics([end], data) for end in ends]
    for ours, theirs in zip((apart[0] + apart[1]).probes, both.probes, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(ours.outputs, theirs.outputs, strict=True))
    shuffled = Batches(data.inputs, data.targets, 96, torch.Generator().manual_seed(fresh_seed()))
    assert (apart[0] + fm.endpoint_statistics(ends[1:], shuffled)).probes == ()
    spec = fm.PermutationSpec.trace(ends[1], data.inputs[:2])
    assert both.permuted(None, fm.Alignment(spec.random(), spec)).probes == both.probes
    assert len(pickle.loads(pickle.dumps(both)).probes) == len(both.probes)


def test_a_loader_that_reuses_its_memory_and_one_output_are_compared():
    torch.manual_seed(fresh_seed())
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    store = torch.randn(4, 16, 6)

    def forward(module, batch):
        return {"loss": torch.zeros(()), "logits": module(batch)}

    class Reused:
        def __iter__(self):
            memory = torch.empty(16, 6)
            for part in store:
                yield memory.copy_(part)

    measured = fm.endpoint_statistics([model], Reused(), forward=forward)
    assert [p.batch.equal(s) for p, s in zip(measured.probes, store, strict=True)] == [True] * 4
    same = disagreement(model, measured.probes, [1.0], forward)
    assert same is not None
    assert same.choices is None
    assert same[1:] == pytest.approx((0.0, 0.0), abs=1e-6)


def recorded(sizes: list[int]) -> ProbeRecorder:
    """What is kept of batches of these sizes; every sample is (batch, row)."""
    recorder = ProbeRecorder()
    for number, size in enumerate(sizes):
        rows = torch.stack([torch.full((size,), float(number)), torch.arange(float(size))], dim=1)
        recorder.add(rows, [rows])
    return recorder


@pytest.mark.parametrize(
    "sizes", [[1] * 5000, [48] * 400, [256] * 40, [5000] * 6, [30, 2000, 64, 65, 900] * 5, [10] * 20]
)
def test_what_is_kept_is_spread_over_all_batches(sizes):
    kept = torch.cat([probe.batch for probe in recorded(sizes).probes()])
    assert len(kept.unique(dim=0)) == len(kept)
    assert min(SAMPLES, sum(sizes)) <= len(kept) < SAMPLES + max(sizes)
    numbers = kept[:, 0].unique()
    assert numbers[0] == 0
    edges = torch.cat([numbers, torch.tensor([float(len(sizes))])])
    assert int(edges.diff().max()) <= 3 * len(sizes) / len(numbers), "no long stretch of the data is left out"


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 8, 10, 16])
def test_classes_in_turn_are_held_out_alike(classes):
    of = torch.arange(1024) % classes
    held_out = torch.cat(trial._held_out([100] * 10 + [24]))
    assert 250 < int(held_out.sum()) < 262
    shares = torch.stack([held_out[of == k].double().mean() for k in range(classes)])
    assert float((shares - 0.25).abs().max()) < 0.1


@pytest.mark.parametrize("kind", ["neighbours", "sparse"])
def test_a_batch_whose_samples_depend_on_each_other_is_run_whole(kind):
    torch.manual_seed(fresh_seed())
    x, near = torch.randn(300, 6), (torch.rand(300, 300) < 0.02).float()
    graph = near.to_sparse() if kind == "sparse" else near.nonzero().T

    def forward(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        nodes, edges = batch
        if edges.is_sparse:
            return model(torch.sparse.mm(edges, nodes))
        assert len(nodes) == 300, "an edge would point out of the nodes"
        return model(torch.zeros_like(nodes).index_add(0, edges[0], nodes[edges[1]]))

    ends = [nn.Linear(6, 4), nn.Linear(6, 4)]
    plan = fm.applied_plan(fm.renormalize(fm.merge(ends), ends, [(x, graph)], forward=forward))
    assert plan is not None
    assert "least squares was not tried" in plan.why


def test_a_part_that_answers_otherwise_than_the_whole_is_no_trial():
    ends = [nn.Linear(6, 4), nn.Linear(6, 4)]
    x = torch.randn(300, 6)
    plan = fm.applied_plan(
        fm.renormalize(
            fm.merge(ends), ends, [x], forward=lambda model, batch: model(batch - batch.roll(1, 0))
        )
    )
    assert plan is not None
    assert "a part of a batch does not give what the whole batch gives" in plan.why


@pytest.mark.parametrize("count", [65, 100, pytest.param(1000, marks=pytest.mark.slow)])
def test_batches_of_one_sample_are_enough_for_a_trial(count):
    ends = [nn.Linear(6, 4), nn.Linear(6, 4)]
    plan = fm.applied_plan(fm.renormalize(fm.merge(ends), ends, list(torch.randn(count, 1, 6))))
    assert plan is not None
    assert "on samples that least squares was not fitted to" in plan.why


class Record(UserDict):
    """Encodings of a tokenizer have methods too."""

    def inputs(self) -> torch.Tensor:
        return self["x"]


class Named(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor

    def inputs(self) -> torch.Tensor:
        return self.x


@dataclass
class Held:
    x: torch.Tensor

    def inputs(self) -> torch.Tensor:
        return self.x


@pytest.mark.parametrize(
    "made",
    [lambda x: Record(x=x), lambda x: Named(x, torch.zeros(len(x))), Held],
    ids=["mapping", "named", "dataclass"],
)
def test_batches_of_every_kind_are_copied_and_keep_their_methods(made):
    torch.manual_seed(fresh_seed())
    store, ends = torch.randn(20, 32, 6), [nn.Linear(6, 4), nn.Linear(6, 4)]
    given = []

    def forward(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch.inputs())

    class Reused:
        def __iter__(self):
            memory = torch.empty(32, 6)
            for part in store:
                given.append(made(memory.copy_(part)))
                yield given[-1]

    measured = fm.endpoint_statistics(ends, Reused(), forward=forward)
    assert len(measured.probes) == 20
    for probe, part in zip(measured.probes, store, strict=True):
        assert torch.equal(probe.batch.inputs(), part)
    assert all(len(batch.inputs()) == 32 for batch in given)
    plan = fm.applied_plan(fm.renormalize(fm.merge(ends), ends, Reused(), forward=forward))
    assert plan is not None
    assert ("on samples that least squares was not fitted to" in plan.why) == (made is not Held)
    assert all(len(batch.inputs()) == 32 for batch in given)


@pytest.mark.parametrize("order", ["sorted", "in turn"])
def test_batches_sorted_by_class_change_neither_the_choice_nor_what_least_squares_answers(order):
    torch.manual_seed(fresh_seed())
    centres = 4 * torch.randn(8, 10)
    targets = torch.arange(8).repeat_interleave(200)
    inputs = centres[targets] + torch.randn(1600, 10)
    ends = []
    for _ in range(2):
        net = nn.Sequential(nn.Linear(10, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 8))
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(net(inputs), targets).backward()
            optimizer.step()
        ends.append(net.eval())
    merged, shuffled = fm.merge(ends), torch.randperm(1600)
    given = torch.arange(1600) if order == "sorted" else torch.arange(1600).view(8, 200).T.flatten()
    chosen, answers = [], []
    for chosen_order in (given, shuffled):
        x, y = inputs[chosen_order], targets[chosen_order]
        new = fm.renormalize(merged, ends, Batches(x, y, 64), progress=False)
        plan = fm.applied_plan(new)
        assert plan is not None
        chosen.append(plan.method)
        answers.append(float((new(inputs).argmax(1) == targets).float().mean()))
    assert chosen == ["least-squares", "least-squares"]
    assert answers[0] == pytest.approx(answers[1], abs=0.02)
