"""Analyses against plain computations."""

from __future__ import annotations

import copy
import csv

import pytest
import torch
from torch import nn

import fastmatch as fm
from fastmatch.studies.digits import Batches
from helpers.networks import build, fresh_seed


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4)).double()


def test_the_layer_table_is_what_plain_computation_says():
    torch.manual_seed(fresh_seed())
    models = {"a": net(), "b": net(), "merged": net()}
    with torch.no_grad():
        models["merged"][0].weight[:3], models["merged"][0].bias[:3] = 0, -1  # three dead units
    models["merged"].train()
    data = Batches(torch.randn(40, 6).double(), torch.zeros(40), 16)
    table = fm.layer_table(models, data, endpoints=["a", "b"], weights=[0.25, 0.75])
    assert data.reads == 1
    assert models["merged"].training
    assert len(table) == 9
    variances: dict[tuple[str, str], float] = {}
    features: dict[tuple[str, str], float] = {}
    for row in table.rows:
        model, k = models[row["model"]], int(row["layer"])
        with torch.no_grad():
            z, at_zero = (model[: k + 1](x) for x in (data.inputs, torch.zeros(1, 6).double()))
        variances[row["model"], row["layer"]] = float(z.var(0, correction=0).mean())
        features[row["model"], row["layer"]] = float((z - at_zero).abs().mean())
        assert row["variance"] == pytest.approx(float(z.var(0, correction=0).mean()))
        assert row["mean |z|"] == pytest.approx(float(z.abs().mean()))
        assert row["|z(x) - z(0)|"] == pytest.approx(float((z - at_zero).abs().mean()))
        assert row["dead inputs"] == pytest.approx(
            float((model[:k](data.inputs) == 0).all(0).double().mean())
        )
        assert row["depth"] == k // 2 + 1
    for row in table.where(model="merged").rows:
        for column, values in (("variance ratio", variances), ("feature ratio", features)):
            average = 0.25 * values["a", row["layer"]] + 0.75 * values["b", row["layer"]]
            assert row[column] == pytest.approx(values["merged", row["layer"]] / average)
    assert table.where(model="merged", layer="2").column("dead inputs")[0] >= 3 / 9


def test_layers_of_convolutions_and_a_budget():
    model = build("resnet", fresh_seed())[0]
    data = Batches(torch.randn(20, 3, 16, 16), torch.zeros(20), 8)
    table = fm.layer_table({"m": model}, data, samples=5)
    (row,) = table.where(layer="stem").rows
    with torch.no_grad():
        z = model.stem(data.inputs[:5])
    assert row["variance"] == pytest.approx(float(z.var((0, 2, 3), correction=0).mean()), rel=1e-5)
    assert row["dead inputs"] == 0


def test_running_statistics_before_and_after_reset():
    merged = build("vgg", fresh_seed())[0]
    after = fm.renormalize(merged, None, [torch.randn(16, 3, 16, 16)], "reset")
    table = fm.running_statistics({"before": merged, "after": after})
    assert table.column("norm") == ["features.1", "features.5"] * 2
    for row in table.rows:
        norm = (merged if row["model"] == "before" else after).get_submodule(row["norm"])
        assert row["mean running variance"] == pytest.approx(float(norm.running_var.mean()))
        assert row["mean |running mean|"] == pytest.approx(float(norm.running_mean.abs().mean()))
    with pytest.raises(ValueError, match="none of them has batch norm"):
        fm.running_statistics({"m": build("mlp", 0)[0]})


def test_distances():
    torch.manual_seed(fresh_seed())
    start, a = build("vgg", fresh_seed())[0], build("vgg", fresh_seed())[0]
    same = copy.deepcopy(a)
    same.features[1].running_mean += 1  # no weight
    table = fm.distances({"start": start, "a": a, "same": same.state_dict()})
    expected = sum(
        float((p.detach().double() - q.detach().double()).square().sum())
        for p, q in zip(start.parameters(), a.parameters(), strict=True)
    )
    assert table.where(first="start", second="a").column("distance") == [pytest.approx(expected**0.5)]
    assert table.where(first="a", second="same").column("relative") == [0.0]
    with pytest.raises(ValueError, match="at least two"):
        fm.distances({"a": a})
    with pytest.raises(ValueError, match=r"models\['m'\]: has no tensor"):
        fm.distances({"a": a, "m": build("mlp", 0)[0]})


