"""Adapters with other libraries' signatures, against small fixtures written from their documentation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

import fastmatch as fm
from fastmatch.backends import c2m3, git_rebasin, pleas, zipit
from fastmatch.backends.mergekit import LoaderState
from fastmatch.matching.weights import match_weights
from helpers.networks import fresh_seed


class PublishedSpec(NamedTuple):
    """Git Re-Basin's PermutationSpec: both tables, each derived from the other."""

    perm_to_axes: dict
    axes_to_perm: dict


def from_axes_to_perm(axes_to_perm):
    perm_to_axes: dict = {}
    for name, axes in axes_to_perm.items():
        for axis, perm in enumerate(axes):
            if perm is not None:
                perm_to_axes.setdefault(perm, []).append((name, axis))
    return PublishedSpec(perm_to_axes, axes_to_perm)


# Two hidden layers; a tuple longer than its tensor's rank, a scalar, and a parameter that models lack.
SPEC = from_axes_to_perm(
    {
        "l0.weight": ("P_0", None),
        "l0.bias": ("P_0", None),
        "l1.weight": ("P_1", "P_0"),
        "l1.bias": ("P_1",),
        "l1.num_batches_tracked": (),
        "l2.weight": (None, "P_1"),
        "l2.bias": (None,),
        "absent.weight": ("P_1", None),
    }
)


def params(width: int = 30) -> dict[str, torch.Tensor]:
    sizes = {"l0": (width, 8), "l1": (width + 3, width), "l2": (4, width + 3)}
    state = {f"{k}.weight": torch.randn(*s) for k, s in sizes.items()}
    state |= {f"{k}.bias": torch.randn(s[0]) for k, s in sizes.items()}
    return state | {"l1.num_batches_tracked": torch.tensor(7)}


def permuted(state, p0, p1):
    new = dict(state)
    new["l0.weight"], new["l0.bias"] = state["l0.weight"][p0], state["l0.bias"][p0]
    new["l1.weight"], new["l1.bias"] = state["l1.weight"][p1][:, p0], state["l1.bias"][p1]
    new["l2.weight"] = state["l2.weight"][:, p1]
    return new


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_git_rebasins_weight_matching_inverts_a_planted_permutation(kind):
    torch.manual_seed(fresh_seed())
    a = params()
    planted = torch.randperm(30), torch.randperm(33)
    b = permuted(a, *planted)
    given = [{k: v if kind == "torch" else v.numpy() for k, v in state.items()} for state in (a, b)]
    found = git_rebasin.weight_matching(SPEC, *given, max_iter=50)
    assert list(found) == ["P_0", "P_1"]
    for perm, plant in zip(found.values(), planted, strict=True):
        assert type(perm) is (torch.Tensor if kind == "torch" else np.ndarray)
        assert (np.asarray(perm) == plant.argsort().numpy()).all()  # new_b[i] = b[perm[i]]
    as_keyed = git_rebasin.weight_matching_with_key(np.array([0, 5], np.uint32), SPEC, *given)
    assert all((np.asarray(as_keyed[k]) == np.asarray(found[k])).all() for k in found)


def test_git_rebasins_arguments_and_c2m3s_name_for_the_table():
    torch.manual_seed(fresh_seed())
    a, b = params(), params()
    torch.manual_seed(1)
    one = git_rebasin.weight_matching(SPEC, a, b, 100, None, True)
    torch.manual_seed(1)
    two = git_rebasin.weight_matching(SimpleNamespace(perm_to_layers_and_axes=SPEC.perm_to_axes), a, b)
    assert all(torch.equal(one[k], two[k]) for k in one)
    again = git_rebasin.weight_matching(SPEC, a, b, init_perm=one, max_iter=1)
    assert all(torch.equal(one[k], again[k]) for k in one)
    with pytest.raises(TypeError, match="ps: expected a spec with perm_to_axes"):
        git_rebasin.weight_matching(object(), a, b)
    with pytest.raises(ValueError, match="no axis of group 'P_9'"):
        git_rebasin.spec_of(SimpleNamespace(perm_to_axes={"P_9": [("nowhere", 0)]}), a)
    with pytest.raises(ValueError, match=r"group 'P_0' has 30 units, axis 0 of 'l1\.weight' has 33"):
        git_rebasin.spec_of(SimpleNamespace(perm_to_axes={"P_0": [("l0.weight", 0), ("l1.weight", 0)]}), a)


