"""Reports: the page, the notebook's view, the terminal's screen, and what is refused."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch

import fastmatch as fm
from helpers.browser import faults
from helpers.examples import namespace


@pytest.fixture(scope="module")
def names():
    return namespace()


@pytest.fixture(scope="module")
def alignment(names):
    return fm.align(names["model_a"], names["model_b"], names["x"])


@pytest.fixture(scope="module")
def report(names, alignment):
    return alignment.report(names["model_a"], names["model_b"], names["test_loader"], points=3)


VOID = {"meta", "img", "br", "line", "circle", "path", "polyline"}


class _Tags(HTMLParser):
    """Checks that tags close in order, and collects what is loaded and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loaded, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.loaded += [value for key, value in attrs if key in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_loads_nothing(report):
    page = report.html()
    found = _Tags(page)
    assert found.loaded
    assert all(url.startswith("data:image/png") for url in found.loaded)
    assert "url(" not in page
    assert "prefers-color-scheme: dark" in page
    text = " ".join(" ".join(found.text).split())
    for part in (
        "Loss barrier",
        "Units against units",
        "What moves together",
        "Time",
        "Recipe",
        "WeightMatching()",
    ):
        assert part in text


def test_names_are_escaped(names, alignment):
    report = alignment.report(names["model_a"], names["model_b"], names=("<script>x</script>", "a & b"))
    page = report.html()
    assert "<script" not in page
    assert "&lt;script&gt;x" in page
    assert "<script" not in report._repr_html_().replace("&lt;script", "")


def test_the_barriers_are_those_of_the_curves(names, alignment, report):
    a, b, data = names["model_a"], names["model_b"], names["test_loader"]
    before = fm.interpolate(a, b, data, 3)
    after = fm.interpolate(a, alignment.apply(b), data, 3)
    tiles = {tile.label: tile for tile in report.tiles}
    assert tiles["Loss barrier"].before == f"{before.barrier:.3g}"
    assert tiles["Loss barrier"].value == f"{after.barrier:.3g}"
    assert tiles["Loss barrier"].note.startswith(
        "half the difference" if after.has_no_rise else "lower is better"
    )
    assert tiles["Accuracy of the average"].value == f"{100 * after.midpoint[1]:.1f}%"
    assert tiles["Function of B"].value == "unchanged"
    assert tiles["Proved optimal"].value == "3 of 3 groups"
    assert [len(chart.lines) for chart in report.charts] == [2, 2]


def test_inputs_without_targets_give_activations_and_no_curve(names, alignment):
    inputs = [batch for batch, _ in names["test_loader"]]
    report = alignment.report(names["model_a"], names["model_b"], inputs)
    assert len(report.tables) == 2
    assert not report.charts


def test_state_dicts_have_a_report_of_their_weights(names, alignment):
    states = [names[key].state_dict() for key in ("model_a", "model_b")]
    report = alignment.report(*states)
    assert [table.title for table in report.tables] == ["How alike the weights of matched units are"]
    with pytest.raises(TypeError, match="model_a: expected a torch module"):
        alignment.report(*states, names["test_loader"])


def test_wrong_arguments_are_refused(names, alignment):
    a, b, data = names["model_a"], names["model_b"], names["test_loader"]
    with pytest.raises(TypeError, match="data: is read 2 times, but an iterator"):
        alignment.report(a, b, iter(data))
    with pytest.raises(ValueError, match="points: expected a whole number of at least 3"):
        alignment.report(a, b, data, points=2)
    with pytest.raises(ValueError, match="names: expected two"):
        alignment.report(a, b, names=("one",))
    with pytest.raises(ValueError, match="architectures must be equal"):
        alignment.report(a, torch.nn.Linear(2, 2))


def test_a_page_is_written_whole_or_not_at_all(report, tmp_path):
    report.save(tmp_path / "report.html")
    with pytest.raises(FileExistsError, match="--force"):
        report.save(tmp_path / "report.html")
    report.save(tmp_path / "report.html", force=True)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report.html()
    with pytest.raises(ValueError, match=r"path: expected a file ending in \.htm, \.html"):
        report.save(tmp_path / "report.txt")


def test_a_notebook_shows_the_page_in_a_frame(report):
    text = report._repr_html_()
    assert re.fullmatch(r'<iframe title="[^"]*" style="[^"]*" srcdoc="[^"]*"></iframe>', text, re.DOTALL)


def test_the_text_fits_a_screen(report, alignment, names):
    lines = str(report).splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80
    assert any("Loss barrier" in line and "->" in line for line in lines)
    rows = [line for line in lines if "█" in line]
    scale = lines[lines.index(rows[0]) - 1]
    table = report.tables[0]
    assert [float(end) for end in scale.split()] == [table.low, table.high]
    assert {line.index("█") for line in rows} == {len(scale) - len(scale.lstrip())}
    many = torch.nn.Sequential(
        *[layer for _ in range(40) for layer in (torch.nn.Linear(6, 6), torch.nn.ReLU())]
    )
    found = fm.align(many, many, torch.randn(2, 6)).report(many, many)
    lines = str(found).splitlines()
    assert len(lines) <= 30
    assert any("weakest of 39 rows" in line for line in lines)


@pytest.mark.parametrize(("width", "dark"), [(360, True), (800, False), (1280, True), (1280, False)])
def test_nothing_overflows(report, tmp_path, width, dark):
    report.save(tmp_path / "report.html")
    assert faults([tmp_path / "report.html"], width, tmp_path, dark=dark) == {}


def test_an_alignment_that_was_loaded_or_moves_nothing_has_a_report(names, alignment, tmp_path):
    alignment.save(tmp_path / "p.safetensors")
    loaded = fm.Alignment.load(tmp_path / "p.safetensors")
    report = loaded.report(names["model_a"], names["model_b"], names["test_loader"], points=3)
    labels = [tile.label for tile in report.tiles]
    assert "Proved optimal" not in labels
    assert {tile.label: tile.value for tile in report.tiles}["Function of B"] == "not proved"
    still = torch.nn.Linear(3, 2)
    spec = fm.PermutationSpec.trace(still, torch.randn(2, 3))
    empty = fm.Alignment({}, spec).report(
        still, still, [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))], points=3
    )
    assert "0 of 0 units in 0 groups change their place." in empty.sentences
    assert "stays at" in empty.sentences[0]
    _Tags(empty.html())


def test_a_loss_that_is_not_finite_is_said(names, alignment):
    def loss(output, targets):
        return output.sum() * float("nan")

    report = alignment.report(names["model_a"], names["model_b"], names["test_loader"], points=3, loss=loss)
    assert "is not finite" in report.sentences[0]
    _Tags(report.html())