def test_cells_that_a_spreadsheet_would_compute_are_quoted(tmp_path):
    """Names of tensors and models come from files of others."""
    risky = ["=1+2", "+1", "-1", "@a", "\t=1", " =1"]
    table = fm.Table(tuple({"=name": name, "value": -1.5, "plain": "a-b=c"} for name in risky))
    table.to_csv(tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["'=name", "value", "plain"]
    assert rows == [[f"'{name}", "-1.5", "a-b=c"] for name in risky]


def test_tables_are_plain_records(tmp_path):
    table = fm.Table(({"x": 1, "y": 0.5}, {"x": 2, "y": 0.25}))
    assert str(table).splitlines()[2] == "| 1 | 0.5  |"
    assert str(fm.Table(({"|W|": "a|b"},))) == "| \\|W\\| |\n| ----- |\n| a\\|b  |"
    table.to_csv(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().split() == ["x,y", "1,0.5", "2,0.25"]
    with pytest.raises(FileExistsError, match="force"):
        table.to_csv(tmp_path / "t.csv")
    with pytest.raises(ValueError, match=r"name: expected one of \['x', 'y'\]"):
        table.column("z")
    with pytest.raises(ValueError, match=r"values: expected columns among \['x', 'y'\], got 'z'"):
        table.where(z=1)
    assert len(table.where(x=3).where(y=1)) == 0
    pandas = pytest.importorskip("pandas")
    assert isinstance(table.to_pandas(), pandas.DataFrame)
    assert list(table.to_pandas()["y"]) == [0.5, 0.25]


def test_tables_draw_themselves(tmp_path):
    rows = tuple(
        {"model": m, "depth": d, "v": d * k, "w": 1.0} for k, m in enumerate("ab") for d in (1, 2, 3)
    )
    table = fm.Table(rows)
    ax = table.plot("depth", "v", by="model", path=tmp_path / "v.png")
    assert [line.get_label() for line in ax.lines] == ["a", "b"]
    assert list(ax.lines[1].get_ydata()) == [1, 2, 3]
    assert (tmp_path / "v.png").read_bytes()[:4] == b"\x89PNG"
    both = table.where(model="a").plot("depth", "v", "w")
    assert [line.get_label() for line in both.lines] == ["v", "w"]
    with pytest.raises(ValueError, match="columns: expected at least one"):
        table.plot("depth")
    with pytest.raises(ValueError, match="name: expected one of"):
        table.plot("depth", "u")


def test_a_layer_table_of_unknown_endpoints_is_refused():
    with pytest.raises(ValueError, match="endpoints: 'b' is not among the models"):
        fm.layer_table({"a": net()}, [torch.randn(2, 6).double()], endpoints=["b"])
    with pytest.raises(ValueError, match="weights: given without endpoints"):
        fm.layer_table({"a": net()}, [torch.randn(2, 6).double()], weights=[1.0])
    with pytest.raises(ValueError, match="weights: expected 1"):
        fm.layer_table({"a": net()}, [torch.randn(2, 6).double()], endpoints=["a"], weights=[0.5, 0.5])
    with pytest.raises(ValueError, match="models: expected at least one"):
        fm.layer_table({}, [torch.randn(2, 6).double()])
    with pytest.raises(TypeError, match="expected a torch module"):
        fm.layer_table({"a": net().state_dict()}, [torch.randn(2, 6).double()])


def test_the_layer_table_splits_weight_and_bias_and_measures_norms():
    torch.manual_seed(fresh_seed())
    net = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3), nn.LayerNorm(3)
    )
    net = net.double().eval()
    with torch.no_grad():
        net[5].weight.uniform_(0.5, 2)
        net[5].bias.uniform_(-1, 1)
    x = torch.randn(12, 2, 6, 6).double()
    table = fm.layer_table({"m": net}, [x[:5], x[5:]], norms=True)
    assert table.column("kind") == ["layer", "norm", "layer", "norm"]
    for row in table.rows:
        k = int(row["layer"])
        layer: nn.Module = net[k]
        with torch.no_grad():
            z, zero = net[: k + 1](x), net[: k + 1](torch.zeros(1, 2, 6, 6).double())
            bias = layer.bias.view(1, -1, *[1] * (z.ndim - 2))  # pyright: ignore
            dims = [d for d in range(z.ndim) if d != 1]
            assert row["variance"] == pytest.approx(float(z.var(dims, correction=0).mean()))
            assert row["mean |z - b|"] == pytest.approx(float((z - bias).abs().mean()))
            assert row["|z(x) - z(0)|"] == pytest.approx(float((z - zero).abs().mean()))
            assert row["mean |W|"] == pytest.approx(float(layer.weight.abs().mean()))  # pyright: ignore
            assert row["mean |b|"] == pytest.approx(float(layer.bias.abs().mean()))  # pyright: ignore
    assert fm.layer_table({"m": net}, [x]).column("layer") == ["0", "4"]


def test_running_statistics_by_channel():
    model = build("resnet", fresh_seed())[0]
    table = fm.running_statistics({"m": model}, by_channel=True)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(table) == sum(m.num_features for m in norms.values())
    for name, norm in norms.items():
        own = table.where(norm=name)
        assert own.column("channel") == list(range(norm.num_features))
        assert norm.running_mean is not None
        assert norm.running_var is not None
        torch.testing.assert_close(torch.tensor(own.column("running mean")), norm.running_mean)
        torch.testing.assert_close(torch.tensor(own.column("running variance")), norm.running_var)