def test_a_flatten_after_a_convolution_moves_whole_channels():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(6 * 4, 3)
    )
    axes = [("0.weight", 0), ("0.bias", 0), ("3.weight", 1)]
    for listed in (axes, axes[::-1], [axes[1], axes[2], axes[0]]):  # in whatever order a spec lists them
        spec = git_rebasin.spec_of(SimpleNamespace(perm_to_axes={"P0": listed}), model.state_dict())
        assert spec.groups["P0"].size == 6
        assert fm.verify(model, spec, torch.randn(2, 1, 4, 4)).error < 1e-12
    with pytest.raises(ValueError, match=r"'P0' has 6 units, axis 0 of '3\.weight' has 3"):
        git_rebasin.spec_of(
            SimpleNamespace(perm_to_axes={"P0": [("0.weight", 0), ("3.weight", 0)]}), model.state_dict()
        )


def test_c2m3s_and_pleas_solvers():
    torch.manual_seed(fresh_seed())
    gain = torch.randn(20, 20)
    expected = torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])
    indices = c2m3.solve_linear_assignment_problem(gain)
    assert indices.dtype == torch.int64
    assert torch.equal(indices, expected)
    assert torch.equal(c2m3.solve_linear_assignment_problem(gain.numpy()), expected)
    matrix = c2m3.solve_linear_assignment_problem(gain, return_matrix=True)
    assert matrix.dtype == torch.float32
    x = torch.randn(20, 3)
    assert torch.equal(matrix @ x, x[expected])
    assert torch.equal(pleas.lsa_solver(gain), expected)
    least = torch.from_numpy(linear_sum_assignment(gain.numpy())[1])
    assert torch.equal(pleas.lsa_solver(gain, maximize=False), least)


def joint_covariance(n: int, models: int) -> torch.Tensor:
    features = torch.randn(6 * n, n * models).double() @ torch.randn(n * models, n * models).double()
    return torch.cov(features.T)


@pytest.mark.parametrize("models", [2, 3])
def test_zipits_permutation_matrices(models):
    torch.manual_seed(fresh_seed())
    n = 11
    covariance = joint_covariance(n, models)
    r = 1 - 1 / models
    merge, unmerge = zipit.match_tensors_permute({"covariance": covariance}, r=r, unknown_option=1)
    assert merge.shape == (n, n * models)
    assert unmerge.shape == (n * models, n)
    assert torch.equal(unmerge[:n], torch.eye(n))
    std = covariance.diagonal().sqrt()
    correlation = (covariance / std[:, None] / std).numpy()
    for k in range(1, models):
        block = correlation[:n, n * k : n * (k + 1)]
        best = linear_sum_assignment(block, maximize=True)[1]
        assert torch.equal(unmerge[n * k : n * (k + 1)].argmax(dim=0), torch.from_numpy(best))
    assert torch.allclose(merge, unmerge.T / (models + 1e-5))
    plain = zipit.match_tensors_identity({"covariance": covariance}, r=r)
    assert torch.equal(plain[1], torch.eye(n).repeat(models, 1))
    value = zipit.match_tensors_permute({"covariance": covariance}, r=r, get_merge_value=True)[2]
    assert value == pytest.approx(block[np.arange(n), best].mean())
    biased = zipit.match_tensors_permute({"covariance": covariance}, r=r, add_bias=True)
    assert biased[0].shape == (n, n * models)
    assert biased[1].shape == ((n + 1) * models, n + 1)
    assert biased[1].sum() == models * (n + 1)


