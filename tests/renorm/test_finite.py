"""Data from which no statistics can be had is refused, with the batch and the layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastmatch as fm
from fastmatch._internal.files import save_state
from fastmatch.cli.main import main


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()


def batches(bad: float | None = None) -> list[torch.Tensor]:
    found = [torch.randn(6, 4) for _ in range(3)]
    if bad is not None:
        found[1][3, 2] = bad
    return found


@pytest.mark.parametrize("mode", ["joint", "sequential"])
@pytest.mark.parametrize("method", ["repair", "rescale", "reshift", "reset"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_is_refused_with_its_batch(mode, method, bad):
    model = network()
    options = fm.Renormalization(method, mode)
    where = "1" if method == "reset" else "0"
    message = rf"data: batch 1 \(counted from 0\) gives NaN or infinite activations at '{where}' of (the merge|models\[0\])"
    with pytest.raises(ValueError, match=message):
        fm.renormalize(model, None if method == "reset" else [model], batches(bad), options)
    if method != "reset":
        statistics = fm.endpoint_statistics([model], batches())
        with pytest.raises(ValueError, match=message):
            fm.renormalize(model, statistics, batches(bad), options)


@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_the_automatic_choice_refuses_them_too(mode):
    model, options = network(), fm.Renormalization("auto", mode)
    message = r"data: batch 1 \(counted from 0\) gives NaN or infinite activations at '\d' of "
    with pytest.raises(ValueError, match=message):
        fm.renormalize(model, [model], batches(float("nan")), options)
    statistics = fm.endpoint_statistics([model], batches())
    with pytest.raises(ValueError, match=message + "the merge"):
        fm.renormalize(model, statistics, batches(float("nan")), options)


@pytest.mark.filterwarnings("ignore:data. . samples? came")
@pytest.mark.parametrize("mode", ["joint", "sequential"])
@pytest.mark.parametrize("sizes", [(1,), (1, 6), (1, 1)])
def test_one_sample_has_no_running_variance(mode, sizes):
    model, options = network(), fm.Renormalization("reset", mode)
    data = [torch.randn(size, 4) for size in sizes]
    if mode == "sequential" and sum(sizes) > 1:  # the variance is that of all batches
        new = fm.renormalize(model, None, data, options)
        assert all(bool(torch.isfinite(t).all()) for t in new.state_dict().values())
        return
    with pytest.raises(ValueError, match="has one sample, which gives one value for each channel at"):
        fm.renormalize(model, None, data, options)


@pytest.mark.parametrize("sizes", [(7, 1), (6, 1, 1), (6, 1, 4, 1)])
def test_a_short_last_batch_counts_as_its_samples(sizes):
    """One value for each channel has no variance of its own; before, the whole call failed at its end."""
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5), nn.BatchNorm1d(5)
    ).eval()
    data = [torch.randn(size, 4) for size in sizes]
    new = fm.renormalize(model, None, data, "reset")
    inputs = model[0](torch.cat(data))
    torch.testing.assert_close(new[1].running_mean, inputs.mean(0))
    torch.testing.assert_close(new[1].running_var, inputs.var(0))
    so_far = ((torch.cat(data[: k + 1]), batch) for k, batch in enumerate(data))
    later = torch.cat(
        [_after_the_first_norm(model, seen if len(batch) == 1 else batch, batch) for seen, batch in so_far]
    )
    torch.testing.assert_close(new[4].running_mean, later.mean(0))
    torch.testing.assert_close(new[4].running_var, later.var(0))


def _after_the_first_norm(
    model: nn.Sequential, normalized_by: torch.Tensor, batch: torch.Tensor
) -> torch.Tensor:
    pool, x = model[0](normalized_by), model[0](batch)
    return model[3](torch.relu((x - pool.mean(0)) / (pool.var(0) + model[1].eps).sqrt())).detach()


def test_a_short_last_batch_stops_neither_the_automatic_choice_nor_a_curve():
    ends = [network(), network()]
    data = [(torch.randn(size, 4), torch.randint(0, 3, (size,))) for size in (8, 8, 1)]
    assert fm.applied_plan(fm.renormalize(fm.merge(ends), ends, data)).scores.keys() >= {"repair", "reset"}
    curve = fm.interpolate(*ends, data, points=3, between=fm.Renormalized(data, "reset"))
    assert all(value < float("inf") for value in curve.loss)


@pytest.mark.filterwarnings("ignore:data. . samples? came")
def test_one_image_has_many_positions():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).eval()
    new = fm.renormalize(model, None, [torch.randn(1, 1, 8, 8)], "reset")
    assert bool((new.state_dict()["1.running_var"] > 0).all())
    for method in ("repair", "rescale", "least-squares"):
        new = fm.renormalize(model, [model], [torch.randn(1, 1, 8, 8)], method)
        assert all(bool(torch.isfinite(t).all()) for t in new.state_dict().values())


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.mark.parametrize("given", ["models", "statistics"])
@pytest.mark.parametrize("mode", ["joint", "sequential"])
@pytest.mark.parametrize("method", ["repair", "rescale", "least-squares"])
def test_one_sample_has_no_variance_to_bring_to_another(method, mode, given):
    """It was taken, and the network written was worse."""
    model, data = plain(), [torch.randn(1, 4)]
    if given == "statistics" and method == "least-squares":
        return  # it needs the models
    ends = [model] if given == "models" else fm.endpoint_statistics([model], [torch.randn(20, 4)])
    where = r"batch 0 \(counted from 0\)" if mode == "joint" and method != "least-squares" else "the whole"
    with pytest.raises(
        ValueError, match=f"data: {where} has one sample, which gives one value for each channel at '0'"
    ):
        fm.renormalize(model, ends, data, fm.Renormalization(method, mode))


def test_batches_of_one_sample_are_refused_in_joint_mode_but_not_a_short_last_one():
    model = plain()
    with pytest.raises(ValueError, match=r"data: batch 0 \(counted from 0\) has one sample"):
        fm.renormalize(model, [model], [torch.randn(1, 4) for _ in range(10)], "repair")
    assert fm.renormalize(model, [model], [torch.randn(9, 4), torch.randn(1, 4)], "repair") is not model
    sequential = fm.Renormalization("repair", mode="sequential")
    assert fm.renormalize(model, [model], [torch.randn(1, 4) for _ in range(10)], sequential) is not model


def test_a_mean_and_the_automatic_choice_take_one_sample():
    ends = [plain(), plain()]
    merged, data = fm.merge(ends), [(torch.randn(1, 4), torch.zeros(1, dtype=torch.long))]
    with pytest.warns(UserWarning, match='data: 1 sample came, and "reshift" brings'):
        new = fm.renormalize(merged, ends, data, "reshift")
    goal = (ends[0][0](data[0][0]) + ends[1][0](data[0][0])) / 2
    torch.testing.assert_close(new[0](data[0][0]), goal)
    with pytest.warns(UserWarning, match="renormalize leaves the merge as it is"):
        assert fm.applied_plan(fm.renormalize(merged, ends, data)).method == "none"


class Constant(nn.Module):
    """Adds to its inputs what a layer gives for a constant: one row, however many samples there are."""

    def __init__(self):
        super().__init__()
        self.place, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x + self.place(torch.ones(1, 4)))


def test_a_layer_of_one_row_is_no_single_sample():
    model = Constant().eval()
    for method in ("repair", "rescale", "least-squares"):
        new = fm.renormalize(model, [model], [torch.randn(20, 4)], method)
        assert all(bool(torch.isfinite(t).all()) for t in new.state_dict().values())


@pytest.mark.parametrize("mode", ["joint", "sequential"])
@pytest.mark.parametrize("method", ["repair", "rescale", "reshift", "reset", "least-squares"])
def test_a_named_method_warns_of_few_samples(method, mode):
    """On two samples REPAIR took a loss of 0.6 to 226, and said nothing."""
    model, options = network(), fm.Renormalization(method, mode)
    ends = None if method == "reset" else [model]
    with pytest.warns(
        UserWarning, match=f'data: 7 samples came, and "{method}" brings .* give 8 at the least'
    ):
        fm.renormalize(model, ends, [torch.randn(5, 4), torch.randn(2, 4)], options)
    assert fm.renormalize(model, ends, [torch.randn(5, 4), torch.randn(3, 4)], options) is not model
    if method != "reset":
        cut = fm.Renormalization(method, mode, samples=3)
        with pytest.warns(UserWarning, match="data: 3 samples came"):
            fm.renormalize(model, ends, [torch.randn(20, 4)], cut)


def test_no_command_writes_weights_that_are_not_finite(tmp_path, monkeypatch, capsys):
    """Finite halves whose mixture overflows: nothing in the inputs is wrong, only the result."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half_module.py").write_text(
        "import torch\nfrom torch import nn\ndef build():\n"
        "    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).half(), torch.zeros(2, 4).half()\n"
    )
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).half()
    with torch.no_grad():
        model[0].weight.fill_(6e4)
    torch.save(model.state_dict(), "a.pt")
    with torch.no_grad():
        model[0].weight.neg_()
    torch.save(model.state_dict(), "b.pt")
    common = ["--model", "half_module.py:build", "--out", "o.pt"]
    for line in (["merge", "a.pt", "b.pt", *common, "--weights", "10", "-9"],):
        assert main(line) == 2, line
        assert "tensor '0.weight' holds 32 NaN or infinite" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["a.pt", "b.pt"]


