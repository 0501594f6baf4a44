"""The report of a merge, and of its renormalization."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastmatch._internal.batches import Forward, check_data, check_module, default_forward
from fastmatch._internal.coefficients import check_weights, remembered_weights
from fastmatch._internal.states import State, check_same_architecture, state_of
from fastmatch._internal.stopwatch import Stopwatch
from fastmatch._internal.words import count_of, short
from fastmatch.evaluation.layers import layer_table
from fastmatch.evaluation.scores import Scores, score
from fastmatch.matching.objective import included
from fastmatch.report.content import LayerTable, Tile
from fastmatch.report.data import has_targets
from fastmatch.report.measures import Layer
from fastmatch.report.report import Report
from fastmatch.report.versions import versions

__all__ = ["merge_report"]

Model = nn.Module | Mapping[str, torch.Tensor]


def merge_report(
    merged: Model,
    endpoints: Sequence[Model],
    data: Iterable[Any] | None = None,
    *,
    renormalized: Model | None = None,
    weights: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    forward: Forward = default_forward,
) -> Report:
    """Return a page and a summary of a merge, and of its renormalization: what it lost, layer by layer.

    Example:
        >>> merged = fm.merge([model_a, model_b])
        >>> repaired = fm.renormalize(merged, [model_a, model_b], loader, "repair")
        >>> report = fm.merge_report(merged, [model_a, model_b], test_loader, renormalized=repaired)
        >>> report.save("merge.html")

    Args:
        merged: the merge, a module or a state dict.
        endpoints: the models that were merged, aligned.
        data: a loader of modules' inputs, which measures the variance of every layer; with targets also loss and
            accuracy. None compares weights only.
        renormalized: the merge after its renormalization.
        weights: the coefficients of the merge. None takes those noted on the merge, else equal ones.
        names: what to call the endpoints.
        loss, forward: see :func:`fastmatch.score`; None takes its loss.

    Returns:
        A :class:`fastmatch.Report`.

    Raises:
        TypeError: ``data`` is given with a state dict, which cannot be run, or it is an iterator.
        ValueError: no endpoint, other architectures, or names or weights that do not fit the endpoints.

    Cost: every tensor is read once; with data one pass over it per model, and one more for the loss.
    """
    if not endpoints:
        raise ValueError("endpoints: expected at least one model")
    known = remembered_weights(merged) if isinstance(merged, nn.Module) else None
    alphas = check_weights(weights if weights is not None or known is None else known, len(endpoints))
    titles = [f"endpoint {k + 1}" for k in range(len(endpoints))] if names is None else list(names)
    if len(titles) != len(endpoints):
        raise ValueError(f"names: expected {len(endpoints)}, one per endpoint; got {len(titles)}")
    stages = {"merge": merged} if renormalized is None else {"merge": merged, "renormalized": renormalized}
    states = {word: state_of(model, word) for word, model in stages.items()}
    ends = [state_of(model, f"endpoints[{k}]") for k, model in enumerate(endpoints)]
    for k, end in enumerate(ends):
        check_same_architecture(states["merge"], end, "merged", f"endpoints[{k}]")
    own: dict[str, Any] = {} if loss is None else {"loss": loss}
    keys = [f"endpoint {k + 1}" for k in range(len(endpoints))]
    watch = Stopwatch()
    with watch("report: weights"):
        tables = _weight_tables(states, ends, alphas)
    scores: dict[str, Scores] = {}
    if data is not None:
        check_data(data, reads=2)
        modules = {**dict(zip(keys, endpoints, strict=True)), **stages}
        for name, model in modules.items():
            check_module(model, name)
        with watch("report: layers"):
            tables.insert(0, _variance_table(modules, keys, alphas, data, forward))
        if has_targets(data):
            with watch("report: loss"):
                scores = {name: score(m, data, forward=forward, **own) for name, m in modules.items()}  # type: ignore[arg-type]
    shares = ", ".join(f"{alpha:.3g} of {title}" for alpha, title in zip(alphas, titles, strict=True))
    return Report(
        title="Merge of "
        + count_of(len(endpoints), "network")
        + (", renormalized" if renormalized is not None else ""),
        subtitle=shares,
        sentences=tuple(_sentences(tables, scores, keys)),
        tiles=tuple(_tiles(tables, scores, keys)),
        tables=tuple(tables),
        seconds=watch.seconds,
        recipe={
            **{
                key: f"{alpha:.6g} of {title}" for key, alpha, title in zip(keys, alphas, titles, strict=True)
            },
            **versions(),
        },
    )


def _weight_tables(
    states: Mapping[str, State], ends: Sequence[State], alphas: Sequence[float]
) -> list[LayerTable]:
    """Return the size of the merge's weights beside the endpoints', and how alike these are."""
    sizes, cosines = [], []
    for name, first in states["merge"].items():
        if not included(name, first, "weights"):
            continue
        rows = torch.stack([end[name].detach().double().cpu().flatten() for end in ends])
        norms = rows.norm(dim=1)
        expected = float((norms * torch.tensor(alphas, dtype=torch.float64, device="cpu")).sum())
        ratios = [float(s[name].double().norm()) / expected if expected else None for s in states.values()]
        before = ratios[0] if len(ratios) == 2 else None
        sizes.append(Layer(name, len(first), before, ratios[-1], None, None))
        if len(ends) > 1:
            alike = torch.nn.functional.normalize(rows) @ torch.nn.functional.normalize(rows).T
            others = ~torch.eye(len(ends), dtype=torch.bool, device="cpu")
            cosines.append(Layer(name, len(first), None, float(alike[others].mean()), None, None))
    words = ("merge", "renormalized") if len(states) == 2 else ("", "merge")
    found = [
        LayerTable(
            "How large the weights are",
            "Norm of a tensor of the merge over the mean norm of the endpoints'. Averages of unlike weights shrink.",
            tuple(sizes), 0.0, _top(sizes), 1.0, "tensor", words,
        )
    ]  # fmt: skip
    if cosines:
        lowest = min(row.after or 0.0 for row in cosines)
        found.append(
            LayerTable(
                "How alike the endpoints are",
                "Cosine of the endpoints' tensors, the mean over pairs: 1 for equal directions, 0 for unrelated ones.",
                tuple(cosines), -1.0 if lowest < -0.1 else min(0.0, round(lowest, 1)), 1.0, None, "tensor", ("", "cosine"),
            )
        )  # fmt: skip
    return found


def _top(rows: Sequence[Layer]) -> float:
    """The end of a scale on which 1 is the target."""
    return 2.0 if any((v or 0.0) > 1.25 for row in rows for v in (row.before, row.after)) else 1.25


def _variance_table(
    modules: Mapping[str, Any],
    titles: Sequence[str],
    alphas: Sequence[float],
    data: Iterable[Any],
    forward: Forward,
) -> LayerTable:
    """Return the variance of each layer's output over the endpoints' average."""
    table = layer_table(modules, data, endpoints=titles, weights=alphas, forward=forward)
    stages = [name for name in modules if name not in titles]
    columns = [table.where(model=name) for name in stages]
    rows = []
    for first, last in zip(columns[0].rows, columns[-1].rows, strict=True):
        before = first["variance ratio"] if len(stages) == 2 else math.nan
        old, new = (v if math.isfinite(v) else None for v in (before, last["variance ratio"]))
        rows.append(Layer(first["layer"], 0, old, new, None, None))
    return LayerTable(
        "How much the layers still vary",
        "Variance of a layer's output on the data over the endpoints' average. Below 1, signals fade; renormalization "
        "brings them back.",
        tuple(rows), 0.0, _top(rows), 1.0, "layer", ("merge", "renormalized") if len(stages) == 2 else ("", "merge"),
    )  # fmt: skip


def _last(scores: Mapping[str, Scores], titles: Sequence[str]) -> tuple[Scores | None, Scores, float, float]:
    """(merge before its renormalization, the final model, mean loss and accuracy of the endpoints)."""
    stages = [found for name, found in scores.items() if name not in titles]
    ends = [scores[title] for title in titles]
    loss = sum(s.loss for s in ends) / len(ends)
    accuracy = sum(s.accuracy for s in ends) / len(ends)
    return (stages[0] if len(stages) == 2 else None), stages[-1], loss, accuracy


def _sentences(
    tables: Sequence[LayerTable], scores: Mapping[str, Scores], titles: Sequence[str]
) -> list[str]:
    if scores:
        before, after, loss, _ = _last(scores, titles)
        first = (
            ""
            if before is None
            else f"Renormalization takes the loss from {before.loss:.3g} to {after.loss:.3g}. "
        )
        return [
            f"{first}The merge has loss {after.loss:.3g}; the networks that it was made of have {loss:.3g}."
        ]
    size = tables[0]
    measured = [row.after for row in size.rows if row.after is not None]
    if not measured:
        return ["Nothing of the merge could be measured."]
    mean = sum(measured) / len(measured)
    what = "layers vary" if size.kind == "layer" else "weights are"
    return [f"The merge's {what} {short(mean)} times what the endpoints' are."]


def _tiles(tables: Sequence[LayerTable], scores: Mapping[str, Scores], titles: Sequence[str]) -> list[Tile]:
    tiles = []
    if scores:
        before, after, loss, accuracy = _last(scores, titles)
        was = "" if before is None else f"{before.loss:.3g}"
        tiles.append(Tile("Loss", f"{after.loss:.3g}", was, f"the networks themselves: {loss:.3g}"))
        if math.isfinite(accuracy):
            was = "" if before is None else f"{100 * before.accuracy:.1f}%"
            note = f"the networks themselves: {100 * accuracy:.1f}%"
            tiles.append(Tile("Accuracy", f"{100 * after.accuracy:.1f}%", was, note))
    for table in tables:
        measured = [row for row in table.rows if row.after is not None]
        if not measured:
            continue
        after = sum(row.after or 0.0 for row in measured) / len(measured)
        olds = [row.before for row in measured if row.before is not None]
        was = short(sum(olds) / len(olds)) if olds else ""
        label = {
            "How much the layers still vary": "Variance left",
            "How large the weights are": "Size of the weights",
        }
        note = (
            "mean over the tensors" if table.kind == "tensor" else "mean over the layers; 1 is the endpoints'"
        )
        tiles.append(Tile(label.get(table.title, "Cosine of the endpoints"), short(after), was, note))
    return tiles
