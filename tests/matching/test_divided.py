"""Models that are divided among two ranks, by FSDP2 and by tensor parallelism: aligned, applied and merged as they are."""

from __future__ import annotations

import copy
import weakref
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmatch as fm
from fastmatch._internal.divided import DividedState, local_part
from fastmatch._internal.ranks import ALONE, RanksError, current, is_divided
from fastmatch._internal.shared_data import runs_alone
from fastmatch._internal.states import device_of
from fastmatch._internal.wrapped_buffers import buffers_sent_once
from fastmatch.assignment import bounded_gain
from fastmatch.assignment.bounded_gain import BoundedGain
from fastmatch.backends.sd_mecha import _Loaded
from fastmatch.matching import gains
from fastmatch.matching.ascent import Hooks
from fastmatch.matching.held import HeldState
from fastmatch.matching.weights import match_weights
from helpers.ranked import on_ranks

WIDTHS = (12, 34, 40, 5)
"""Of the layers; 5 outputs are not divided evenly."""


class Network(nn.Sequential):
    """Linear layers with a ReLU between them, and a buffer."""

    def __init__(self, widths=WIDTHS):
        layers = [nn.Linear(n, m) for n, m in pairwise(widths)]
        super().__init__(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])
        self.register_buffer("steps", torch.tensor(3))


def pair(widths=WIDTHS):
    """A, B (A with other units' order, and noise), an example and A's spec."""
    torch.manual_seed(1)
    a, x = Network(widths), torch.randn(4, widths[0])
    spec = fm.PermutationSpec.trace(a, x)
    moved = fm.Alignment(spec.random(torch.Generator().manual_seed(2)), spec).apply(a)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
    return a, moved, x, spec