def plain_zip(similarity: np.ndarray, n: int, models: int, r: float, a: float, b: float) -> list[set[int]]:
    """The paper's greedy loop as it is described: look through all pairs, merge the best, shrink the matrix."""
    features = [({i}, i // n) for i in range(n * models)]
    sims = similarity.copy()
    left = int(n * models * (1 - r) + 1e-4)
    budget = [int((n * models - left) // models * b + 1e-4)] * models
    np.fill_diagonal(sims, -np.inf)
    while len(features) > left:
        i, j = sorted(np.unravel_index(sims.argmax(), sims.shape))
        joined = np.minimum(sims[i], sims[j]) * a
        sims[i], sims[:, i] = joined, joined
        sims[i, i] = -np.inf
        same = features[i][1] == features[j][1]
        features[i] = (features[i][0] | features[j][0], features[i][1])
        del features[j]
        sims = np.delete(np.delete(sims, j, axis=0), j, axis=1)
        if same:
            origin = features[i][1]
            budget[origin] -= 1
            if budget[origin] <= 0:
                spent = [k for k, (_, o) in enumerate(features) if o == origin]
                sims[np.ix_(spent, spent)] = -np.inf
    return [members for members, _ in features]


@pytest.mark.parametrize(("models", "b"), [(2, 0.125), (2, 1.0), (2, 0.0), (3, 0.5)])
def test_zipits_greedy_pairs(models, b):
    torch.manual_seed(fresh_seed())
    n = 16
    covariance = joint_covariance(n, models)
    before = covariance.clone()
    r = 1 - 1 / models
    merge, unmerge, value = zipit.match_tensors_zipit(
        {"covariance": covariance}, r=r, a=0.3, b=b, get_merge_value=True
    )
    assert torch.equal(covariance, before)
    std = covariance.diagonal().sqrt()
    similarity = (covariance / std[:, None] / std).numpy().astype(np.float32)
    expected = plain_zip(similarity, n, models, r, np.float32(0.3), b)
    got = [set(torch.nonzero(column).flatten().tolist()) for column in unmerge.T]
    assert sorted(map(sorted, got)) == sorted(map(sorted, expected))
    assert torch.allclose(merge, (unmerge / (unmerge.sum(dim=0) + 1e-5)).T)
    assert -1 <= value <= 1


def test_zipits_errors_and_printing(capsys):
    covariance = joint_covariance(6, 2)
    for bad, message in [({"a": 0.0}, "a: expected"), ({"r": 1.0}, "r: expected a fraction")]:
        with pytest.raises(ValueError, match=message):
            zipit.match_tensors_zipit({"covariance": covariance}, **bad)
    with pytest.raises(ValueError, match="metric: expected a square matrix"):
        zipit.match_tensors_permute({"covariance": covariance[:3]})
    with pytest.raises(ValueError, match="metric: 11 features are not 2 models"):
        zipit.match_tensors_permute({"covariance": covariance[:11, :11]})
    zipit.match_tensors_zipit({"cossim": covariance}, print_merges=True)
    assert "merged within each model" in capsys.readouterr().out


def test_a_mergekit_loader_is_read_a_tensor_at_a_time():
    torch.manual_seed(fresh_seed())

    class Loader:
        """mergekit's LazyTensorLoader: an index of paths, get_tensor(key)."""

        def __init__(self, state):
            self.state, self.asked = state, []
            self.index = SimpleNamespace(tensor_paths=dict.fromkeys(state, "model.safetensors"))

        def get_tensor(self, key: str, device: str = "cpu"):
            self.asked.append(key)
            return self.state[key]

    model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 3))
    spec = fm.PermutationSpec.trace(model, torch.randn(2, 6))
    planted = fm.Alignment(spec.random(), spec)
    a = LoaderState(Loader(model.state_dict()))
    b = LoaderState(Loader(planted.apply(model.state_dict())))
    assert a.loader.asked == []
    assert list(a) == list(model.state_dict())
    found = match_weights(a, b, spec)
    assert found.permutations.keys() == planted.invert().permutations.keys()
    assert all(torch.equal(found.permutations[k], v) for k, v in planted.invert().permutations.items())
    assert a.loader.asked
    with pytest.raises(KeyError):
        a["nowhere"]
    with pytest.raises(TypeError, match="loader: expected an object with get_tensor"):
        LoaderState({})
    with pytest.raises(TypeError, match="loader: expected index"):
        LoaderState(SimpleNamespace(get_tensor=lambda name: None))