def test_in_a_linear_network_the_input_and_the_biases_give_what_the_table_splits():
    """The paper's g and h: the output without all biases, and what the biases alone give."""
    torch.manual_seed(fresh_seed())
    net = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))).double()
    x, bare = torch.randn(30, 6).double(), copy.deepcopy(net)
    with torch.no_grad():
        for layer in bare:
            layer.bias.zero_()
        table = fm.layer_table({"m": net}, [x[:8], x[8:]])
        for k, row in enumerate(table.rows):
            weights_alone, whole = bare[: k + 1](x), net[: k + 1](x)
            rms = float(weights_alone.square().mean(1).sqrt().mean())
            assert row["rms z(x) - z(0)"] == pytest.approx(rms)
            assert row["mean |z(0)|"] == pytest.approx(float((whole - weights_alone)[0].abs().mean()))


def test_the_bound_of_vanishing_features_is_the_published_one_and_falls_with_depth():
    torch.manual_seed(fresh_seed())
    models = {"a": net(), "b": net()}
    models["merged"] = fm.merge(list(models.values()))
    x = torch.randn(40, 6).double()
    table = fm.layer_table(models, [x], endpoints=["a", "b"])
    rms = {(r["model"], r["layer"]): r["rms z(x) - z(0)"] for r in table.rows}
    own = table.where(model="merged").rows
    ratios = [2 * r["rms z(x) - z(0)"] / (rms["a", r["layer"]] + rms["b", r["layer"]]) for r in own]
    assert [r["rms ratio"] for r in own] == pytest.approx(ratios)
    bounds, count = [r["feature bound"] for r in own], len(ratios)
    expected = ratios.copy()
    for i in reversed(range(count - 1)):  # with the published smoothing factor of 1.4
        smooth = 1.4 * expected[i + 1] - 0.4 * expected[i + 1] * (1 - 1 / (count - i + 1))
        expected[i] = max(ratios[i], smooth)
    assert bounds == pytest.approx(expected)
    assert all(bound >= ratio for bound, ratio in zip(bounds, ratios, strict=True))
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] == ratios[-1]


def test_measuring_norms_too_leaves_the_bound_of_the_layers():
    torch.manual_seed(fresh_seed())
    models = {
        name: torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.ReLU(), torch.nn.Linear(8, 4)
        )
        for name in ("a", "b")
    }
    models["merged"] = fm.merge(list(models.values()))
    x = torch.randn(40, 6)
    layers = fm.layer_table(models, [x], endpoints=["a", "b"]).where(model="merged")
    both = fm.layer_table(models, [x], endpoints=["a", "b"], norms=True).where(model="merged")
    assert both.where(kind="layer").column("feature bound") == pytest.approx(layers.column("feature bound"))
    norm = both.where(kind="norm").rows[0]
    assert norm["feature bound"] == pytest.approx(norm["rms ratio"]), "the only norm"


class Windows(nn.Module):
    """One layer is called on samples, on positions before samples, and on windows before both."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.place = nn.Parameter(torch.randn(6, 4))

    def calls(self, x: torch.Tensor) -> list[torch.Tensor]:
        first = self.layer(x + self.place)  # (samples, positions, units)
        second = self.layer(
            torch.relu(first).transpose(0, 1) + self.place[:, None]
        )  # (positions, samples, units)
        third = self.layer(second.transpose(0, 1).reshape(-1, 3, 4))  # (samples x 2, 3, units)
        return [first, second, third]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.calls(x)[-1].sum((1, 2))


def test_every_call_is_compared_with_the_same_call_on_zeros():
    torch.manual_seed(fresh_seed())
    net, x = Windows().double(), torch.randn(12, 6, 4).double()
    table = fm.layer_table({"a": net, "again": net, "wrapped": nn.Sequential(net)}, [x[:5], x[5:10], x[10:]])
    assert table.column("layer") == ["layer", "layer", "0.layer"]
    with torch.no_grad():
        found, zero = net.calls(x), net.calls(torch.zeros_like(x))
    outputs, change = (
        torch.cat([t.reshape(-1, 4) for t in ts])
        for ts in (found, [f - z for f, z in zip(found, zero, strict=True)])
    )
    constant = float(torch.stack([t.abs().mean() for t in zero]).mean())
    for row in table.rows:
        assert row["variance"] == pytest.approx(float(outputs.var(0, correction=0).mean()))
        assert row["|z(x) - z(0)|"] == pytest.approx(float(change.abs().mean()))
        assert row["mean |z(0)|"] == pytest.approx(constant)


def test_a_layer_that_runs_on_some_values_only_is_refused():
    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) if x.any() else x

    with pytest.raises(ValueError, match="call 0 of a Linear is not made on zeros"):
        fm.layer_table({"m": Some()}, [torch.randn(2, 4)])