def by_fsdp(model, mesh):
    model = copy.deepcopy(model)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def by_tensor_parallelism(model, mesh):
    return parallelize_module(copy.deepcopy(model), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def whole(state):
    return {name: t.full_tensor() if is_divided(t) else t for name, t in state.items()}


def layout(state):
    return {name: str(t.placements) if is_divided(t) else "whole" for name, t in state.items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def found_with(divide, mesh):
    """What holds of models divided in one way."""
    a, b, x, spec = pair()
    first, second = divide(a, mesh), divide(b, mesh)
    before = whole(second.state_dict())
    alignment = fm.align(first, second, x)
    expected = match_weights(a.state_dict(), b.state_dict(), spec, hooks=Hooks(out_of_core=True, ranks=ALONE))
    moved = alignment.apply(second.state_dict())
    merged = fm.merge([first.state_dict(), moved], [0.25, 0.75])
    aligned = fm.Alignment(expected.permutations, spec).apply(b.state_dict())
    held = {
        "the groups are those of the whole model": alignment.spec.groups == spec.groups,
        "the permutations are those of the whole model": same(alignment.permutations, expected.permutations),
        "the objective is that of the whole model": alignment.matching.objective == expected.objective,
        "units were moved back": alignment.moved > 0,
        "aligned weights are those of the whole model": same(whole(moved), aligned),
        "the aligned model is divided as before": layout(moved) == layout(second.state_dict()),
        "the merge is that of whole models": same(
            whole(merged), fm.merge([a.state_dict(), aligned], [0.25, 0.75])
        ),
        "the merge is divided": layout(merged) == layout(first.state_dict()),
        "the models are not changed": same(whole(second.state_dict()), before),
        "a part is no view of a whole": all(
            local_part(t).untyped_storage().nbytes() == local_part(t).nbytes for t in moved.values()
        ),
    }
    with (
        patch.multiple(gains, BOUNDED_UNITS=2, BOUNDED_PRODUCTS=0),
        patch.object(bounded_gain, "JUDGED", 8),
        patch.object(BoundedGain, "__init__", autospec=True, side_effect=BoundedGain.__init__) as made,
    ):
        bounded = fm.align(first, second, x)
    held["bounds find the same"] = same(bounded.permutations, expected.permutations)
    held["bounds are used"] = any(current().exchange(made.called, "whether bounds are used"))
    outputs = second(x)
    copied = alignment.apply(second)  # after a forward pass, which leaves FSDP2's parameters whole
    held["an aligned module has the aligned weights"] = same(whole(copied.state_dict()), aligned)
    held["an aligned module is divided as before"] = layout(copied.state_dict()) == layout(moved)
    held["it is of the same class"] = type(copied) is type(second)
    held["it computes what the model does"] = torch.allclose(copied(x), outputs, atol=1e-5)
    held["the model still computes it"] = torch.equal(second(x), outputs)
    data = [(x, torch.tensor([0, 1, 2, 3]))]
    curve, expected_curve = (
        fm.interpolate(*m, data, points=3) for m in ((first, copied), (a, load(b, aligned)))
    )
    held["a curve is that of whole models"] = torch.allclose(
        torch.tensor(curve.loss), torch.tensor(expected_curve.loss), atol=1e-5
    )
    second.load_state_dict(moved)
    held["aligned weights can be loaded"] = torch.allclose(second(x), outputs, atol=1e-5)
    return held


def load(model, state):
    copied = copy.deepcopy(model)
    copied.load_state_dict(state)
    return copied


class Allocated(TorchDispatchMode):
    """Counts the bytes of the tensors that live at the same time, beside those that it is given."""

    def __init__(self, held):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0
        for tensor in held:
            self.note(tensor)

    def note(self, tensor):

        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not (tensor.is_meta or is_divided(tensor)):
                self.note(tensor)
        return out


def peak_bytes(mesh):
    """The peak of whole models in one process, and of divided ones."""
    a, b, _, spec = pair((12, *[96] * 16, 5))
    states = a.state_dict(), b.state_dict()
    with Allocated([t for state in states for t in state.values()]) as one:
        match_weights(*states, spec, hooks=Hooks(out_of_core=True, ranks=ALONE))
    states = by_fsdp(a, mesh).state_dict(), by_fsdp(b, mesh).state_dict()
    with Allocated([local_part(t) for state in states for t in state.values()]) as divided:
        fm.align(*states, spec=spec)
    return one.peak, divided.peak


def wide_as_whole(mesh):
    """Whether divided models of a size from which bounds are tried are matched as whole ones, and with bounds."""
    a, b, _, spec = pair((3000, 640, 5))
    states = [by_fsdp(model, mesh).state_dict() for model in (a, b)]
    with patch.object(BoundedGain, "__init__", autospec=True, side_effect=BoundedGain.__init__) as made:
        found = fm.align(*states, spec=spec)
    expected = match_weights(a.state_dict(), b.state_dict(), spec, hooks=Hooks(out_of_core=True, ranks=ALONE))
    return {
        "the permutations are those of the whole model": same(found.permutations, expected.permutations),
        "the objective is that of the whole model": found.matching.objective == expected.objective,
        "bounds are used": any(current().exchange(made.called, "whether bounds are used")),
    }


def refusals(mesh):
    """The messages of calls that divided models do not have."""
    a, b, x, spec = pair()
    first, second = by_fsdp(a, mesh), by_fsdp(b, mesh)
    tensor = by_tensor_parallelism(a, mesh)
    data = [(x, torch.tensor([0, 1, 2, 3]))]
    states = first.state_dict(), second.state_dict()
    damaged = dict(second.state_dict())
    damaged["0.weight"] = damaged["0.weight"].clone()
    if current().rank == 1:
        local_part(damaged["0.weight"])[0, 0] = torch.nan

    def alone():
        with fm.alone():
            fm.align(*states, spec=spec)

    calls = {
        "mixed": lambda: fm.merge([states[0], b.state_dict()]),
        "renormalize": lambda: fm.renormalize(first, [first], data, "repair"),
        "renormalize tensor parallel": lambda: fm.renormalize(tensor, [tensor], data, "repair"),
        "activations": lambda: fm.align(first, second, x, fm.ActivationMatching(data)),
        "many": lambda: fm.align_many(states, spec=spec),
        "matcher": lambda: fm.WeightMatching().match(*states, spec),
        "balance": lambda: fm.balance(first, x),
        "alone": alone,
        "not finite": lambda: fm.align(states[0], damaged, spec=spec),
    }
    more = data * (2 + current().rank)
    several = [torch.randn(64, WIDTHS[0], generator=torch.Generator().manual_seed(3))] * 3
    wrapped = DistributedDataParallel(copy.deepcopy(a)), DistributedDataParallel(copy.deepcopy(b))
    own = fm.PermutationSpec.trace(wrapped[0], x)
    calls |= {
        "more batches: score": lambda: fm.score(first, more),
        "more batches: score of an iterator": lambda: fm.score(first, iter(more)),
        "more batches: endpoint_statistics": lambda: fm.endpoint_statistics([first], more),
        "more batches: renormalize": lambda: fm.renormalize(
            wrapped[0], wrapped, more, "repair", weights=[0.5, 0.5]
        ),
        "more batches: least squares": lambda: fm.renormalize(
            wrapped[0], wrapped, more, "least-squares", weights=[0.5, 0.5]
        ),
        "more batches: activations": lambda: fm.ActivationMatching(more).match(*wrapped, own),
        "more batches: Fisher": lambda: fm.FisherMatching(more).match(*wrapped, own),
        "more batches: straight-through": lambda: fm.StraightThrough(more).match(*wrapped, own),
        "more batches: layer table": lambda: fm.layer_table({"a": wrapped[0]}, more),
        "activations themselves": lambda: fm.ActivationMatching(data * 3).match(first, second, spec),
        "activations, wrapped": lambda: (
            same(
                fm.ActivationMatching(several).match(*wrapped, own).permutations,
                {
                    f"module.{k}": v
                    for k, v in fm.ActivationMatching(several).match(a, b, spec).permutations.items()
                },
            )
            or 1 / 0
        ),
        "Fisher": lambda: fm.FisherMatching(data).match(first, second, spec),
    }
    flat = FullyShardedDataParallel(copy.deepcopy(a), device_id=torch.device("cpu"), use_orig_params=True)
    calls |= {
        "balance=True": lambda: fm.align(first, second, x, fm.WeightMatching(balance=True)),
        "score of FSDP1": lambda: fm.score(flat, data) == fm.score(a, data) or 1 / 0,
        "FSDP1": lambda: fm.align(flat, flat, x),
        "statistics of FSDP1": lambda: fm.endpoint_statistics([flat], data),
        "trace of FSDP1": lambda: fm.PermutationSpec.trace(flat, x),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "no error"
        except (TypeError, ValueError, RanksError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    found["in step"] = current().exchange(current().rank, "the end")
    return found


def wrapped_with_buffers():
    torch.manual_seed(3)
    networks = [
        nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)) for _ in range(2)
    ]
    data = [(torch.randn(16, 12), torch.randint(0, 5, (16,))) for _ in range(3)]
    found = []
    mean = networks[0][1].running_mean.clone()
    wrapped = [DistributedDataParallel(model) for model in networks]
    for models in (networks, wrapped):
        for matcher in (None, fm.FisherMatching(data)):
            alignment = fm.align(*models, data[0][0], matcher)
            found.append(list(alignment.permutations.values()))
    networks[0][1].running_mean += current().rank
    with buffers_sent_once(wrapped[0]):
        kept = torch.equal(networks[0][1].running_mean, mean) and not wrapped[0].broadcast_buffers
    return found, kept and all(model.broadcast_buffers for model in wrapped)


def work():
    mesh = init_device_mesh("cpu", (current().size,))
    return {"FSDP2": found_with(by_fsdp, mesh), "refused": refusals(mesh), "wrapped": wrapped_with_buffers()}


def more_work():
    mesh = init_device_mesh("cpu", (current().size,))
    return {
        "tensor parallel": found_with(by_tensor_parallelism, mesh),
        "wide": wide_as_whole(mesh),
        "bytes": peak_bytes(mesh),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return on_ranks(tmp_path_factory.mktemp("ranks"), (2,), [work])[0][2]


@pytest.fixture(scope="module")
def more_results(tmp_path_factory):
    return on_ranks(tmp_path_factory.mktemp("ranks"), (2,), [more_work])[0][2]


def test_models_divided_by_fsdp_are_aligned_applied_and_merged_as_whole_ones(results):
    for value in results:
        assert [what for what, holds in value["FSDP2"].items() if not holds] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor parallel", "wide"])
def test_divided_models_are_aligned_applied_and_merged_as_whole_ones(more_results, kind):
    for value in more_results:
        assert [what for what, holds in value[kind].items() if not holds] == []


@pytest.mark.slow
def test_a_rank_holds_less_than_seven_tenths_of_what_one_process_holds(more_results):
    for value in more_results:
        one, divided = value["bytes"]
        assert divided < 0.7 * one, (one, divided)


def test_calls_without_divided_models_name_the_argument(results):
    for rank, value in enumerate(results):
        refused = value["refused"]
        assert "divided among ranks (DTensor) in some models" in refused["mixed"]
        for name, argument in (
            ("renormalize", "models[0]"),
            ("renormalize tensor parallel", "models[0]"),
            ("many", "models[0]"),
            ("matcher", "model_a"),
            ("balance", "model"),
        ):
            assert refused[name].startswith(f"TypeError: {argument}: tensor '0.weight' is a DTensor"), (
                refused[name]
            )
        assert "matched by WeightMatching; got ActivationMatching" in refused["activations"]
        assert "outside of fm.alone()" in refused["alone"]
        assert "model_b: tensor '0.weight' holds 1 NaN" in refused["not finite"]
        assert refused["not finite"].startswith("ValueError" if rank == 1 else "RanksError: rank 1 failed")
        assert refused["in step"] == [0, 1]
        assert refused["balance=True"].startswith("TypeError: balance: ")
        assert "divide the balanced ones" in refused["balance=True"]
        for name in ("activations themselves", "Fisher"):
            assert refused[name].startswith("TypeError: model_a: tensor '0.weight' is a DTensor"), refused[
                name
            ]
        assert refused["activations, wrapped"] == "no error"


def test_ranks_that_run_together_and_have_other_numbers_of_batches_are_refused_by_name(results):
    for value in results:
        found = {name: said for name, said in value["refused"].items() if name.startswith("more batches")}
        assert len(found) == 9
        for name, said in found.items():
            assert (
                "data: ranks 0 and 1 do not read the same batches (rank 0 has 2 so far, rank 1 3)" in said
            ), (name, said)


def test_a_model_of_fsdp1_is_scored_on_all_ranks_together_and_refused_by_name_elsewhere(results):
    for value in results:
        refused = value["refused"]
        assert refused["score of FSDP1"] == "no error"
        for name, argument in (
            ("FSDP1", "model_a"),
            ("statistics of FSDP1", "models[0]"),
            ("trace of FSDP1", "model"),
        ):
            said = refused[name]
            assert said.startswith(
                f"TypeError: {argument}: its parameters are divided among ranks by torch's Fully"
            ), said
            assert "get_model_state_dict" in said


def test_states_that_gather_or_load_say_where_their_tensors_are():
    state = {"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(3)}
    assert device_of(DividedState(state, torch.Tensor.clone), "0.weight") == "cpu"
    assert device_of(_Loaded(state, {name: tuple(t.shape) for name, t in state.items()}), "0.weight") == "cpu"
    lazy = HeldState(_Loaded(state, {"0.bias": (3,)}))
    assert device_of(lazy, "0.bias") == "cpu"


def test_a_model_of_deepspeed_s_zero_3_is_refused_by_name_and_runs_on_all_ranks_together():
    model = Network()
    assert runs_alone(model)
    for parameter in model.parameters():
        parameter.ds_id = 0  # as DeepSpeed marks what it has divided
    assert not runs_alone(model)
    with pytest.raises(
        TypeError, match=r"models\[0\]: .* by DeepSpeed's ZeRO-3; give whole tensors: .*GatheredParameters"
    ):
        fm.merge([model, model])


def test_models_in_ddp_with_buffers_are_traced_and_weighted_as_without_it(results):
    for (plain, fisher, *wrapped), kept in (value["wrapped"] for value in results):
        assert kept
        assert [len(permutation) for permutation in plain] == [8]
        for one, other in zip((plain, fisher), wrapped, strict=True):
            assert len(one) == len(other)
            assert all(map(torch.equal, one, other))
