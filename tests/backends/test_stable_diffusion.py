"""The adapter for scripts that merge Stable Diffusion checkpoints, and their functions while it is installed."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from fastmatch.backends import installed
from fastmatch.backends.stable_diffusion import weight_matching
from helpers.networks import fresh_seed

TABLE = {
    "P_0": [("l0.weight", 0), ("l0.bias", 0), ("l1.weight", 1)],
    "P_1": [("l1.weight", 0), ("l1.bias", 0), ("l2.weight", 1), ("a model lacks this", 0)],
}
PS = SimpleNamespace(perm_to_axes=TABLE)
OWN = "the script's own function ran"


@pytest.fixture
def pair():
    """Return A, B and the permutations that bring B back to A."""
    generator = torch.Generator().manual_seed(fresh_seed())
    shapes = {
        "l0.weight": (30, 8),
        "l0.bias": (30,),
        "l1.weight": (25, 30),
        "l1.bias": (25,),
        "l2.weight": (4, 25),
    }
    a = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    p0, p1 = torch.randperm(30, generator=generator), torch.randperm(25, generator=generator)
    return a, permuted(a, p0, p1), {"P_0": p0.argsort(), "P_1": p1.argsort()}


def permuted(a, p0, p1):
    return {
        "l0.weight": a["l0.weight"][p0], "l0.bias": a["l0.bias"][p0], "l1.weight": a["l1.weight"][p1][:, p0],
        "l1.bias": a["l1.bias"][p1], "l2.weight": a["l2.weight"][:, p1],
    }  # fmt: skip


def inner(a, b):
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def test_planted_permutations_are_found_and_the_average_rise_is_returned(pair):
    a, b, planted = pair
    found, average = weight_matching(PS, a, b, max_iter=20)
    assert all(torch.equal(found[name], p) for name, p in planted.items())
    assert average == pytest.approx((inner(a, a) - inner(a, b)) / 2, rel=1e-6)


@pytest.mark.parametrize("half", [False, True])
def test_only_chosen_groups_move_and_the_rest_stays_where_it_starts(pair, half):
    a, b, planted = pair
    start = {"P_0": torch.arange(30).float(), "P_1": planted["P_1"].float()}
    found, _ = weight_matching(PS, a, b, 5, start, usefp16=half, groups=["P_0"])
    assert all(torch.equal(found[name], p) for name, p in planted.items())
    alone, _ = weight_matching(PS, a, b, 5, groups=["P_0"])
    assert torch.equal(alone["P_1"], torch.arange(25))


def test_no_iterations_change_nothing(pair):
    a, b, planted = pair
    found, average = weight_matching(PS, a, b, 0, planted)
    assert average == 0
    assert all(torch.equal(found[name], p) for name, p in planted.items())
    assert torch.equal(weight_matching(PS, a, b, 0)[0]["P_1"], torch.arange(25))


def test_an_unknown_group_is_refused(pair):
    with pytest.raises(ValueError, match=r"groups: expected some of the spec's, got 'P_2'"):
        weight_matching(PS, *pair[:2], groups=["P_2"])


def script(tmp_path, monkeypatch, parameters, body="pass"):
    (tmp_path / "weight_matching.py").write_text(
        f"def weight_matching({parameters}):\n    {body}\n    raise RuntimeError({OWN!r})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "weight_matching", raising=False)
    importlib.invalidate_caches()


ALL = 'ps, params_a, params_b, max_iter=1, init_perm=None, usefp16=False, device="cpu"'


def test_a_script_is_served_while_installed(tmp_path, monkeypatch, pair):
    a, b, planted = pair
    script(
        tmp_path,
        monkeypatch,
        ALL.replace("max_iter", 'special_layers=None, device="cpu", max_iter', 1).rpartition(",")[0],
    )
    with installed("ogkalu2"):
        from weight_matching import weight_matching as served  # pyright: ignore[reportMissingImports]

        found, _ = served(PS, a, b, max_iter=9, usefp16=False)
        assert all(torch.equal(found[name], p) for name, p in planted.items())
        found, _ = served(PS, a, b, ["P_1"], max_iter=9)
        assert torch.equal(found["P_0"], torch.arange(30))
        assert not torch.equal(found["P_1"], torch.arange(25))
    with pytest.raises(RuntimeError, match=OWN):
        sys.modules["weight_matching"].weight_matching(PS, a, b)


def test_a_script_that_names_its_groups_moves_only_those(tmp_path, monkeypatch, pair):
    a, b, _ = pair
    script(tmp_path, monkeypatch, ALL, 'layers = ["P_0", "P_9"]')
    with installed("ogkalu2"):
        import weight_matching  # pyright: ignore[reportMissingImports]

        found, _ = weight_matching.weight_matching(
            PS, a, b, max_iter=9, init_perm=None, usefp16=True, device="cpu"
        )
    assert not torch.equal(found["P_0"], torch.arange(30))
    assert torch.equal(found["P_1"], torch.arange(25))


def test_what_ours_does_not_support_is_left_to_the_script(tmp_path, monkeypatch, pair):
    a, b, _ = pair
    script(tmp_path, monkeypatch, ALL)
    wide = {**b, "l1.weight": torch.zeros(25, 31)}
    with installed("ogkalu2"):
        import weight_matching  # pyright: ignore[reportMissingImports]

        with pytest.raises(RuntimeError, match=OWN):
            weight_matching.weight_matching(PS, a, wide)


def test_another_function_of_that_name_is_not_replaced(tmp_path, monkeypatch):
    script(tmp_path, monkeypatch, "rng, ps, params_a, params_b")
    with installed("ogkalu2"):
        import weight_matching  # pyright: ignore[reportMissingImports]

        assert not hasattr(weight_matching.weight_matching, "__wrapped__")