def test_permutations_are_not_applied_to_weights_that_are_not_finite(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    spec = fm.PermutationSpec.trace(model, torch.zeros(2, 4))
    fm.Alignment(spec.random(), spec).save("found.safetensors")
    with torch.no_grad():
        model[2].weight[1, 1] = float("inf")
    for name in ("b.pt", "b.safetensors"):
        save_state(model.state_dict(), name)
        assert main(["apply", "found.safetensors", name, "--out", f"out_{name}"]) == 2
        error = capsys.readouterr().err
        assert f"out_{name} is not written: the result: tensor '2.weight' holds 1 NaN or infinite" in error
    assert not list(tmp_path.glob("*out_*"))


def test_a_type_that_cannot_hold_the_weights_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain_module.py").write_text(
        "import torch\nfrom torch import nn\ndef build():\n"
        "    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.zeros(2, 4)\n"
    )
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[2].weight[0, 0] = 7e4
    torch.save(model.state_dict(), "a.pt")
    line = ["align", "a.pt", "a.pt", "--model", "plain_module.py:build", "--out", "o.pt", "--out-of-core"]
    assert main([*line, "--dtype", "float16"]) == 2
    assert "tensor '2.weight' holds 1 NaN or infinite" in capsys.readouterr().err
    assert main([*line, "--dtype", "bfloat16"]) == 0
